"""Files and directories that appear whole or not at all, and that a power cut does not take back."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
"""What file systems answer that cannot flush a directory, or do not let us open it."""


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; what is made there is renamed to `target` at the end, and is on the disk then.

    A file takes the place of an earlier one. Nothing is left behind where the block or the renaming raises.

    Raises:
        OSError: if the disk refuses, or `target` is a directory that is not empty.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        flush(temporary)
        rename(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename a file or directory, also on the disk: the directories that name it are flushed.

    Raises:
        OSError: if the disk refuses.
    """
    source.replace(target)
    for folder in {source.parent, target.parent}:
        _flush_directory(folder)


def write(target: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8, with names of files as they are on the disk.

    Raises:
        OSError: if the disk refuses.
    """
    with placed(target) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))


def flush(path: Path) -> None:
    """Write a file, or a directory with all in it, from memory to the disk.

    Raises:
        OSError: if the disk refuses.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return
    for inside in path.iterdir():
        flush(inside)
    _flush_directory(path)


def open_as_new(folder: Path) -> None:
    """Give the files of a directory the permissions that a new file gets there, whatever wrote them."""
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def _flush_directory(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
