"""Warnings of libraries while a cell is computed: collected and counted, instead of printed or lost.

A warning may concern a number, so only those that `NOISE` names, each with a reason, are dropped.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.utils import warning_once
from transformers.utils import logging as of_transformers

from a2sf.errors import Notice
from a2sf.hf.warned import Warned, cause

LOGGERS = ("lm_eval", "transformers", "datasets")
"""Loggers whose records of level WARNING and above are collected; other libraries compute no numbers here."""
CATEGORIES = (RuntimeWarning, UserWarning)
"""Categories of Python's warnings: those of NumPy and scikit-learn about numbers; warnings about code have others."""
NOISE = {
    "Label index was not in within range": "reported with task and document (`a2sf.scoring.doubts`)",
    "Prompts lose their beginning": "the same",
    "Token indices sequence length is longer": "a prompt that is cut is reported with task and document",
    "divide by zero encountered": "lm-eval's acc_norm of an empty choice, which is reported with task and document",
    "is defined, but aggregation is not": "lm-eval takes the one that the metric was registered with",
    "is defined, but higher_is_better is not": "the same",
    "Custom kwargs can be passed to": "advice for lm-eval's command line; here it is task_args",
    "generation flags are not valid and may be ignored": "settings of sampling in a model's files, where text is greedy",
    "`pretrained` model kwarg is not of type": "the model is loaded here on purpose",
    "Passed an already-initialized model": "the same",
}
"""Part of a message -> why it is not shown."""


def _count(into: Warned, source: str, message: str) -> None:
    """Count a library's message, unless it is noise."""
    if not any(noise in message for noise in NOISE):
        cause(into).add(source, message)


class _Collecting(logging.Handler):
    def __init__(self, into: Warned) -> None:
        super().__init__(logging.WARNING)
        self.into = into

    def emit(self, record: logging.LogRecord) -> None:
        _count(self.into, record.name.partition(".")[0], record.getMessage())


@contextmanager
def collected(into: Warned | None = None, again: bool = False) -> Iterator[Warned]:
    """Collect warnings of libraries while the block runs; of nested blocks the innermost collects.

    Warnings inside `a2sf.hf.warned.caused_by` are counted there.

    Args:
        again: whether the block continues an earlier one, so that what libraries warn of once came already.
    """
    into = Warned() if into is None else into
    if not again:  # warnings that libraries emit once per process are to come once per block
        warning_once.cache_clear()
        of_transformers.warning_once.cache_clear()
    handler = _Collecting(into)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(log.level, log.handlers, log.propagate) for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.WARNING)
            log.handlers, log.propagate = [handler], False
        with warnings.catch_warnings():
            shown = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, Notice):  # notices go to the screen, at once
                    shown(message, category, *where, **more)
                else:
                    _count(into, category.__name__, str(message))

            for category in CATEGORIES:
                warnings.simplefilter("always", category)
            warnings.simplefilter("default", Notice)
            warnings.showwarning = show
            yield into
    finally:
        for log, (level, handlers, propagate) in zip(loggers, before, strict=True):
            log.setLevel(level)
            log.handlers, log.propagate = handlers, propagate


@contextmanager
def silent() -> Iterator[None]:
    """Do not print lm-eval's warnings while the block runs; inside `collected` they are collected."""
    log = logging.getLogger("lm_eval")
    if any(isinstance(h, _Collecting) for h in log.handlers):
        yield
        return
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
