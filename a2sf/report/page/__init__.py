"""The report: one HTML file for a browser without network."""
