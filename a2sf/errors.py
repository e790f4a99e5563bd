"""Errors that a user can correct, and notices for the user."""

from __future__ import annotations

import difflib
import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct; the commands print its one sentence without a traceback and exit with 1."""


class ConfigError(UserError):
    """A config key holds a value that is not allowed.

    The message names the key, the value and what is allowed.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key}={value} is not allowed: {allowed}.")


class PolicyError(UserError):
    """A policy's own code failed; the message says where."""


class UnsoundKernelError(UserError):
    """A kernel that was compiled on this machine differs from plain torch in its self-check."""


class Notice(UserWarning):
    """Something that the user should know; the commands print it, although they hide other warnings."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The names in `known` that are closest to a mistyped `name`, as the end of a sentence; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def counted(n: int, noun: str) -> str:
    """A number with its noun in the singular or plural: `1 cell`, `1,200 cells`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as part of a sentence; the error's class if there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def place(error: BaseException) -> str:
    """Where a policy's own code raised an error, as part of a sentence: file, line and function; "" if it did not.

    It is the innermost function, of those called since the error was caught, that is neither ours nor a library's.
    """
    ours = str(Path(__file__).parent)
    libraries = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        folder = os.path.abspath(frame.filename)
        if not frame.filename.startswith("<") and not any(folder.startswith(x + os.sep) for x in (ours, *libraries)):
            return f"{_shown(frame.filename)}, line {frame.lineno}, in {frame.name}"
    return ""


def definition(function: Callable[..., Any]) -> str:
    """Where a function is defined, as part of a sentence: file and line; "" if that is not known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "" if code is None else f"{_shown(code.co_filename)}, line {code.co_firstlineno}"


def _shown(file: str) -> str:
    """A path as it is seen from the current folder."""
    path = Path(os.path.abspath(file))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
