"""What eviction does to generated texts, document by document, against the full cache's texts.

Measures of a system: `tokens` generated and `thinking_tokens` among them, the share `cut_off` at the limit of tokens, the
share that ends in a `loop`, `cache_bytes` at the peak, `tokens_per_second`. Against the full cache: the share of `equal`
texts, the `first_difference` (the place of the first token that is another, from 0), and `full_text_shift`, the change of
the log-likelihood of the full cache's own text, in nats per token (docs/statistics.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from a2sf.analysis.results.documents import DOCUMENT, documents_of, paired_documents, texts_of
from a2sf.analysis.results.grid import Grid, SystemResults
from a2sf.analysis.statistics.loops import ends_in_loop
from a2sf.analysis.statistics.paired import paired_difference
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell

PAIRED = ("tokens", "thinking_tokens", "cut_off", "loop", "cache_bytes")
"""Measures of a system whose differences from the full cache are tested."""


def text_measures(documents: pd.DataFrame) -> pd.DataFrame:
    """One row per document of a task that generates: the measures of its text; NaN where something is not stored.

    Raises:
        UserError: if the documents are not of such a task.
    """
    if "target" not in documents:
        raise UserError("These documents have no generated texts.")
    rows = [_measures(row) for row in documents.to_dict("records")]
    frame = documents[DOCUMENT].reset_index(drop=True).join(pd.DataFrame(rows))
    thought = frame["thinking_tokens"]
    return frame.assign(thinking_tokens=thought if (thought > 0).any() else np.nan)


def _measures(row: Mapping[Any, Any]) -> dict[str, float]:
    """Of one document; where several texts were drawn for it, means over these."""
    tokens = [
        len(t) if _known(t) else n for t, n in zip(_draws(row, "tokens"), row["continuation_tokens"], strict=False)
    ]
    thought = [n for n in _draws(row, "thinking_tokens") if _known(n)]
    ended = [e for e in _draws(row, "ended") if _known(e)]
    texts = zip(_draws(row, "thinking"), _draws(row, "generated"), strict=True)
    # a text that was cut off while the model was thinking has no answer
    loops = [ends_in_loop(answer or thinking or "") for thinking, answer in texts if _known(answer)]
    return {
        "tokens": _mean(tokens),
        "thinking_tokens": _mean(thought),
        "cut_off": 1 - _mean(ended),
        "loop": _mean(loops),
        "cache_bytes": _number(row.get("cache_bytes")),
    }


def text_changes(pruned: StoredCell, full: StoredCell, common: bool = False) -> tuple[pd.DataFrame, TextClusters]:
    """One row per document of what two cells share: the measures of both texts (`<measure>_full`), and how they differ.

    Returns:
        The measures, and which of the documents share a text.

    Raises:
        UserError: if the documents differ, cannot be read, or are not of a task that generates.
    """
    left, right = paired_documents(pruned, full, common)
    frame = text_measures(left)
    frame = frame.join(text_measures(right).drop(columns=DOCUMENT).add_suffix("_full"))
    pairs = list(zip(_column(left, "tokens"), _column(right, "tokens"), strict=True))
    frame["first_difference"] = [_first_difference(a, b) if _known(a) and _known(b) else np.nan for a, b in pairs]
    texts = zip(*(_column(d, name) for name in ("generated", "thinking") for d in (left, right)), strict=True)
    frame["equal"] = [
        _number((a, x or "") == (b, y or "") if _known(a) and _known(b) else None) for a, b, x, y in texts
    ]
    (here, there), tokens = (
        (_floats(d, "full_text_loglikelihood") for d in (left, right)),
        _floats(left, "full_text_tokens"),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        frame["full_text_shift"] = np.where(tokens > 0, (here - there) / tokens, np.nan)
    return frame, texts_of(left, right)


def text_frame(grid: Grid) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The effects on texts of all systems of a grid, by task.

    Returns:
        One row per system and task: means of the measures, and where there is a full-cache cell `<measure>_change` with
        `_low` and `_high` (95 %, paired), `equal`, the median `first_difference` of the texts that differ, and
        `full_text_shift` with its interval. And one row per document of each of these, as `text_changes` gives it.
    """
    rows: list[dict[str, Any]] = []
    documents: list[pd.DataFrame] = []
    for model, shots, part in grid.by_model():
        systems = part.systems()
        fulls = {s.variant: s for s in systems if s.is_full}
        for task in part.tasks:
            for system in systems:
                found = _of_system(part, system, fulls.get(system.variant), task)
                if found is None:
                    continue
                where: dict[str, Any] = {
                    "model": model,
                    "shots": shots,
                    "task": task,
                    "policy": system.policy,
                    "label": system.label,
                }
                where |= {"budget": system.budget, "factor": system.factor}
                rows.append(where | found[0])
                documents.append(found[1].assign(**where)[[*where, *found[1]]])
    return pd.DataFrame(rows), pd.concat(documents, ignore_index=True) if documents else pd.DataFrame()


