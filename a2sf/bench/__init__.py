"""Benchmarks: ratios of two things timed side by side. Knows everything."""
