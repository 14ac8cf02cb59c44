"""What runs a model during an evaluation: one contract, one file a runtime."""
