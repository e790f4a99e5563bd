"""The functions that the YAML files of the long-context tasks name."""

from __future__ import annotations

from typing import Any

from a2sf.tasks.long.documents import documents

__all__ = ["documents", "process_results"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the answers that the generated text contains."""
    text = results[0].lower()
    return {"recall": sum(a.lower() in text for a in doc["answers"]) / len(doc["answers"])}
