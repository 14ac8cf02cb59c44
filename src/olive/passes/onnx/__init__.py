"""Passes on ONNX graphs: weights to integers, activations to integers, half precision."""
