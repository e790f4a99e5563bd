"""How many tokens the groups of a sweep will compute, and how long that takes on this machine.

The lengths of requests are those of finished cells with the same task and shots. Without such cells they are estimated from
the characters of the documents, if these are on this machine. A sample of documents is packed as they will be in the run.
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

from lm_eval.models.utils import normalize_gen_kwargs

from a2sf.errors import UserError
from a2sf.hf.loading import ModelSpec, tokenizer_here
from a2sf.hf.memory import PACK_TOKENS
from a2sf.hf.settings import retention_of
from a2sf.policies.schedule import schedule_for
from a2sf.scoring.passes.packing import Item, pack
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.scoring.texts import MOST_ROWS
from a2sf.store.runs import CorruptCell, StoredCell, is_cell, read_cell
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning.rate import seconds_per_row, seconds_per_token
from a2sf.tasks.prompting import Prompting
from a2sf.tasks.turns import most_turns

DEFAULT_NEW = 256
"""Tokens that a task may generate if it does not say how many, as lm-eval has it."""
SAMPLE = 12
"""Documents in the sample of a task."""
MANY = 500
"""Documents whose characters are counted to estimate the average length."""
CHARACTERS_PER_TOKEN = 4.7

Lengths = list[tuple[int, int]]
"""Tokens of context and continuation of each request of a document."""


@dataclass(frozen=True)
class WorkEstimate:
    """The estimate for one group.

    Attributes:
        tokens: to compute; None: not known.
        seconds: None: not known.
        by_trial: the seconds are from a trial of this machine's speed (`rate`), not from finished cells.
        at_most: tokens and seconds are those of texts that all end at their limit of tokens.
    """

    tokens: float | None = None
    seconds: float | None = None
    by_trial: bool = False
    at_most: bool = False


@dataclass
class _Speed:
    """Time measured for an amount of work: tokens, or documents whose texts were generated."""

    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.amount += amount
        self.seconds += seconds

    @property
    def seconds_each(self) -> float:
        return self.seconds / self.amount


@dataclass
class Measurements:
    """Measurements of finished cells.

    Attributes:
        speeds: tokens and seconds by (model, dtype), and by ((model, dtype), (task, shots)).
        per_document: the same with documents instead of tokens, for cells that generate text.
        lengths: of each document, by (task, shots, prompting), and by these and the model.
        sizes: number of documents by task and data, from cells whose limit was larger or that had none.
        stored: the cells of the tasks whose lengths are needed.
    """

    speeds: dict[Any, _Speed] = field(default_factory=dict)
    per_document: dict[Any, _Speed] = field(default_factory=dict)
    lengths: dict[Any, list[Lengths]] = field(default_factory=dict)
    sizes: dict[Any, int] = field(default_factory=dict)
    stored: list[StoredCell] = field(default_factory=list)

    @classmethod
    def under(cls, runs: Path, wanted: set[tuple[str, int]]) -> Measurements:
        """Read all sweeps in the folder `runs`; `wanted`: the (task, shots) whose lengths are needed."""
        measurements = cls()
        for path in runs.glob("*/*__*"):
            if is_cell(path):
                with suppress(CorruptCell, UserError, KeyError):
                    measurements._add(read_cell(path), wanted)
        return measurements

    def _add(self, stored: StoredCell, wanted: set[tuple[str, int]]) -> None:
        cell, timing = stored.cell, stored.result["timing"]
        model, task = (cell["model"], cell["dtype"]), (cell["task"], cell["shots"])
        if cell["task"] in {name for name, _ in wanted}:
            self.stored.append(stored)
        requests = (*task, _as_text(cell.get("identity", {}).get("prompting")))
        generates = "generation" in cell.get("identity", {})
        n, limit = stored.result["documents"]["n"], cell["limit"]
        if timing["computed_tokens"]:
            answers = (cell["identity"].get("prompting") or {}).get("samples") or 1 if generates else 1
            amount = n * answers if generates else timing["computed_tokens"]
            speeds = self.per_document if generates else self.speeds
            if not (generates and timing["reused_requests"]):
                for key in (model, (model, task)):
                    speeds.setdefault(key, _Speed()).add(amount, timing["seconds"])
        if task in wanted and not generates:
            for lengths_of in (requests, (requests, cell["model"])):
                if len(self.lengths.get(lengths_of, ())) < n:
                    self.lengths[lengths_of] = _lengths(stored)
        if not cell.get("until") and (limit is None or n < limit):
            self.sizes[_documents_key(cell["identity"])] = n

    def documents_of(self, cell: Cell) -> int | None:
        """How many documents a cell will score; None: its documents are not on this machine."""
        key = _documents_key(cell.identity)
        if key not in self.sizes and cell.data.root is not None:
            with suppress(Exception):  # a task's code may raise anything; reported when the group is computed
                self.sizes[key] = len(cell.spec.build(cell.seed).eval_docs)
        return _scored_documents(cell, self.sizes.get(key))


def estimate(
    groups: Sequence[Sequence[Cell]], runs: Path, *, trial: bool = False, measurements: Measurements | None = None
) -> list[WorkEstimate]:
    """Tokens and time of each group; nothing is downloaded, and no model is loaded.

    Args:
        runs: the folder of finished sweeps.
        trial: measure this machine's speed for models without a finished cell, in a second each.
        measurements: what was read from `runs` for these groups already; None: it is read.
    """
    measurements = measurements or measurements_for(groups, runs)
    known: dict[Any, float | None] = {}
    made = []
    for cells in groups:
        cell = cells[0]
        if cell.spec.generates:
            made.append(_of_texts(cells, measurements, trial))
            continue
        model, task = (cell.model_name, cell.identity["dtype"]), (cell.task_name, cell.shots)
        size = measurements.sizes.get(_documents_key(cell.identity))
        lengths, of_this_model = _known_lengths(cell, measurements)
        systems = tuple((repr(c.policy), c.budget, c.schedule) for c in cells)
        prompting = _as_text(cell.prompting.settings)
        of_model = cell.model_name if of_this_model or prompting else None
        key = (task, prompting, cell.data, cell.limit, of_model, systems)
        if key not in known:
            known[key] = _tokens_to_compute(cells, lengths, size, measurements.sizes)
        tokens = known[key]
        speed = measurements.speeds.get((model, task)) or measurements.speeds.get(model)
        tried = speed is None and tokens is not None and trial
        each = seconds_per_token(cell.model) if tried else speed and speed.seconds_each
        made.append(WorkEstimate(tokens, tokens * each, tried) if tokens and each else WorkEstimate(tokens))
    return made


def _of_texts(cells: Sequence[Cell], measurements: Measurements, trial: bool) -> WorkEstimate:
    """Of a group that generates text: from the time of earlier texts, else from a trial of this machine's speed."""
    cell = cells[0]
    size = measurements.sizes.get(_documents_key(cell.identity))
    texts = (_scored_documents(cell, size) or 0) * (cell.prompting.samples or 1)
    speed = measurements.per_document.get(((cell.model_name, cell.identity["dtype"]), (cell.task_name, cell.shots)))
    if speed is None and texts and trial:
        return _at_most(cells, texts)
    seconds = speed.seconds_each * texts * len(cells) if speed else 0.0
    return WorkEstimate(seconds=seconds or None)


