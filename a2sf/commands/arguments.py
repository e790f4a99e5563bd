"""The commands' parser of arguments: a slip is one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """As argparse's, but an error is one sentence without the usage; the exit code is 2, as there."""

    def error(self, message: str) -> NoReturn:
        """End the command."""
        self.exit(2, f"{message}; see {self.prog} --help.\n")
