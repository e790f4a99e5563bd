"""`a2sf run`, from a clone."""

import sys

from a2sf.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
