"""Which of a task's documents share a text: what statistics must take whole.

A field of the documents says so: the one that is asked for (`data.cluster`), else the one that the task names as the
context which its questions share (`shared_context` in its metadata).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

COLUMN = "cluster"
"""Of the per-document file: equal for documents that share a text."""


def field_of(task: Any, asked: str | None) -> str | None:
    """The field whose text documents share; None: it is not known that any do.

    Args:
        task: of lm-eval, its documents loaded.
        asked: the field that the user names; it counts for tasks whose documents have it.
    """
    if asked is not None and asked in fields(task):
        return asked
    named = (task.config.metadata or {}).get("shared_context")
    return None if named is None else str(named)


def fields(task: Any) -> list[str]:
    """The fields of a task's documents, as its first one has them."""
    first = next(iter(task.eval_docs), None)
    return list(map(str, first)) if isinstance(first, Mapping) else []


def key_of(document: Any, field: str) -> str:
    """Equal for documents with the same text; a document without one has a key of its own."""
    text = document.get(field) if isinstance(document, Mapping) else None
    about = [field, text] if text not in (None, "") else ["", document]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
