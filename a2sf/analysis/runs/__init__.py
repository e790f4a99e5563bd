"""Finished runs of this harness, of lm-eval and of inspect_ai, in one form, so that any two can be compared."""
