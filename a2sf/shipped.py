"""Files that come with the package: `conf/`, and the published numbers under `runs/reference/`.

In a clone they lie at the top of the repository, in an installed wheel inside the package.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
PUBLISHED = Path("runs/reference")


def shipped(path: str) -> Path:
    """Where a file or folder that the repository has at `path` lies."""
    inside = PACKAGE / path
    return inside if inside.exists() else PACKAGE.parent / path


def found(path: str | Path) -> Path:
    """A user's path, where a name under `runs/reference/` that is not here means what comes with the package.

    So presets and the commands in docs work with the same paths in a clone and without one.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)
    if given.is_absolute() or given.exists() or given.parts[:2] != PUBLISHED.parts:
        return given
    inside = shipped(given.as_posix())
    return inside if inside.exists() else given
