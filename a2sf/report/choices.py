"""The choices of `a2sf tables` on the command line; no library is imported here."""

PIVOTS = ("task", "budget", "factor", "policy")
"""What goes across."""
AVERAGES = ("tasks", "documents")
"""What counts equally in an average over tasks."""
FORMATS = ("md", "tex", "csv")
"""Files of a table."""
