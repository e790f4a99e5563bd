"""Errors that a user can correct, and notices for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct; the commands print its one sentence without a traceback and exit with 1."""


class ConfigError(UserError):
    """A config key holds a value that is not allowed.

    The message names the key, the value and what is allowed.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={value} is not allowed: {allowed}.")


class UnsoundKernelError(UserError):
    """A kernel that was compiled on this machine differs from plain torch in its self-check."""


class Notice(UserWarning):
    """Something that the user should know; the commands print it, although they hide other warnings."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The names in `known` that are closest to a mistyped `name`, as the end of a sentence; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as part of a sentence; the error's class if there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
