"""Requests of a task in, answers of each system out."""
