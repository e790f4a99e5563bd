"""The compiled kernel of GPUs (Triton)."""
