"""Paired comparisons of cells: the same documents, answered under two policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pandas as pd

from a2sf.analysis.results.documents import paired_documents, texts_of
from a2sf.analysis.results.grid import AVERAGE, DEFAULT_PAIR, Grid, SystemResults
from a2sf.analysis.statistics.equivalence import Within, average_within_margin
from a2sf.analysis.statistics.families import HOLM, Adjusted, Correction
from a2sf.analysis.statistics.paired import Difference, average_difference, paired_difference
from a2sf.analysis.statistics.texts import TextClusters
from a2sf.errors import UserError
from a2sf.store.runs import StoredCell

Result = TypeVar("Result")


def paired_values(
    a: StoredCell, b: StoredCell, metric: str, common: bool = False
) -> tuple[np.ndarray, np.ndarray, TextClusters]:
    """Per-document values of a metric in two cells, in the same order, and which of these documents share a text.

    Raises:
        UserError: as `paired_documents`, and if the metric has no per-document values, or is not their mean.
    """
    left, right = paired_documents(a, b, common)
    column = f"metric/{metric}"
    for cell, documents in ((a, left), (b, right)):
        if column not in documents and column in cell.documents:
            raise UserError(
                f"{metric} of {cell.cell['task']} is not the mean of a number for each document, so it cannot be paired."
            )
        if column not in documents or documents[column].isna().any():
            raise UserError(f"{cell.path.name} has no value of {metric} for each document, so it cannot be paired.")
    return left[column].to_numpy(float), right[column].to_numpy(float), texts_of(left, right)


def joined(changes: Sequence[np.ndarray], texts: Sequence[TextClusters]) -> tuple[list[np.ndarray], list[TextClusters]]:
    """The documents of several tasks as those of one, so that each document counts the same."""
    return [np.concatenate(changes)], [TextClusters.joined(texts)]


def _same_documents(a: StoredCell, b: StoredCell, metric: str, common: bool) -> bool:
    """Whether a metric has a value for the same documents in two cells, as far as it has one for each document."""
    if all(c.metrics[metric].get("n") == c.result["documents"]["n"] for c in (a, b)):
        return True
    try:
        left, right = paired_documents(a, b, common)
    except UserError:
        return True  # the tests say that the cells cannot be paired
    column = f"metric/{metric}"
    if column not in left or column not in right:
        return column not in left and column not in right
    return bool((left[column].isna().to_numpy() == right[column].isna().to_numpy()).all())


@dataclass
class Comparer:
    """Compares systems of one grid, and notes why a comparison was not possible.

    Attributes:
        grid: the cells to compare.
        problems: why comparisons were not possible, one sentence for each reason.
    """

    grid: Grid
    problems: list[str] = field(default_factory=list)

    def comparable(self, a: SystemResults, b: SystemResults) -> bool:
        """Whether each task's metric is of the same documents in two systems: else a difference is also one of documents.

        A task's own code may give a metric to some documents only, and to others under another system.
        """
        cells = self.grid.cells
        for task in sorted(a.keys.keys() & b.keys.keys()):
            one, other = cells.get(a.keys[task]), cells.get(b.keys[task])
            if one is None or other is None:  # a directory with results.csv alone
                same = a.rows[task].n == b.rows[task].n
            else:
                same = _same_documents(one, other, self.grid.metric, self.grid.mixed)
            if same:
                continue
            self._note(
                f"{task}: some documents have no {self.grid.metric}, and not the same ones under each system, so no "
                "difference is shown."
            )
            return False
        return True

    def task(self, a: str, b: str) -> Difference | None:
        """Two cells by their keys; None where they cannot be paired."""
        return self._attempt(lambda: paired_difference(*self._values(a, b)))

    def average(self, a: Mapping[str, str], b: Mapping[str, str]) -> Difference | None:
        """Two systems, given as task -> key, on the average over tasks."""
        return self._attempt(lambda: average_difference(*self._weighted(*self._changes(a, b, sorted(a)))))

    def within(self, a: Sequence[Mapping[str, str]], b: Sequence[Mapping[str, str]], margin: float) -> Within | None:
        """Whether two systems differ by less than a margin on the average over tasks, and over budgets if there are several.

        Args:
            a, b: of each budget, task -> key.
        """
        return self._attempt(lambda: average_within_margin(*self._over_budgets(a, b), margin))

    def group(
        self, a: Mapping[str, str], b: Mapping[str, str], tasks: Sequence[str], weighted: bool
    ) -> Difference | None:
        """Two systems on a group's score, over its tasks; weighted by size, every document counts the same."""

        def compared() -> Difference:
            changes, texts = self._changes(a, b, tasks)
            if weighted:
                changes, texts = joined(changes, texts)
            return average_difference(changes, texts)

        return self._attempt(compared)

    def over_budgets(self, a: Sequence[Mapping[str, str]], b: Sequence[Mapping[str, str]]) -> Difference | None:
        """Two policies on the mean over budgets and tasks, each given as task -> key for the same budgets in turn.

        Every document was answered once a budget, so what is paired and resampled is its mean over the budgets.
        """

        return self._attempt(lambda: average_difference(*self._over_budgets(a, b)))

    def _over_budgets(
        self, a: Sequence[Mapping[str, str]], b: Sequence[Mapping[str, str]]
    ) -> tuple[list[np.ndarray], list[TextClusters]]:
        """As `_changes`, each document's mean over the budgets."""
        tasks = sorted(a[0])
        found = [self._changes(x, y, tasks) for x, y in zip(a, b, strict=True)]
        for task, *changes in zip(tasks, *(c for c, _ in found), strict=True):
            if len({len(c) for c in changes}) > 1:
                raise UserError(
                    f"{task} was not run on the same documents at each budget, so budgets cannot be averaged."
                )
        means = [np.mean(changes, axis=0) for changes in zip(*(c for c, _ in found), strict=True)]
        return self._weighted(means, found[0][1])

    def _weighted(
        self, changes: list[np.ndarray], texts: list[TextClusters]
    ) -> tuple[list[np.ndarray], list[TextClusters]]:
        """The changes of tasks as they count in an average: as one task where the grid counts documents."""
        return joined(changes, texts) if self.grid.by_documents else (changes, texts)

    def _changes(
        self, a: Mapping[str, str], b: Mapping[str, str], tasks: Sequence[str]
    ) -> tuple[list[np.ndarray], list[TextClusters]]:
        """For each task, the first system's values minus the second's, and which of the documents share a text."""
        found = [self._values(a[t], b[t]) for t in tasks]
        return [x - y for x, y, _ in found], [texts for *_, texts in found]

    def _values(self, a: str, b: str) -> tuple[np.ndarray, np.ndarray, TextClusters]:
        cells = self.grid.cells
        return paired_values(cells[a], cells[b], self.grid.metric, common=self.grid.mixed)

    def _attempt(self, compute: Callable[[], Result]) -> Result | None:
        try:
            return compute()
        except KeyError:
            return None  # a directory with results.csv alone; the grid has said so already
        except UserError as error:
            self._note(str(error))
            return None

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Comparison:
    """Two systems on one task or the average: a row of `comparisons.csv`.

    Attributes:
        first, second: their labels; `difference` is first minus second.
        adjusted: its p-value after correction; None until corrected.
    """

    model: str
    shots: int
    task: str
    budget: str
    first: str
    second: str
    factor: str
    difference: Difference
    adjusted: Adjusted | None = None


