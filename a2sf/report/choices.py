"""What a table can be asked to be: the choices of the command line, which need no library."""

PIVOTS = ("task", "budget", "factor", "policy")
"""What goes across."""
FORMATS = ("md", "tex", "csv")
"""Files of a table."""
