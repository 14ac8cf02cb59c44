"""Dataset to rows to text to tokens to batches."""
