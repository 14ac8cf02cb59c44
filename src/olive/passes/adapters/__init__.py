"""Passes on adapters."""
