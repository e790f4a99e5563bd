"""Tables, plots and pages. Knows analysis."""
