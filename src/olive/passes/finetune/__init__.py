"""Fine-tuning passes."""
