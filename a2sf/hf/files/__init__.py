"""A model's files: what a path names, requests to the hub and its errors, and whether the weights are complete."""
