"""Passes that leave PyTorch."""
