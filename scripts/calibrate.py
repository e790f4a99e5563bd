"""`a2sf calibrate`, from a clone."""

import sys

from a2sf.cli import main

if __name__ == "__main__":
    main(["calibrate", *sys.argv[1:]])
