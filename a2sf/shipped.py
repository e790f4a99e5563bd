"""Files that come with the package: `conf/`, and the published numbers under `runs/reference/`.

In a clone they lie at the top of the repository, in an installed wheel inside the package; everything asks here.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(path: str) -> Path:
    """Where a file or folder that the repository has at `path` lies."""
    inside = PACKAGE / path
    return inside if inside.exists() else PACKAGE.parent / path
