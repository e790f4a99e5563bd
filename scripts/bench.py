"""Time the harness against what it replaces, side by side in one process: `make bench`. Results in runs/bench/bench.json."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which torch does

from a2sf import app
from a2sf.bench import harness

if __name__ == "__main__":
    app.guard(harness.main)
