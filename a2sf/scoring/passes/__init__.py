"""Passes of the model: sequences in shared rows without padding."""
