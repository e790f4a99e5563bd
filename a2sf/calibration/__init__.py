"""Calibration on plain text: the best ranking, numbers and budget of each layer and head, and the retrieval heads."""
