"""Reading results: paired statistics, fidelity, claims. Knows what is on disk, never a model."""
