"""Experiment trackers: Weights & Biases, TensorBoard, JSON lines."""