def _of_system(
    part: Grid, system: SystemResults, full: SystemResults | None, task: str
) -> tuple[dict[str, Any], pd.DataFrame] | None:
    """A system's row and its documents; None where the task generates no text, or its documents cannot be read."""
    stored = part.cells.get(system.keys.get(task, ""))
    reference = None if full is None or system.is_full else part.cells.get(full.keys.get(task, ""))
    try:
        if stored is None or "target" not in stored.documents:
            return None
        if reference is None:
            frame, texts = text_measures(documents_of(stored)), None
        else:
            frame, texts = text_changes(stored, reference, part.mixed)
    except UserError:
        return None  # which the notes of the tables say
    row: dict[str, Any] = {"n": len(frame)}
    row |= {m: float(frame[m].mean()) for m in PAIRED}
    row["tokens_per_second"] = _speed(stored, frame)
    row["seconds"] = stored.result["timing"]["seconds"]
    if texts is not None:
        for measure in PAIRED:
            row |= _difference(f"{measure}_change", frame[measure], frame[f"{measure}_full"], texts)
        row["equal"] = float(frame["equal"].mean())
        differ = frame["first_difference"][frame["equal"] == 0]
        row["first_difference"] = float(differ.median()) if differ.notna().any() else np.nan
        row |= _difference("full_text_shift", frame["full_text_shift"], 0 * frame["full_text_shift"], texts)
    return row, frame


def _difference(name: str, first: pd.Series, second: pd.Series, texts: TextClusters) -> dict[str, float]:
    """The mean difference of the documents that have both numbers, with its interval."""
    both = (first.notna() & second.notna()).to_numpy()
    if not both.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    d = paired_difference(first[both].to_numpy(), second[both].to_numpy(), TextClusters.keyed(texts.of[both]))
    return {name: d.value, f"{name}_low": d.low, f"{name}_high": d.high}


def _speed(stored: StoredCell, frame: pd.DataFrame) -> float:
    """Generated tokens per second of the cell's time, prompts included; NaN where answers were taken from another result."""
    timing = stored.result["timing"]
    fresh = not timing.get("reused_requests") and timing["seconds"] > 0
    return float(frame["tokens"].sum() / timing["seconds"]) if fresh else np.nan


def _first_difference(a: Any, b: Any) -> float:
    """The place of the first token that differs; the length of both where they are equal."""
    n = min(len(a), len(b))
    other = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return float(other[0]) if len(other) else float(n)


def _draws(row: Mapping[Any, Any], name: str) -> list[Any]:
    """A column of each text that was drawn for a document, or of its only one."""
    several = row.get(f"draws/{name}")
    return [row.get(name)] if several is None or not _known(several) else list(several)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else np.nan


def _column(documents: pd.DataFrame, name: str) -> list[Any]:
    return documents[name].tolist() if name in documents else [None] * len(documents)


def _floats(documents: pd.DataFrame, name: str) -> np.ndarray:
    return np.array([_number(x) for x in _column(documents, name)])


def _known(value: Any) -> bool:
    """Whether a value is stored: no None and no NaN."""
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def _number(value: Any) -> float:
    return float(value) if _known(value) else np.nan
