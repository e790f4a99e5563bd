"""Results of sweeps: read from disk, selected, and named for tables."""
