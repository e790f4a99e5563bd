"""Comparisons of sweeps with early stopping: which differences are shown, over all tasks and comparisons together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from a2sf.analysis.results.grid import Grid, SystemResults
from a2sf.analysis.statistics.families import HOLM, Correction, e_bh


@dataclass(frozen=True)
class Stopped:
    """What early stopping knows of two systems on one task.

    Attributes:
        first, second: their labels, with the factor if there is one.
        seen, of: documents that were scored, of how many.
        low, high: confidence interval of the difference, first minus second, on all documents, in the metric's own unit.
        e: e-value of "no difference on all documents".
        differs: whether it is rejected among those of its family by e-BH.
        tests: comparisons in the family.
    """

    model: str
    shots: int
    task: str
    budget: str
    schedule: str
    first: str
    second: str
    seen: int
    of: int
    low: float
    high: float
    e: float
    differs: bool = False
    tests: int = 1


def stopped_comparisons(grid: Grid, correction: Correction = HOLM) -> tuple[list[Stopped], list[str]]:
    """Every comparison that early stopping followed, and whether e-BH at 5 % over its family rejects "no difference".

    Args:
        correction: its family; the method is e-BH whatever it says, because these tests were read at many times.

    Returns:
        The comparisons, and one sentence about those without an e-value.
    """
    found: list[Stopped] = []
    without = 0
    for model, shots, part in grid.by_model():
        systems = {key: s for s in part.systems() for key in s.keys.values()}
        seen: set[tuple[str, ...]] = set()
        for key in systems:
            until = part.cells[key].result.get("until") if key in part.cells else None
            for reported in (until or {}).get("comparisons", []):
                keys = tuple(f"{key.rpartition('/')[0]}/{name}" for name in reported["cells"])
                if keys in seen or not set(keys) <= systems.keys():
                    continue
                seen.add(keys)
                if "e" not in reported:
                    without += 1
                    continue
                task = str(part.cells[key].cell["task"])
                found.append(_comparison((model, shots, task), [systems[k] for k in keys], reported, until))
    places: dict[Any, list[int]] = {}
    for i, c in enumerate(found):
        family = {"table": (c.model, c.shots), "model": c.model, "sweep": None}[correction.family]
        places.setdefault(family, []).append(i)
    for mine in places.values():
        for i, rejected in zip(mine, e_bh([found[i].e for i in mine]), strict=True):
            found[i] = replace(found[i], differs=rejected, tests=len(mine))
    note = f"{without} comparisons were stopped early by a version that stored no e-value, and are not tested together."
    return found, [note] if without else []


def stopped_frame(found: list[Stopped]) -> pd.DataFrame:
    """`stopped.csv`: one row per comparison, unrounded, in the metric's own unit."""
    return pd.DataFrame([vars(c) for c in found])


def _comparison(
    where: tuple[str, int, str], pair: list[SystemResults], reported: dict[str, Any], until: Any
) -> Stopped:
    first, second = pair
    pruned = second if first.is_full else first
    return Stopped(
        *where,
        pruned.budget,
        pruned.schedule,
        first.named,
        second.named,
        int(until["seen"]),
        int(until["of"]),
        float(reported["low"]),
        float(reported["high"]),
        float(reported["e"]),
    )
