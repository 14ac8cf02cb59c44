"""Metrics and the runners that measure them."""
