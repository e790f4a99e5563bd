"""The commands' parser of arguments: a slip is one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """As argparse's, but an error is one sentence without the usage, and the help says the defaults; the exit code is 2."""

    def format_help(self) -> str:
        """The help, with the default of each option that has one."""
        for action in self._actions:
            text, default = action.help or "", action.default
            if (
                not action.option_strings
                or "(default" in text
                or isinstance(default, bool)
                or default in (None, "", (), [])
            ):
                continue
            if default != argparse.SUPPRESS:
                shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
                action.help = f"{text} (default: {shown.replace('%', '%%')})".lstrip()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """End the command."""
        self.exit(2, f"{message}; see {self.prog} --help.\n")
