"""Plots as PNG and SVG files."""
