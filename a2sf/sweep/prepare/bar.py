"""Progress bars that show the state of the disk, whichever process changes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from a2sf.hub.refusals import Wanted
from a2sf.hub.snapshot import arrived

POLL_SECONDS = 0.5


def download_bar(screen: Console, wanted: Wanted, total: int) -> AbstractContextManager[None]:
    """A bar of the bytes of a repository that arrive in the cache."""
    before = arrived(wanted)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    return bar(
        screen, [*columns, TimeRemainingColumn()], wanted.repo, total, lambda: min(total, arrived(wanted) - before)
    )


@contextmanager
def bar(
    screen: Console, columns: Sequence[ProgressColumn], what: str, total: int, completed: Callable[[], float]
) -> Iterator[None]:
    """A bar that shows `completed()`."""
    with Progress(*columns, console=screen, transient=True) as shown:
        row = shown.add_task(what, total=total, completed=int(completed()))

        def follow() -> None:
            shown.update(row, completed=completed())

        try:
            with repeating(follow, POLL_SECONDS):
                yield
        finally:
            follow()


@contextmanager
def repeating(call: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `call` every `seconds` in another thread while the block runs."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
