"""The documents of a sweep's cells: checked, settled once for all cells and workers, and fetched before the first cell.

Documents that cannot be had are told once, for all their cells, and do not stop the cells of other tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from a2sf.errors import ConfigError, UserError
from a2sf.hf.files.refusals import HubError
from a2sf.sweep.cell import Cell, measured
from a2sf.sweep.prepare.bar import download_bar
from a2sf.tasks import spec as tasks
from a2sf.tasks.data.documents import downloaded_bytes


@dataclass
class Settlement:
    """Cells whose documents are settled.

    Attributes:
        cells: in the groups they came in, without those whose documents cannot be had.
        notes: what the user should know, one sentence each.
        refused: why documents cannot be had -> the names of their cells.
    """

    cells: list[tuple[Cell, ...]]
    notes: list[str]
    refused: dict[str, list[str]]


def check(cells: Iterable[Cell]) -> None:
    """Refuse what a look at the definitions tells, before anything is asked of the hub.

    Raises:
        ConfigError: for the first task that cannot be run as asked, or two that tables could not tell apart.
    """
    asked = sorted({(c.task, c.data, c.shots) for c in cells}, key=str)
    called: dict[str, str] = {}
    for task, data, shots in asked:
        tasks.check(task, data, shots)
        other = called.setdefault(tasks.name_of(task), task)
        if tasks.definition_of(other) != tasks.definition_of(task):
            raise ConfigError(
                "tasks", task, f"it is called {tasks.name_of(task)}, as {other} is; give it another `task:` in its file"
            )


def settle(groups: Sequence[Sequence[Cell]], planned_only: bool = False) -> Settlement:
    """Settle what identifies each task's documents, once for all cells.

    Args:
        planned_only: nothing will be run, so documents that cannot be reached are no more than a note.

    Raises:
        UserError: if no cell's documents can be had.
    """
    settled, notes = tasks.Settled(), []
    known: dict[tuple[Any, ...], tasks.DataSpec | UserError] = {}

    def key_of(cell: Cell) -> tuple[Any, ...]:
        return cell.task, cell.data, cell.shots, cell.model if tasks.makes_documents(cell.task) else None

    for cell in (c for group in groups for c in group):
        if (key := key_of(cell)) not in known:
            try:
                known[key] = settled.data(cell.task, measured(cell), cell.shots)
            except UserError as error:
                if _is_mistake(error):
                    raise
                known[key] = error
    refused: dict[str, list[str]] = {}
    cells = []
    for group in groups:
        kept = []
        for cell in group:
            found = known[key_of(cell)]
            if isinstance(found, tasks.DataSpec):
                kept.append(dataclasses.replace(cell, data=found))
            elif planned_only:
                kept.append(cell)
                notes.append(f"The names of cells of {cell.task_name} are provisional: {found}")
            else:
                refused.setdefault(str(found), []).append(_name(cell))
        cells.append(tuple(kept))
    _some_left(cells, refused)
    return Settlement(cells, [*settled.notes, *dict.fromkeys(notes)], refused)


def _name(cell: Cell) -> str:
    """A cell's name, or what is known of it where its documents cannot be read."""
    with suppress(UserError):
        return cell.name
    return f"{cell.model_name}__{cell.policy.name}__{cell.task_name}"


def fetch(cells: Sequence[Cell], pending: Sequence[Cell], refused: dict[str, list[str]], screen: Console) -> list[Cell]:
    """Download and read the documents of all pending cells; gives `cells` without those whose documents fail.

    Args:
        refused: where failures are added, as in `Settlement`.

    Raises:
        ConfigError: if a task cannot be run as asked, which only its documents tell.
        UserError: if no cell is left.
    """
    wanted = sorted({(c.task, c.data, c.shots, c.seed) for c in pending}, key=str)
    broken: dict[tuple[str, tasks.DataSpec, int], str] = {}
    for task, data, shots, seed in wanted:
        if (task, data, shots) in broken:
            continue
        try:
            repo, size = tasks.Settled().fetch_size(task, data, shots)
            with _download(repo, size, tasks.name_of(task), screen):
                tasks.build(task, data, shots=shots, seed=seed)
        except UserError as error:
            if _is_mistake(error):
                raise
            broken[task, data, shots] = str(error)
    unmade = {c.name for c in pending}
    kept = []
    for cell in cells:
        why = broken.get((cell.task, cell.data, cell.shots))
        if why is not None and cell.name in unmade:
            refused.setdefault(why, []).append(cell.name)
        else:
            kept.append(cell)
    _some_left([tuple(kept)], refused)
    return kept


def _is_mistake(error: UserError) -> bool:
    """Whether it is the configuration that is wrong, not what the documents or the way to them did."""
    return isinstance(error, ConfigError) and not isinstance(error, HubError)


def _some_left(cells: Sequence[Sequence[Cell]], refused: dict[str, list[str]]) -> None:
    if refused and not any(cells):
        raise UserError(" ".join(refused))


@contextmanager
def _download(repo: str, size: int, task: str, screen: Console) -> Iterator[None]:
    """Say what is fetched and how large it is, with a bar while it takes time."""
    if not size:
        yield
        return
    screen.print(f"Fetching {repo} from the hub for {task}: {decimal(size)}", highlight=False, soft_wrap=True)
    before = downloaded_bytes(repo)
    with download_bar(screen, repo, size, lambda: downloaded_bytes(repo) - before):
        yield
