"""The documents that a reader of the report can browse: prompts, each system's answers, and retained tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.results.documents import DOCUMENT, documents_of
from a2sf.analysis.results.grid import Grid, SystemResults
from a2sf.engine.trace import Trace
from a2sf.errors import UserError
from a2sf.report.traced import Groups, retained_share

ANSWERS = 60_000
"""Answers (a document under a system) in a page, at most: about 2 MB."""
FEWEST = 20
"""Documents of a task that are shown whatever the number of systems."""
BEGINNING, END = 800, 2400
"""Characters of a long prompt's beginning and end that are shown."""
SHOWN = {
    *DOCUMENT,
    "context",
    "choices",
    "gold",
    "prediction",
    "loglikelihoods",
    "context_tokens",
    "target",
    "generated",
    "ended",
    "finish",
    "tokens",
    "thinking",
    "thinking_tokens",
    "continuation_tokens",
}
"""Columns of a cell's documents that a page shows, with the metric's and what its filter extracted."""
CHARACTERS = 12_000_000
"""Characters of generated texts in a page, at most; of a task `FEWEST` documents are shown however long they are."""
CELLS = 48
"""Rows and columns of a map of what was cached."""
Place = tuple[str, int, Grid, SystemResults]


def browsable(systems: Sequence[Place], traces: Groups) -> list[dict[str, Any]]:
    """One entry for each model, number of shots and task, for the page's script.

    Args:
        systems: each with its model, number of shots and the grid of these; a system's number is its place in this list.
        traces: retention traces, as `a2sf.report.traced.read_traces` returns them.

    Returns:
        `documents`: prompt, choices and gold answer; `answers`: number of a system -> its answers to these documents, None
        where it lacks one; `total`: the number of documents of the task. Where a page has no room for all documents, those
        on which the systems differ most are taken.
    """
    by_task: dict[tuple[str, int, str], dict[int, SystemResults]] = {}
    for number, (model, shots, _, system) in enumerate(systems):
        for task in system.keys:
            by_task.setdefault((model, shots, task), {})[number] = system
    limit = max(FEWEST, ANSWERS // max(1, sum(map(len, by_task.values()))))
    found = []
    for (model, shots, task), numbered in sorted(by_task.items()):
        columns = {n: c for n, s in numbered.items() if (c := _columns(systems[n][2], s.keys[task])) is not None}
        if not columns:
            continue
        first = next(iter(columns.values()))
        answers = {n: _answers(c, first["key"], systems[n][2].metric) for n, c in columns.items()}
        order = sorted(range(len(first["key"])), key=lambda i: -_disagreement([a[i] for a in answers.values()]))
        rows = sorted(_short_enough(order[:limit], answers.values(), CHARACTERS // len(by_task)))
        found.append(
            {
                "model": model,
                "shots": shots,
                "task": task,
                "total": len(first["key"]),
                "documents": [_document(first, i) for i in rows],
                "answers": {n: [a[i] for i in rows] for n, a in answers.items()},
                "traces": _traces(traces, (model, shots, task), numbered),
            }
        )
    return found


def _short_enough(
    order: Sequence[int], answers: Iterable[Sequence[dict[str, Any] | None]], characters: int
) -> list[int]:
    """The first of some documents, as many as have room."""
    sizes = [0] * len(order)
    for of_system in answers:
        for at, i in enumerate(order):
            answer = of_system[i] or {}
            sizes[at] += len(answer.get("text") or "") + len(answer.get("thinking") or "")
    room = (np.cumsum(sizes) <= characters).sum()
    return list(order[: max(FEWEST, int(room))])


def _columns(grid: Grid, key: str) -> dict[str, list[Any]] | None:
    """A cell's documents; None where they cannot be read, which the notes of the tables say."""
    try:
        documents = documents_of(grid.cells[key])
    except (KeyError, UserError):
        return None
    of_grid = (f"metric/{grid.metric}", _extraction(grid.metric))
    shown = documents[[c for c in documents.columns if c in SHOWN or c in of_grid]]
    columns: dict[str, list[Any]] = {str(k): v for k, v in shown.to_dict("list").items()}
    return columns | {"key": list(zip(*(columns[c] for c in DOCUMENT), strict=True))}


def _extraction(metric: str) -> str:
    """The column of what the filter of a metric extracts."""
    return f"extracted,{metric.partition(',')[2]}"


def _document(columns: dict[str, list[Any]], i: int) -> dict[str, Any]:
    context = str(columns["context"][i]) if "context" in columns else ""
    if (left_out := len(context) - BEGINNING - END) > 0:
        context = f"{context[:BEGINNING]}\n[… {left_out:,} characters left out …]\n{context[-END:]}"
    document = {"id": int(columns["doc_id"][i]), "context": context, "choices": [*map(str, columns["choices"][i])]}
    document["gold"] = int(columns["gold"][i])
    document["target"] = _text(columns, "target", i)
    document["tokens"] = max(map(int, columns["context_tokens"][i]), default=0) if "context_tokens" in columns else 0
    return document


def _answers(columns: dict[str, list[Any]], keys: Sequence[Any], metric: str) -> list[dict[str, Any] | None]:
    """In the order of `keys`: the metric's value, the prediction, log-likelihoods in nats, and the generated text."""
    rows = {key: i for i, key in enumerate(columns["key"])}
    values = columns.get(f"metric/{metric}")
    found: list[dict[str, Any] | None] = []
    for i in map(rows.get, keys):
        if i is None:
            found.append(None)
            continue
        value = None if values is None or pd.isna(values[i]) else round(float(values[i]), 4)
        logs = [round(float(v), 2) for v in columns["loglikelihoods"][i]]
        answer: dict[str, Any] = {"value": value, "prediction": int(columns["prediction"][i]), "logs": logs}
        if not logs:
            answer |= _written(columns, i, _extraction(metric))
        found.append(answer)
    return found


def _written(columns: dict[str, list[Any]], i: int, extraction: str) -> dict[str, Any]:
    """A generated text: what was thought and answered, its tokens, why it ended, and what a filter extracted from it."""
    tokens = columns["tokens"][i] if "tokens" in columns else None
    number = len(tokens) if tokens is not None else sum(map(int, columns.get("continuation_tokens", [[]] * (i + 1))[i]))
    found = {
        "text": _text(columns, "generated", i),
        "cut": columns.get("ended", [None] * (i + 1))[i] is False,
        "finish": _text(columns, "finish", i),
        "count": number,
        "extracted": _text(columns, extraction, i),
        "ids": None if tokens is None else [int(t) for t in tokens],
    }
    if thinking := _text(columns, "thinking", i):
        found |= {"thinking": thinking, "thought": int(columns["thinking_tokens"][i])}
    return {k: v for k, v in found.items() if v is not None or k == "text"}


def _text(columns: dict[str, list[Any]], name: str, i: int) -> str | None:
    value = columns[name][i] if name in columns else None
    return None if value is None or pd.isna(value) else str(value)


def _disagreement(answers: Sequence[dict[str, Any] | None]) -> int:
    """How many different answers systems gave to a document."""
    return len({(a["value"], a["prediction"], a.get("text")) for a in answers if a is not None})


def _traces(groups: Groups, place: tuple[str, int, str], numbered: dict[int, SystemResults]) -> list[dict[str, Any]]:
    """Traced documents: the tokens, how many of them are the prompt, and the share of layers and KV heads retaining each."""
    found = []
    for number, s in numbered.items():
        traces = groups.get((*place, s.budget, s.schedule), {}).get((s.policy, s.label, s.factor), {})
        for document, trace in traces.items():
            share = [round(float(v), 2) for v in retained_share(trace)]
            entry = {"system": number, "document": int(document), "pieces": [*trace.pieces], "context": trace.context}
            found.append(entry | {"share": share, "map": cached_map(trace)})
    return found


def cached_map(trace: Trace) -> dict[str, Any]:
    """Which positions were cached at each step, in a map of at most `CELLS` × `CELLS` cells.

    Returns:
        `steps` and `positions`: the first of each row's and column's tokens; `share`: [rows][columns], the percentage of
        layers and KV heads that have a position cached, mean over the cell's positions at its last step; None: not yet read.
    """
    T = trace.evicted_at.shape[-1]
    edges = np.unique(np.linspace(0, T, min(CELLS, T) + 1).round().astype(int))
    rows: list[list[int | None]] = []
    for end in edges[1:]:
        cached = trace.retained(int(end) - 1).mean(axis=(0, 1))
        row = [round(100 * float(cached[a:b].mean())) for a, b in pairwise(edges) if b <= end]
        rows.append([*row, *[None] * (len(edges) - 1 - len(row))])
    starts = edges[:-1].tolist()
    return {"steps": (edges[1:] - 1).tolist(), "positions": starts, "share": rows}
