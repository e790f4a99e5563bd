"""Configuration, cells, sweeps, what is on disk, trackers. Knows evaluation."""
