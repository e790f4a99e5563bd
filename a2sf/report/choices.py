"""The choices of `a2sf tables` on the command line; no library is imported here."""

PIVOTS = ("task", "budget", "factor", "policy")
"""What goes across."""
FORMATS = ("md", "tex", "csv")
"""Files of a table."""
