"""The long-context tasks: made to a length in tokens of the model at hand, without a download."""