def _at_most(cells: Sequence[Cell], texts: int) -> WorkEstimate:
    """Of a group that generates and has no finished cell: each text at its limit of tokens, prompts left out."""
    new = _most_new(cells[0])
    rows = MOST_ROWS["cpu" if cells[0].identity["device"] == "cpu" else "cuda"]
    each = seconds_per_row(cells[0].model, min(rows, texts))
    tokens = new * texts * len(cells)
    return WorkEstimate(tokens, tokens * each, by_trial=True, at_most=True) if each else WorkEstimate()


def _most_new(cell: Cell) -> int:
    """How many tokens a text may have, of a conversation all answers together."""
    given = dict(cell.spec.definition.config.get("generation_kwargs") or {})
    given |= json.loads(cell.prompting.gen_kwargs or "{}")
    return int(normalize_gen_kwargs(given, DEFAULT_NEW)["max_gen_toks"]) * (most_turns(given) or 1)


def measurements_for(groups: Sequence[Sequence[Cell]], runs: Path) -> Measurements:
    """Measurements in the folder of finished sweeps that concern some groups."""
    return Measurements.under(runs, {(g[0].task_name, g[0].shots) for g in groups})


def _known_lengths(cell: Cell, measurements: Measurements) -> tuple[list[Lengths] | None, bool]:
    """Lengths of finished cells, and whether they are of the same model.

    Cells with the same prompting are preferred. Else the tokens of the chat template are added to cells without one.
    """
    prompting = _as_text(cell.prompting.settings)
    same, plain = ((cell.task_name, cell.shots, p) for p in (prompting, ""))
    order = [(same, True), (plain, True), (plain, False), (same, False)]  # another model has another template
    if not prompting or _template_tokens(cell) == (0, 0):
        order = [(same, True), (same, False), (plain, True), (plain, False)]
    for requests, of_this_model in order:
        if lengths := measurements.lengths.get((requests, cell.model_name) if of_this_model else requests):
            return lengths if requests == same else _with_template(cell, lengths), of_this_model
    return None, False


