"""The long-context tasks as lm-eval asks for them, by functions of this file."""

from __future__ import annotations

from typing import Any

from a2sf.tasks.long.documents import documents

__all__ = ["documents", "process_results"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of what has to be named that the generated text names."""
    text = results[0].lower()
    return {"recall": sum(a.lower() in text for a in doc["answers"]) / len(doc["answers"])}
