"""The retention traces of a sweep, side by side: means per layer as a table, and a picture per document."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from a2sf.collect import DEFAULT_PAIR, Grid
from a2sf.trace import Trace, load, overlap, picture

FILE = "traces.npz"
COLUMNS = (
    *("model", "shots", "task", "policy", "budget", "factor", "documents"),
    *("layer", "evicted", "age", "mass", "lost", "overlap"),
)
DOCUMENTS, PICTURES = 3, 12
"""Documents pictured of a task and budget, and pictures at most."""


Groups = dict[tuple[str, int, str, str], dict[tuple[str, str, str], dict[int, Trace]]]
"""(model, shots, task, budget) -> (policy, label, factor) -> document -> trace."""


def trace_frame(groups: Groups, pair: tuple[str, str] = DEFAULT_PAIR) -> pd.DataFrame:
    """What the traced documents of every cell evicted, per layer; empty where no cell was traced.

    Returns:
        One row per cell and layer: `evicted`, `age`, `mass` and `lost` as in `Trace.summary`, mean over documents, and
        `overlap`, the Jaccard index with the second policy of `pair` at the same budget.
    """
    rows = []
    for (model, shots, task, budget), by_policy in groups.items():
        other = next((found for (policy, _, _), found in by_policy.items() if policy == pair[1]), {})
        for (_, label, factor), traces in by_policy.items():
            means = pd.concat([t.summary() for t in traces.values()]).groupby("layer").mean()
            common = [overlap(*alike(t, other[d])) for d, t in traces.items() if d in other]
            means["overlap"] = sum(common) / len(common) if common else float("nan")
            about = (model, shots, task, label, budget, factor, len(traces))
            rows += [(*about, layer, *values) for layer, *values in means.itertuples()]
    return pd.DataFrame(rows, columns=COLUMNS)


def trace_pictures(groups: Groups, directory: Path) -> dict[str, list[Path]]:
    """Caption -> the PNG and SVG written: a document's text once per policy, as each cache kept it."""
    written: dict[str, list[Path]] = {}
    for (model, shots, task, budget), by_policy in groups.items():
        documents = sorted({d for traces in by_policy.values() for d in traces})[:DOCUMENTS]
        for document in documents:
            if len(written) == PICTURES:
                return written
            shown = {}
            for (_, label, factor), traces in by_policy.items():
                if document in traces:
                    alone = sum(other == label for _, other, _ in by_policy) == 1
                    shown[label if alone else f"{label} {factor}"] = traces[document]
            shown = dict(zip(shown, alike(*shown.values()), strict=True))
            stem = f"kept-{model}-{task}-{shots}shot-{budget.replace(' ', '')}-doc{document}"
            files = [directory / f"{stem}.{ending}" for ending in ("png", "svg")]
            directory.mkdir(parents=True, exist_ok=True)
            for file in files:
                picture(shown, file)
            written[f"What was kept of document {document} of {task} at budget {budget} ({model}, {shots}-shot)"] = (
                files
            )
    return written


def alike(*traces: Trace) -> list[Trace]:
    """Traces of one document, cut to the prompt where the policies went on to generate different text."""
    same = all(t.pieces == traces[0].pieces for t in traces)
    return list(traces) if same else [t.first(t.context) for t in traces]


def read_traces(grid: Grid) -> Groups:
    """The traces beside a grid's cells; a full cache evicts nothing and is left out."""
    groups: Groups = {}
    for model, shots, part in grid.parts():
        for system in part.systems():
            for task, key in system.keys.items():
                file = part.cells[key].path / FILE if key in part.cells else None
                if file is not None and file.exists() and not system.is_full:
                    of = groups.setdefault((model, shots, task, system.budget), {})
                    of[system.policy, system.label, system.factor] = {t.document: t for t in load(file)}
    return groups
