"""Which of a task's documents share a text; for statistics they are one sample.

The text is a field of the documents: the one in `data.cluster`, else the one that the task's metadata names as the
context of several questions (`shared_context`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

COLUMN = "cluster"
"""Column of the per-document file, equal for documents that share a text."""


def field_of(task: Any, requested: str | None) -> str | None:
    """The field whose text several documents share; None: no such field is known.

    Args:
        task: of lm-eval, with its documents loaded.
        requested: the field that the user names; it is used if the documents have it.
    """
    if requested is not None and requested in fields(task):
        return requested
    named = (task.config.metadata or {}).get("shared_context")
    return None if named is None else str(named)


def fields(task: Any) -> list[str]:
    """The fields of a task's first document."""
    first = next(iter(task.eval_docs), None)
    return list(map(str, first)) if isinstance(first, Mapping) else []


def key_of(document: Any, field: str) -> str:
    """A hash that is equal for documents with the same text; a document without text has a different one."""
    text = document.get(field) if isinstance(document, Mapping) else None
    about = [field, text] if text not in (None, "") else ["", document]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
