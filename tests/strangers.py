"""Acting as a user who owns nothing here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """What is done inside has no rights beyond those of a user who owns nothing; skips where we cannot become one."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that everybody can look into, as pytest's own cannot be."""
    folder = Path(tempfile.mkdtemp(prefix="a2sf-shared-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
