"""Configuration: schema, overrides, grids, the settings of a run."""