def _with_template(cell: Cell, lengths: Sequence[Lengths]) -> list[Lengths]:
    """The lengths with a template and a system instruction around each request."""
    added = sum(_template_tokens(cell))
    return [[(c + added, n) for c, n in document] for document in lengths]


def _template_tokens(cell: Cell) -> tuple[int, int]:
    """About how many tokens a template and a system instruction add before and after; 0 if the tokenizer is not here."""
    return _tokens_around(cell.model, cell.prompting, cell.shots) if cell.prompting.settings else (0, 0)


@cache
def _tokens_around(model: ModelSpec, prompting: Prompting, shots: int) -> tuple[int, int]:
    with suppress(Exception):  # a tokenizer may raise anything; the error is reported when the cell is computed
        if (tokenizer := tokenizer_here(model)) is not None:
            return prompting.tokens_around(tokenizer, shots)
    return 0, 0


def _tokens_to_compute(
    cells: Sequence[Cell], lengths: list[Lengths] | None, size: int | None = None, sizes: dict[Any, int] | None = None
) -> float | None:
    """Tokens that a group will compute; None: not known.

    Args:
        lengths: of the task's documents, or of some of them.
        size: number of the task's documents; None: not known.
        sizes: where their number is noted if it is found here (`Measurements.sizes`).
    """
    cell = cells[0]
    documents = _scored_documents(cell, size)
    longer = 1.0  # average length of all documents, relative to those in `lengths`
    if lengths is None or documents is None:
        if cell.data.root is None:
            return None
        with suppress(Exception):  # a task's code may raise anything; reported when the group is computed
            task = cell.spec.build(cell.seed)
            if sizes is not None:
                sizes[_documents_key(cell.identity)] = len(task.eval_docs)
            documents = min(documents or len(task.eval_docs), len(task.eval_docs))
            if not lengths:
                lengths, longer = _by_characters(task, documents)
                lengths = _with_template(cell, lengths)
    if not lengths or documents is None:
        return None
    ordered = sorted(lengths, key=_tokens_in)
    step = max(1.0, len(ordered) / SAMPLE)
    sample = [ordered[int((i + 0.5) * step)] for i in range(min(SAMPLE, len(ordered)))]
    items = [item for c in cells for item in _items(c, sample)]
    packed = pack(items, max_tokens=PACK_TOKENS["cpu" if cell.identity["device"] == "cpu" else "cuda"])
    per_token = sum(len(row.tokens) for row in packed) / sum(map(_tokens_in, sample))
    return per_token * sum(map(_tokens_in, lengths)) / len(lengths) * longer * documents


def _scored_documents(cell: Cell, size: int | None) -> int | None:
    """Number of a cell's documents, of a task with `size` documents; None: not known."""
    return cell.limit if size is None else min(size, cell.limit or size)


def _documents_key(identity: dict[str, Any]) -> str:
    """A key that identifies a task's documents."""
    return _as_text([identity["task"], identity["data"]])


def _as_text(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True) if settings else ""


def _tokens_in(document: Lengths) -> int:
    """Tokens of a document's longest context and all its continuations."""
    return max(c for c, _ in document) + sum(n for _, n in document)


def _items(cell: Cell, sample: Sequence[Lengths]) -> Iterator[Item]:
    """A cell's requests for a sample of documents, in invented tokens; those of a template's head are equal in all."""
    fresh, schedule = itertools.count(), schedule_for(cell.policy, cell.schedule)
    head = tuple(-i for i in range(1, 1 + _template_tokens(cell)[0]))
    for document in sample:
        context = (*head, *itertools.islice(fresh, max(c for c, _ in document)))
        for c, n in document:
            read = context[:c] + tuple(itertools.islice(fresh, n - 1))
            with suppress(UserError):  # reported when the cell is computed
                retention = retention_of(cell.policy, cell.budget, len(read), c, 1, schedule)
                yield ScoredSequence(read, (0,) * n, retention, schedule).simplest.item()


def _lengths(stored: StoredCell) -> list[Lengths]:
    columns = [stored.documents["context_tokens"], stored.documents["continuation_tokens"]]
    pairs = ([(int(c), int(n)) for c, n in zip(*row, strict=True) if c and n] for row in zip(*columns, strict=True))
    return [p for p in pairs if p]


def _by_characters(task: Any, documents: int) -> tuple[list[Lengths], float]:
    """Lengths of some of a task's first `documents`, from their characters; and how much longer the average document is."""
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
    """Numbers of about `most` of so many documents, evenly spaced."""
    return list(range(0, documents, max(1, documents // most)))
