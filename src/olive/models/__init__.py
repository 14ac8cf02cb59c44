"""What a model artifact is: load, save, describe."""
