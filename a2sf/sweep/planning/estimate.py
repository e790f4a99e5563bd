"""How many tokens a sweep's groups will compute, and how long that takes at the speed measured here.

Lengths of requests come from finished cells of the same task and shots, else from the documents themselves where they lie on
this machine (by characters), with what a chat template adds. A sample of documents of such lengths is packed as the real
ones will be.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from a2sf.errors import UserError
from a2sf.hf.loading import ModelSpec, tokenizer_here
from a2sf.hf.settings import retention_of
from a2sf.policies.schedule import schedule_for
from a2sf.scoring.passes.packing import Item, pack
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.scoring.scorer import PACK_TOKENS
from a2sf.store.runs import CorruptCell, StoredCell, is_cell, read_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning.rate import seconds_per_token
from a2sf.tasks.prompting import Prompting

SAMPLE = 12
"""Documents that stand for a task's."""
MANY = 500
"""Documents whose characters stand for a task's."""
CHARACTERS_PER_TOKEN = 4.7

Lengths = list[tuple[int, int]]
"""Tokens of context and continuation of each request of a document."""


@dataclass(frozen=True)
class Estimate:
    """Of one group: tokens to compute and seconds, each None where nothing like it is known.

    Attributes:
        by_trial: the seconds are from a trial of this machine's speed (`rate`), not from finished cells.
    """

    tokens: float | None = None
    seconds: float | None = None
    by_trial: bool = False


@dataclass
class _Speed:
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class Measured:
    """What finished cells tell.

    Attributes:
        speeds: by model and dtype, and by these, task and shots.
        per_document: the same of seconds per document, of cells that generate.
        lengths: by task, shots and how the model was asked, and by these and the model: each document's.
        sizes: by task and its data: how many documents there are, where a cell was to have more.
    """

    speeds: dict[Any, _Speed] = field(default_factory=dict)
    per_document: dict[Any, _Speed] = field(default_factory=dict)
    lengths: dict[Any, list[Lengths]] = field(default_factory=dict)
    sizes: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def under(cls, runs: Path, wanted: set[tuple[str, int]]) -> Measured:
        """Of all sweeps in `runs`; `wanted`: tasks and shots whose lengths are of interest."""
        measured = cls()
        for path in runs.glob("*/*__*"):
            if is_cell(path):
                with suppress(CorruptCell, UserError, KeyError):
                    measured._add(read_cell(path), wanted)
        return measured

    def _add(self, stored: StoredCell, wanted: set[tuple[str, int]]) -> None:
        cell, timing = stored.cell, stored.result["timing"]
        model, task = (cell["model"], cell["dtype"]), (cell["task"], cell["shots"])
        asked = (*task, _as_text(cell.get("identity", {}).get("prompting")))
        generates = "generation" in cell.get("identity", {})
        n, limit = stored.result["documents"]["n"], cell["limit"]
        if timing["computed_tokens"]:
            amount = n if generates else timing["computed_tokens"]
            speeds = self.per_document if generates else self.speeds
            if not (generates and timing["reused_requests"]):
                for key in (model, (model, task)):
                    speeds.setdefault(key, _Speed()).add(amount, timing["seconds"])
        if task in wanted and not generates:
            for lengths_of in (asked, (asked, cell["model"])):
                if len(self.lengths.get(lengths_of, ())) < n:
                    self.lengths[lengths_of] = _lengths(stored)
        if not cell.get("until") and (limit is None or n < limit):
            self.sizes[_documents(cell["identity"])] = n


def estimate(groups: Sequence[Sequence[Cell]], runs: Path, *, trial: bool = False) -> list[Estimate]:
    """What each group will take; nothing is downloaded, and no model is loaded.

    Args:
        runs: where finished sweeps lie.
        trial: try this machine's speed for models that no finished cell is of, for a second each.
    """
    measured = Measured.under(runs, {(g[0].task_name, g[0].shots) for g in groups})
    known: dict[Any, float | None] = {}
    made = []
    for cells in groups:
        cell = cells[0]
        model, task = (cell.model_name, cell.identity["dtype"]), (cell.task_name, cell.shots)
        size = measured.sizes.get(_documents(cell.identity))
        if cell.spec.generates:
            speed = measured.per_document.get((model, task))
            documents = _asked(cell, size)
            found = speed and documents and speed.seconds / speed.tokens * documents * len(cells)
            made.append(Estimate(seconds=found or None))
            continue
        lengths, own = _known_lengths(cell, measured)
        ways = tuple((repr(c.policy), c.budget, c.schedule) for c in cells)
        asked = _as_text(cell.prompting.settings)
        key = (task, asked, cell.data, cell.limit, cell.model_name if own or asked else None, ways)
        if key not in known:
            known[key] = _tokens(cells, lengths, size)
        tokens = known[key]
        speed = measured.speeds.get((model, task)) or measured.speeds.get(model)
        tried = speed is None and tokens is not None and trial
        each = seconds_per_token(cell.model) if tried else speed and speed.seconds / speed.tokens
        made.append(Estimate(tokens, tokens * each, tried) if tokens and each else Estimate(tokens))
    return made


