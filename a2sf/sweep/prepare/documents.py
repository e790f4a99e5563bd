"""The documents of a sweep's cells: checked, identified once for all cells and workers, downloaded before the first cell.

Documents that are not available are reported once, for all their cells. The cells of other tasks run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from a2sf.errors import ConfigError, UserError
from a2sf.hub.refusals import HubError
from a2sf.sweep.cell import Cell, spec_with_tokenizer
from a2sf.sweep.prepare.bar import download_bar
from a2sf.tasks import checks
from a2sf.tasks.spec import ContentFinder, DataSpec, TaskSpec

CANNOT = " cannot be loaded: "
"""What follows a task's name in the sentences of `a2sf.hub.refusals`."""


@dataclass
class Resolved:
    """Cells with the content of their data: what identifies the documents.

    Attributes:
        cells: in the groups in which they were given, without those whose documents are not available.
        notes: what the user should know, one sentence each.
        refused: why documents are not available -> the names of their cells.
    """

    cells: list[tuple[Cell, ...]]
    notes: list[str]
    refused: dict[str, list[str]]


def check(cells: Iterable[Cell]) -> None:
    """Refuse tasks that cannot be run, as far as their definitions show; the hub is not used.

    Raises:
        ConfigError: for the first task that cannot be run with these settings, or two different tasks of one name.
    """
    named: dict[str, TaskSpec] = {}
    cells = list(cells)
    for spec in sorted({c.spec for c in cells}, key=str):
        spec.check()
        other = named.setdefault(spec.name, spec)
        if other.definition.digest() != spec.definition.digest():
            raise ConfigError(
                "tasks", spec.ref, f"it is called {spec.name}, as {other.ref} is; give it another `task:` in its file"
            )
    for cell in cells:
        if (
            cell.stopping_rule is not None
            and (known := checks.stopping_metrics(cell.spec.definition.config)) is not None
        ):
            checks.check_stopping(cell.task_name, cell.stopping_rule.metric, known)


def check_stopping(cells: Iterable[Cell]) -> None:
    """Refuse early stopping by a metric that a task's own code does not give, if its documents are on this machine.

    Raises:
        ConfigError: with the metrics of its first document.
    """
    metrics: dict[tuple[TaskSpec, int], dict[str, None]] = {}
    for cell in cells:
        if cell.stopping_rule is not None and checks.stopping_metrics(cell.spec.definition.config) is None:
            metrics.setdefault((cell.spec, cell.seed), {})[cell.stopping_rule.metric] = None
    for (spec, seed), of_spec in metrics.items():
        if spec.here:
            try:
                task = spec.build(seed)
            except UserError:
                continue  # `fetch` reports it
            for metric in of_spec:
                checks.check_stopping_metric(task, metric)


def resolve_content(groups: Sequence[Sequence[Cell]], planned_only: bool = False) -> Resolved:
    """Find what identifies each task's documents, once for all cells.

    Args:
        planned_only: nothing will be run, so documents that are not available are only a note.

    Raises:
        UserError: if no cell's documents are available.
    """
    contents, notes = ContentFinder(), []
    known: dict[tuple[Any, ...], DataSpec | UserError] = {}

    def key_of(cell: Cell) -> tuple[Any, ...]:
        return cell.spec, cell.model if cell.spec.makes_documents else None

    for cell in (c for group in groups for c in group):
        if (key := key_of(cell)) not in known:
            try:
                known[key] = contents.resolve(spec_with_tokenizer(cell))
            except UserError as error:
                if _is_mistake(error):
                    raise
                known[key] = error
    refused: dict[str, list[str]] = {}
    cells = []
    for group in groups:
        available = []
        for cell in group:
            found = known[key_of(cell)]
            if isinstance(found, DataSpec):
                available.append(dataclasses.replace(cell, data=found))
            elif planned_only:
                available.append(cell)
                notes.append(f"The names of cells of {cell.task_name} are provisional: {found}")
            else:
                refused.setdefault(str(found), []).append(_name(cell))
        cells.append(tuple(available))
    _some_left(cells, refused)
    return Resolved(cells, [*contents.notes, *dict.fromkeys(notes)], refused)


def _name(cell: Cell) -> str:
    """A cell's name, or its beginning if the documents, on which the rest depends, cannot be read."""
    with suppress(UserError):
        return cell.name
    return f"{cell.model_name}__{cell.policy.name}__{cell.task_name}"


def fetch(cells: Sequence[Cell], pending: Sequence[Cell], refused: dict[str, list[str]], screen: Console) -> list[Cell]:
    """Download and read the documents of all pending cells.

    Args:
        refused: as in `Resolved`; failures are added to it.

    Returns:
        `cells` without the pending ones whose documents are not available.

    Raises:
        ConfigError: if the documents show that a task cannot be run with these settings.
        UserError: if no cell is left.
    """
    broken: dict[TaskSpec, str] = {}
    for spec, seed in sorted({(c.spec, c.seed) for c in pending}, key=str):
        if spec in broken:
            continue
        try:
            with _download(spec, screen):
                _check_documents(spec.build(seed), [c for c in pending if c.spec == spec])
        except UserError as error:
            if _is_mistake(error):
                raise
            broken[spec] = str(error)
    unmade = {c.name for c in pending}
    available = []
    for cell in cells:
        why = broken.get(cell.spec)
        if why is not None and cell.name in unmade:
            refused.setdefault(why, []).append(cell.name)
        else:
            available.append(cell)
    _some_left([tuple(available)], refused)
    return available


def _check_documents(task: Any, cells: Sequence[Cell]) -> None:
    """Refuse documents that the cells of a task cannot be scored on.

    Raises:
        UserError: naming the field that is missing, or the metric.
    """
    limits = [c.limit for c in cells]
    checks.check_labels(task, None if None in limits else max(n for n in limits if n is not None))
    for metric in dict.fromkeys(c.stopping_rule.metric for c in cells if c.stopping_rule is not None):
        checks.check_stopping_metric(task, metric)


def _is_mistake(error: UserError) -> bool:
    """Whether the error is in the configuration, not in the documents or the network."""
    return isinstance(error, ConfigError) and not isinstance(error, HubError)


def _some_left(cells: Sequence[Sequence[Cell]], refused: dict[str, list[str]]) -> None:
    if refused and not any(cells):
        raise UserError(" ".join(by_reason(refused)))


def by_reason(refused: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The same with one sentence for all tasks that are refused for the same reason."""
    of_reason: dict[str, list[str]] = {}  # the sentences that give it
    for why in refused:
        task, cannot, reason = why.partition(CANNOT)
        of_reason.setdefault(cannot + reason if cannot and task.startswith("tasks=") else why, []).append(why)
    made: dict[str, list[str]] = {}
    for reason, sentences in of_reason.items():
        names = [why.removesuffix(reason).removeprefix("tasks=") for why in sentences]
        sentence = sentences[0] if len(sentences) == 1 else f"tasks={','.join(names)}{reason}"
        made[sentence] = [cell for why in sentences for cell in refused[why]]
    return made


@contextmanager
def _download(spec: TaskSpec, screen: Console) -> Iterator[None]:
    """Print what is downloaded and its size, and show a bar while the block runs."""
    size, wanted = spec.bytes_to_fetch(), spec.source.wanted
    if not size:
        yield
        return
    screen.print(
        f"Fetching {wanted.repo} from the hub for {spec.name}: {decimal(size)}", highlight=False, soft_wrap=True
    )
    with download_bar(screen, wanted, size):
        yield
