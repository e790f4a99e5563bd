"""A model's files: what a path names, and whether the weights are complete."""
