"""One technique, one file."""
