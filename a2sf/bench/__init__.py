"""Benchmarks: ratios of two measurements that alternate in one run. May import every other package."""
