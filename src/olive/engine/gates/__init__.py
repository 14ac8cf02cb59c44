"""Checks between stages, each a hard failure."""
