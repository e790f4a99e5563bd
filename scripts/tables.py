"""`a2sf tables`, from a clone."""

import sys

from a2sf.cli import main

if __name__ == "__main__":
    main(["tables", *sys.argv[1:]])
