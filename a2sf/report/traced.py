"""The retention traces of a sweep, side by side: means per layer as a table, and a picture per document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid
from a2sf.analysis.statistics.texts import CONFIDENCE
from a2sf.engine.trace import Trace, load, overlap
from a2sf.store.names import safe

MEASURED = ("evicted", "age", "mass", "lost", "overlap")
COLUMNS = (
    *("model", "shots", "task", "policy", "budget", "factor", "documents"),
    *("layer", *MEASURED, *(f"{measure}_half" for measure in MEASURED)),
)
DOCUMENTS, PICTURES = 3, 12
"""Documents pictured of a task and budget, and pictures at most."""
PICTURED = 240
"""Tokens of a document that a picture shows, from its end."""
WIDTH = 110
"""Characters per line of a picture."""


Groups = dict[tuple[str, int, str, str, str], dict[tuple[str, str, str], dict[int, Trace]]]
"""(model, shots, task, budget, schedule) -> (policy, label, factor) -> document -> trace."""


def trace_frame(groups: Groups, pair: tuple[str, str] = DEFAULT_PAIR) -> pd.DataFrame:
    """What the traced documents of every cell evicted, per layer; empty where no cell was traced.

    Returns:
        One row per cell and layer: `evicted`, `age`, `mass` and `lost` as in `Trace.summary`, mean over documents, and
        `overlap`, the Jaccard index with the second policy of `pair` at the same budget and schedule; `<measure>_half` is
        half the 95 % interval of each (Student's t), NaN for a single document.
    """
    rows = []
    for (model, shots, task, budget, _), by_policy in groups.items():
        other = next((found for (policy, _, _), found in by_policy.items() if policy == pair[1]), {})
        for (_, label, factor), traces in by_policy.items():
            of_documents = [
                t.summary().assign(overlap=overlap(*comparable(t, other[d])) if d in other else float("nan"))
                for d, t in traces.items()
            ]
            by_layer = pd.concat(of_documents).groupby("layer")
            halves = by_layer.sem() * special.stdtrit(by_layer.count() - 1, 0.5 + CONFIDENCE / 2)
            about = (model, shots, task, label, budget, factor, len(traces))
            both = by_layer.mean()[list(MEASURED)].join(halves[list(MEASURED)], rsuffix="_half")
            rows += [(*about, layer, *values) for layer, *values in both.itertuples()]
    return pd.DataFrame(rows, columns=COLUMNS)


def trace_pictures(groups: Groups, directory: Path) -> list[Path]:
    """The PNG and SVG files written: a document's text once per policy, shaded by what each cache retained."""
    written: list[Path] = []
    for (model, shots, task, budget, schedule), by_policy in groups.items():
        several = len({s for *where, s in groups if where == [model, shots, task, budget]}) > 1
        documents = sorted({d for traces in by_policy.values() for d in traces})[:DOCUMENTS]
        for document in documents:
            if len(written) == 2 * PICTURES:
                return written
            shown = {}
            for (_, label, factor), traces in by_policy.items():
                if document in traces:
                    alone = sum(other == label for _, other, _ in by_policy) == 1
                    shown[label if alone else f"{label} {factor}"] = traces[document]
            of = f", {schedule}" if several else ""
            stem = f"kept-{safe(model)}-{safe(task)}-{shots}shot-{(budget + of).replace(' ', '')}-doc{document}"
            directory.mkdir(parents=True, exist_ok=True)
            for ending in ("png", "svg"):
                written.append(directory / f"{stem}.{ending}")
                picture(shown, written[-1])
    return written


def comparable(*traces: Trace) -> list[Trace]:
    """Traces of one document, cut to the prompt where the policies generated different texts."""
    same = all(t.pieces == traces[0].pieces for t in traces)
    return list(traces) if same else [t.first(t.context) for t in traces]


def retained_share(trace: Trace) -> np.ndarray:
    """float [tokens]: the share of layers and KV heads that retain each token at the end of the document."""
    return trace.retained().mean(axis=(0, 1))


def read_traces(grid: Grid) -> Groups:
    """The traces beside a grid's cells; a full cache evicts nothing and is left out."""
    groups: Groups = {}
    for model, shots, part in grid.by_model():
        for system in part.systems():
            for task, key in system.keys.items():
                file = part.cells[key].open_traces() if key in part.cells and not system.is_full else None
                if file is not None:
                    of = groups.setdefault((model, shots, task, system.budget, system.schedule), {})
                    of[system.policy, system.label, system.factor] = {t.document: t for t in load(file)}
    return groups


def picture(traces: dict[str, Trace], path: Path) -> None:
    """Draw one document: its text once per policy, each token darker the more layers and KV heads retained it to the end.


    Generated text is underlined.

    Args:
        traces: by the policy's label; all of one prompt.
        path: where to write; its ending says the format.

    Raises:
        ValueError: if there is no trace, or they are of different documents.
    """
    from matplotlib.figure import Figure

    if len({(t.context, *t.pieces[: t.context]) for t in traces.values()}) != 1:
        raise ValueError("a picture shows traces of one document, at least one of them")
    wrote = any(len(t.pieces) > t.context for t in traces.values()) and len({t.pieces for t in traces.values()}) > 1
    texts = {label: _laid_out(trace) for label, trace in traces.items()}
    lines = [laid[-1][2] + 1 for laid in texts.values()]
    figure = Figure(figsize=(11, 0.19 * sum(n + 2 for n in lines) + 0.3), layout="constrained")
    panels = figure.subplots(len(traces), 1, squeeze=False, height_ratios=[n + 2 for n in lines])[:, 0]
    for axes, (label, trace), n in zip(panels, traces.items(), lines, strict=True):
        share = retained_share(trace)
        for i, column, row, piece in texts[label]:
            value = float(share[i])
            axes.add_patch(_box(column, row, len(piece), value))
            ink = "white" if value > 0.55 else "black"
            axes.text(
                column, row + 0.5, piece, family="monospace", fontsize=7, va="center", color=ink, parse_math=False
            )
            if wrote and i >= trace.context:
                axes.plot([column, column + len(piece)], [row + 0.95] * 2, color="#D55E00", lw=1.2)
        axes.set(xlim=(0, WIDTH), ylim=(n, 0))
        note = "share of layers and heads that retained each token" + ", underlined: generated text" * wrote
        axes.set_title(f"{label}: document {trace.document}, {note}", fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=150)


def _laid_out(trace: Trace) -> list[tuple[int, int, int, str]]:
    """Of each of the last tokens its number, column, line and text."""
    found, x, line = [], 0, 0
    for i, piece in list(enumerate(p.replace("\n", "⏎") or " " for p in trace.pieces))[-PICTURED:]:
        if x and x + len(piece) > WIDTH:
            x, line = 0, line + 1
        found.append((i, x, line, piece))
        x += len(piece)
    return found


def _box(column: int, row: int, width: int, value: float) -> Any:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    return Rectangle((column, row), width, 1, color=colormaps["Blues"](value), linewidth=0)