def controls_of(
    systems: Sequence[SystemResults], pair: tuple[str, str] = DEFAULT_PAIR
) -> dict[tuple[str, str, str], SystemResults]:
    """Budget, schedule and variant -> the system of the pair's second policy there; of several, the first of `systems`."""
    return {(s.budget, s.schedule, s.variant): s for s in reversed(systems) if s.policy == pair[1]}


def matched(part: Grid, pair: tuple[str, str] = DEFAULT_PAIR) -> list[tuple[SystemResults, SystemResults | None]]:
    """Every system of the pair's first policy with the second policy's at the same budget and schedule, or None."""
    systems = part.systems(pair)
    controls = controls_of(systems, pair)
    return [(s, controls.get((s.budget, s.schedule, s.variant))) for s in systems if s.policy == pair[0]]


def compare_pair(
    grid: Grid, pair: tuple[str, str] = DEFAULT_PAIR, correction: Correction = HOLM
) -> tuple[list[Comparison], list[str]]:
    """Every row of the pair's first policy against the second at the same budget; a table for each model and shots.

    Returns:
        The comparisons, and one sentence for each thing that could not be compared.
    """
    found: list[Comparison] = []
    notes: list[str] = []
    for model, shots, part in grid.by_model():
        comparer = Comparer(part)
        for first, second in matched(part, pair):
            if second is None:
                of = f", schedule {first.schedule}," if len(grid.schedules) > 1 else ""
                notes.append(
                    f"{model}, {shots}-shot: no {pair[1]} at budget {first.budget}{of} to compare {pair[0]} with."
                )
                continue
            shared = sorted(set(first.keys) & set(second.keys))
            results = [(task, comparer.task(first.keys[task], second.keys[task])) for task in shared]
            if len(shared) > 1 and set(shared) == set(part.tasks):
                results.append((AVERAGE, comparer.average(first.keys, second.keys)))
            for task, difference in results:
                if difference is not None:
                    where = (model, shots, task, first.budget, first.label, second.label, first.factor)
                    found.append(Comparison(*where, difference))
        notes += comparer.problems
    if pair[0] not in set(grid.frame["policy"]):
        notes.append(f"There is no result of the policy {pair[0]}, so nothing is compared with {pair[1]}.")
    adjusted = correction.adjusted([c.difference.p for c in found], [(c.model, c.shots) for c in found])
    return [replace(c, adjusted=a) for c, a in zip(found, adjusted, strict=True)], list(dict.fromkeys(notes))


def comparisons_frame(comparisons: list[Comparison]) -> pd.DataFrame:
    """One row per comparison; values in the metric's own unit."""
    return pd.DataFrame(
        [
            {k: v for k, v in vars(c).items() if k not in ("difference", "adjusted")}
            | vars(c.difference)
            | (c.adjusted.columns if c.adjusted else {})
            for c in comparisons
        ]
    )
