"""A model's calls: what is put around them so that they are pruned."""
