"""Weights to integers, in PyTorch's form of a model."""
