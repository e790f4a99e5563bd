"""Comparisons of systems on the same documents."""
