"""The choices of tests on the command line; no library is imported here."""

FAMILIES = ("table", "model", "sweep")
"""Which tests are corrected together."""
CORRECTIONS = ("holm", "fdr")
"""Methods: the chance of any false finding, or the share of false findings."""
MARGIN_ALLOWED = "give a number of points above 0 and up to 100"
