"""What eviction does to generated texts, as tables of text: one for each model, number of shots and task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from a2sf.analysis.results.documents import texts_note
from a2sf.analysis.results.grid import Grid
from a2sf.analysis.results.labels import DASH
from a2sf.report.tables.cells import number
from a2sf.report.tables.text import TextTable

MIB = 2**20
LEGEND = (
    "Tokens: generated per text, thinking and stop sequence included. Thinking: tokens before the answer. Cut off: "
    "share of texts ended by the limit of tokens. Loop: share that ends with a phrase of at least two words, said at "
    "least three times in a row (Holtzman et al., 2020). Equal: share of texts equal to the full cache's; differs at:"
    " of the others, the median place of the first token that differs. Δ: differences from the full cache on the same"
    " documents, with 95 % intervals (paired). Δ log-likelihood: of the full cache's own texts, read under this cache"
    " (nats per token). Tokens/s: generated tokens over all of the cell's time. Cache: keys and values of one "
    "sequence at the peak, mean."
)


def generated_tables(grid: Grid, effects: pd.DataFrame) -> list[TextTable]:
    """Tables of what `a2sf.analysis.comparisons.generated.text_frame` found; columns without a number are left out."""
    tables = []
    for model, shots, part in grid.by_model():
        mine = effects[(effects["model"] == model) & (effects["shots"] == shots)] if len(effects) else effects
        for task, rows in mine.groupby("task", sort=True) if len(mine) else ():
            systems = {(s.label, s.budget, s.factor): s for s in part.systems()}
            lines = []
            for r in rows.to_dict("records"):
                system = systems[r["label"], r["budget"], r["factor"]]
                score = number(system.value(str(task)), part.percent)
                line = {"Policy": r["label"], "Budget": r["budget"], "Factor": r["factor"], part.metric: score}
                lines.append(line | _cells(r))
            frame = pd.DataFrame(lines)
            empty = [c for c in frame.columns[2:] if (frame[c] == DASH).all()]
            title = f"Generated texts: {task}, {model}, {shots}-shot (n = {int(rows['n'].max())})"
            legend = " ".join(filter(None, [LEGEND, texts_note(part.cells_shown)]))
            tables.append(TextTable(title, frame.drop(columns=empty), legend, model=model, shots=shots))
    return tables


def _cells(r: Mapping[Any, Any]) -> dict[str, str]:
    return {
        "Tokens": _plain(r, "tokens", decimals=1),
        "Δ tokens": _interval(r, "tokens_change", decimals=1),
        "Thinking": _plain(r, "thinking_tokens", decimals=1),
        "Cut off (%)": _plain(r, "cut_off", percent=True),
        "Δ cut off": _interval(r, "cut_off_change", percent=True),
        "Loop (%)": _plain(r, "loop", percent=True),
        "Δ loop": _interval(r, "loop_change", percent=True),
        "Equal (%)": _plain(r, "equal", percent=True),
        "Differs at": _plain(r, "first_difference", decimals=0),
        "Δ log-likelihood": _interval(r, "full_text_shift", decimals=3),
        "Tokens/s": _plain(r, "tokens_per_second", decimals=1),
        "Cache (MiB)": _plain(r, "cache_bytes", decimals=2, unit=MIB),
    }


def _plain(r: Mapping[Any, Any], name: str, *, percent: bool = False, decimals: int = 1, unit: float = 1.0) -> str:
    value = r.get(name)
    return DASH if value is None or pd.isna(value) else number(value / unit, percent, decimals=decimals)


def _interval(r: Mapping[Any, Any], name: str, *, percent: bool = False, decimals: int = 1) -> str:
    values = [r.get(f"{name}{end}") for end in ("", "_low", "_high")]
    if values[0] is None or pd.isna(values[0]):
        return DASH
    value, low, high = (number(v, percent, signed=True, decimals=decimals) for v in values)
    return f"{value} [{low}, {high}]"
