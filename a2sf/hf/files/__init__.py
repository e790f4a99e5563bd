"""A model's files: what a path names, what the hub is asked, how its refusals are told, whether the weights are whole."""
