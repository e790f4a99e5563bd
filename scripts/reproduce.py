"""`a2sf reproduce`, from a clone."""

import sys

from a2sf.cli import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