def _known_lengths(cell: Cell, measured: Measured) -> tuple[list[Lengths] | None, bool]:
    """Lengths of finished cells, asked alike or plainly with the template added; and whether they are this model's own."""
    asked = _as_text(cell.prompting.settings)
    alike, plain = ((cell.task_name, cell.shots, way) for way in (asked, ""))
    order = [(alike, True), (plain, True), (plain, False), (alike, False)]  # another model's template is another
    if not asked or _around(cell) == (0, 0):
        order = [(alike, True), (alike, False), (plain, True), (plain, False)]
    for way, own in order:
        if lengths := measured.lengths.get((way, cell.model_name) if own else way):
            return lengths if way == alike else _framed(cell, lengths), own
    return None, False


def _framed(cell: Cell, lengths: Sequence[Lengths]) -> list[Lengths]:
    """The same with a template and a system instruction around each request."""
    around = sum(_around(cell))
    return [[(c + around, n) for c, n in document] for document in lengths]


def _around(cell: Cell) -> tuple[int, int]:
    """About how many tokens a template and a system instruction add; none where there is no tokenizer here."""
    return _added(cell.model, cell.prompting, cell.shots) if cell.prompting.settings else (0, 0)


@cache
def _added(model: ModelSpec, prompting: Prompting, shots: int) -> tuple[int, int]:
    with suppress(Exception):  # told when it is computed
        if (tokenizer := tokenizer_here(model)) is not None:
            return prompting.tokens_around(tokenizer, shots)
    return 0, 0


def _tokens(cells: Sequence[Cell], lengths: list[Lengths] | None, size: int | None = None) -> float | None:
    """Tokens that a group will compute.

    Args:
        lengths: of the task's documents, or some of them.
        size: how many documents there are, where that is known.
    """
    cell = cells[0]
    documents = _asked(cell, size)
    more = 1.0  # what the average document is longer than that of `lengths`
    if lengths is None or documents is None:
        if cell.data.root is None:
            return None
        with suppress(Exception):  # told when it is computed, of this group alone
            task = cell.spec.build(cell.seed)
            documents = min(documents or len(task.eval_docs), len(task.eval_docs))
            if not lengths:
                lengths, more = _by_characters(task, documents)
                lengths = _framed(cell, lengths)
    if not lengths or documents is None:
        return None
    ordered = sorted(lengths, key=_read)
    step = max(1.0, len(ordered) / SAMPLE)
    sample = [ordered[int((i + 0.5) * step)] for i in range(min(SAMPLE, len(ordered)))]
    items = [item for c in cells for item in _items(c, sample)]
    packed = pack(items, max_tokens=PACK_TOKENS["cpu" if cell.identity["device"] == "cpu" else "cuda"])
    per_token = sum(len(row.tokens) for row in packed) / sum(map(_read, sample))
    return per_token * sum(map(_read, lengths)) / len(lengths) * more * documents


def _asked(cell: Cell, size: int | None) -> int | None:
    """How many documents a cell has of a task with `size`; None where that is not known."""
    return cell.limit if size is None else min(size, cell.limit or size)


def _documents(identity: dict[str, Any]) -> str:
    """What a task's documents are known by."""
    return _as_text([identity["task"], identity["data"]])


def _as_text(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True) if settings else ""


def _read(document: Lengths) -> int:
    """Tokens of a document's longest context and all its continuations."""
    return max(c for c, _ in document) + sum(n for _, n in document)


def _items(cell: Cell, sample: Sequence[Lengths]) -> Iterator[Item]:
    """A cell's requests of a sample of documents, in tokens that stand for any, a template's head alike in all."""
    fresh, schedule = itertools.count(), schedule_for(cell.policy, cell.schedule)
    head = tuple(-i for i in range(1, 1 + _around(cell)[0]))
    for document in sample:
        context = (*head, *itertools.islice(fresh, max(c for c, _ in document)))
        for c, n in document:
            read = context[:c] + tuple(itertools.islice(fresh, n - 1))
            with suppress(UserError):  # told when it is computed
                kept = retention_of(cell.policy, cell.budget, len(read), c, 1, schedule)
                yield ScoredSequence(read, (0,) * n, kept, schedule).simplest.item()


def _lengths(stored: StoredCell) -> list[Lengths]:
    columns = [stored.documents["context_tokens"], stored.documents["continuation_tokens"]]
    pairs = ([(int(c), int(n)) for c, n in zip(*row, strict=True) if c and n] for row in zip(*columns, strict=True))
    return [p for p in pairs if p]


def _by_characters(task: Any, documents: int) -> tuple[list[Lengths], float]:
    """Lengths of some of a task's first `documents`, from their texts, and how much longer the average one is."""
    chosen = _spread(documents, 2 * SAMPLE)
    task.build_all_requests(samples=chosen)
    found: dict[int, Lengths] = {}
    for instance in task.instances:
        if len(instance.args) == 2 and isinstance(instance.args[1], str):
            c, n = (max(1, round(len(text) / CHARACTERS_PER_TOKEN)) for text in instance.args)
            found.setdefault(instance.doc_id, []).append((c, n))
    average, of_chosen = (
        fmean(len(str(task.eval_docs[i])) for i in which) for which in (_spread(documents, MANY), chosen)
    )
    return list(found.values()), average / of_chosen


def _spread(documents: int, most: int) -> list[int]:
    """About `most` of so many documents, at equal distances."""
    return list(range(0, documents, max(1, documents // most)))
