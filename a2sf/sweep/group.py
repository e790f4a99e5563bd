"""Cells that are computed together: the same model, documents and examples, whatever the policy, budget and schedule.

Documents, prompts and tokens are made once, and the requests of all cells go through the model together. A cell alone is a
group of one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.scoring.systems import Answer, Member
from a2sf.store.runs import DiskError, StoredCell
from a2sf.sweep import checkpoint, stopping
from a2sf.sweep.cell import Cell, compute, drawn
from a2sf.sweep.reuse import find_extendable
from a2sf.sweep.stopping import Stop, Told
from a2sf.tasks import shared_texts
from a2sf.tasks import spec as tasks
from a2sf.tasks.warned import Warned, collected

OWN = ("policy", "budget", "schedule")
"""What the cells of a group differ in."""


def key_of(cell: Cell) -> Hashable:
    """Equal for cells that are computed together."""
    return tuple(getattr(cell, f.name) for f in dataclasses.fields(cell) if f.name not in OWN)


def grouped(cells: Iterable[Cell], more: Callable[[Cell], Hashable] = lambda cell: None) -> list[list[Cell]]:
    """Cells by group, in the order of each group's first cell.

    Args:
        more: what else the cells of a group must have in common.
    """
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((key_of(cell), more(cell)), []).append(cell)
    return list(groups.values())


@dataclass(frozen=True)
class Computed:
    """What became of a cell: a result, its documents and what ran (`a2sf.engine.kernels.noting`), or an error."""

    cell: Cell
    result: dict[str, Any] | None = None
    documents: pd.DataFrame | None = None
    error: Exception | None = None
    ran: frozenset[str] = frozenset()


def compute_group(
    cells: Sequence[Cell],
    lm: Any,
    directory: Path,
    checkpoint_seconds: float = 60.0,
    attempt: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    watch: Callable[[dict[str, Member]], None] = lambda members: None,
) -> Iterator[Computed]:
    """Score the documents of some cells with `lm`, a `PrunedLM`; what was scored before is not computed again.

    Args:
        cells: equal in `key_of`.
        directory: of the sweep, where unfinished cells keep their answers.
        checkpoint_seconds: after so much time the answers so far are written there.
        attempt: calls what evaluates one cell, and may do so again.
        watch: called after each pass with each cell's member, by its name, which holds its answers so far.
    """
    warned = Warned()  # of what is done for all cells
    try:
        first = cells[0]
        with collected(warned):
            task = tasks.build(first.task, first.data, shots=first.shots, seed=first.seed)
        where = tasks.provenance(task)
        if first.until is not None:
            stopping.check(task)
        first.prompting.set_up(lm, task)
        at_random = drawn(task)
    except Exception as error:
        yield from (Computed(c, error=error) for c in cells)
        return
    stored = {} if at_random else find_extendable(directory.parent, cells)
    members: dict[str, Member] = {}
    for cell in cells:
        try:
            member = lm.as_member(cell.policy, cell.budget, cell.schedule)
        except Exception as error:
            yield Computed(cell, error=error)
            continue
        member.known = _known(stored.get(cell.name), where)
        if not at_random:
            checkpoint.restore(directory, cell, where["fingerprint"], member)
        members[cell.name] = member
    of = {c.name: c for c in cells if c.name in members}

    def save(names: Iterable[str]) -> None:
        for name in names:
            if members[name].answers and members[name].error is None:
                try:
                    checkpoint.write(directory, of[name], where["fingerprint"], members[name])
                except OSError as error:
                    raise DiskError(f"{directory} cannot be written ({error.strerror or error})") from error

    saved = time.monotonic()
    field = shared_texts.field_of(task, first.data.cluster)
    text_of = None if field is None else partial(shared_texts.key_of, field=field)
    stop = None if first.until is None else Stop(first.until, directory, list(of.values()), members, task, text_of)
    aside = partial(collected, warned)
    _once(task, lambda: None if stop is None else stop.look(), aside)

    def after_pass() -> None:
        nonlocal saved
        watch(members)
        if stop is not None:
            stop.look()
        if time.monotonic() - saved >= checkpoint_seconds:
            save(members)
            saved = time.monotonic()

    try:
        with lm.together(list(members.values()), after_pass, None if stop is None else stop.due, aside):
            for name in list(members):
                lm.take(members[name])
                try:
                    result, documents = attempt(partial(_until_told, of[name], lm, task, stop))
                except DiskError:
                    raise
                except Exception as error:
                    save([name])  # it may be something that comes after the answers
                    yield Computed(of[name], error=error)
                else:
                    result = with_notes(result, lm.warned, warned)
                    yield Computed(of[name], result, documents, ran=frozenset(members[name].ran))
                    checkpoint.remove(directory, of[name])
                del members[name]
    except BaseException:  # interrupted: what was computed since the last checkpoint is kept
        with suppress(DiskError):
            save(members)
        raise


def _until_told(cell: Cell, lm: Any, task: Any, stop: Stop | None) -> tuple[dict[str, Any], pd.DataFrame]:
    """`compute`, of no more documents than it takes to tell what the group is to tell."""
    if stop is None:
        return compute(cell, lm, task)
    try:
        result, documents = compute(cell, lm, task, stop.told)
    except Told:
        result, documents = compute(cell, lm, task, stop.told)  # by now the documents that told it
    return result | {"until": stop.report()}, documents


def with_notes(result: dict[str, Any], *warned: Warned | None) -> dict[str, Any]:
    """A result with what was warned of for several cells after its own notes; without `notes` where there are none."""
    notes = [*result.pop("notes"), *(note for w in warned if w is not None for note in w.notes)]
    return result | ({"notes": notes} if notes else {})


def _once(task: Any, ready: Callable[[], None], aside: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let `task` make its requests once, and give them anew, without answers, to every evaluation.

    Args:
        ready: called when it has them.
        aside: entered around the making, which is for all.
    """
    make = task.build_all_requests
    made: list[Any] = []

    def build_all_requests(samples: list[int] | None = None, **settings: Any) -> None:
        if not made:
            with aside():
                make(**settings)
            made.extend(task.instances)
        for instance in made:
            instance.resps, instance.filtered_resps = [], {}
        task._instances = list(made)
        ready()
        if samples is not None:  # which lm-eval counts from nought
            place = {document: i for i, document in enumerate(samples)}
            chosen = [i for i in made if i.doc_id in place]
            renumbered = [(i.metadata[0], place[i.doc_id], *i.metadata[2:]) for i in chosen]
            task._instances = [dataclasses.replace(i, metadata=m) for i, m in zip(chosen, renumbered, strict=True)]
            for instance, original in zip(task._instances, chosen, strict=True):
                instance.document = original.doc_id

    task.build_all_requests = build_all_requests


def _known(stored: StoredCell | None, where: dict[str, Any]) -> dict[str, Answer]:
    """By request hash, the answers of documents that were scored before."""
    if stored is None or stored.result["documents"]["fingerprint"] != where["fingerprint"]:
        return {}
    known: dict[str, Answer] = {}
    if "target" in stored.documents and "generated" not in stored.documents:
        return {}  # its texts were not stored
    if "generated" in stored.documents:
        columns = ["request_hashes", "generated", "context_tokens", "continuation_tokens", "ended"]
        for hashes, text, context, more, end in stored.documents.reindex(columns=columns).itertuples(index=False):
            ended = None if pd.isna(end) else bool(end)  # older results do not say
            known[hashes[0]] = Answer(text, False, int(context[0]), int(more[0]), ended)
        return known
    columns = ["request_hashes", "loglikelihoods", "is_greedy", "context_tokens", "continuation_tokens"]
    for prefix in ("", "more/"):
        if f"{prefix}{columns[0]}" in stored.documents:
            for row in stored.documents[[f"{prefix}{c}" for c in columns]].itertuples(index=False):
                known.update({h: Answer(float(x), bool(g), int(c), int(n)) for h, x, g, c, n in zip(*row, strict=True)})
    return known
