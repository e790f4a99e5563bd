"""`a2sf bench`, from a clone."""

import sys

from a2sf.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
