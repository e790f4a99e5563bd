"""The recursion on a GPU: `run.py` is its entry, `scan.py` its heart."""
