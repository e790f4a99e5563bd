"""Stopping a group of cells as soon as its comparisons are decided: documents in one random order, an interval after each.

runs/<sweep>/.checkpoints/until-<group>.json   where a group stopped, for the cells that are still to be written
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2sf.errors import UserError
from a2sf.policies.schedule import schedule_for
from a2sf.scoring.requests import request_hash
from a2sf.scoring.systems import Answers
from a2sf.store.names import EARLIER_DIGITS, ID_DIGITS
from a2sf.store.runs import writing
from a2sf.sweep.answer_store import FOLDER, write_in
from a2sf.sweep.cell import Cell
from a2sf.sweep.sequential import PairedMean
from a2sf.sweep.stopping_rule import StoppingRule
from a2sf.tasks import shared_texts
from a2sf.tasks.checks import check_stopping, of_each

DIFFER = ("policy", "policy_settings", "policy_source", "policy_version", "cut", "budget", "schedule")
"""Parts of their identity in which the cells of a group differ."""
ORDER_SEED = 2407
"""Of the order in which documents are visited: the same for all cells, so that all see the same questions first."""
BATCH_ROWS = 8
"""A batch of documents has so many rows' worth of tokens, before sharing."""
CHARACTERS_PER_TOKEN = 4


def check_can_stop_early(task: Any) -> None:
    """Refuse a task whose documents cannot be evaluated one by one.

    Raises:
        UserError: saying what it is.
    """
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise UserError(
            f"early_stopping is for tasks whose answers are scored, and {task.config.task} is {task.OUTPUT_TYPE}"
        )


class EarlyStopping:
    """When a group may stop.

    Args:
        directory: of the sweep.
        cells: those of the group that are to be computed.
        answers: of each cell, by its name.
        task: lm-eval's, which has made its requests.
        shared_text: field of the documents whose text several may share: such documents are seen together; None: none.

    Attributes:
        documents: numbers of the documents that decided every comparison, ascending; None: not decided yet.
    """

    def __init__(
        self,
        rule: StoppingRule,
        directory: Path,
        cells: Sequence[Cell],
        answers: Mapping[str, Answers],
        task: Any,
        shared_text: str | None = None,
    ) -> None:
        self.rule, self.task, self.answers = rule, task, dict(answers)
        self.pairs = [(a.name, b.name) for a, b in comparisons(rule, cells)]
        self._ids = {c.name: c.id for c in cells}
        self._compared = {c.id for c in cells if c.policy.name in rule.pair}
        self.file = directory / FOLDER / f"until-{_group(cells[0])}.json"
        self._earlier_file = directory / FOLDER / f"until-{_group(cells[0])[:EARLIER_DIGITS]}.json"
        self.documents: list[int] | None = None
        self._requests: dict[int, list[Any]] = {}
        for instance in task.instances:
            self._requests.setdefault(instance.doc_id, []).append(instance)
        texts: dict[Hashable, list[int]] = {}
        for number in sorted(self._requests):
            document = self._requests[number][0].doc
            key = number if shared_text is None else shared_texts.key_of(document, shared_text)
            texts.setdefault(key, []).append(number)
        of_text = list(texts.values())
        self._order = [of_text[i] for i in order_of(len(of_text))]
        self._next = 0
        self._comparisons: Comparisons | None = None
        self._earlier: dict[str, Any] = {}
        self._restore()

    def batches(self, tokens_per_pass: int) -> Iterator[list[int]]:
        """Numbers of documents to score next, until it is decided; those of one text are in one batch."""
        if self.documents is not None:
            return
        most = BATCH_ROWS * tokens_per_pass * CHARACTERS_PER_TOKEN / max(1, len(self.answers))
        batch: list[int] = []
        size = 0
        for text in self._order:
            batch += text
            size += sum(len(str(a)) for d in text for i in self._requests[d] for a in i.args)
            if size >= most:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def decide(self) -> bool:
        """Add the documents that have all answers by now; return whether every comparison is decided.

        Raises:
            ConfigError: if the task has no such metric of a document.
            DiskError: if that cannot be written down.
        """
        if self.documents is not None:
            return True
        current = self._current()
        compared = {name for pair in current.pairs for name in pair}
        while self._next < len(self._order) and compared:
            found = {name: [self._score(name, d) for d in self._order[self._next]] for name in compared}
            if any(None in scores for scores in found.values()):
                break
            self._next += 1
            current.see({name: [s for s in scores if s is not None] for name, scores in found.items()})
            if current.decided:
                self.documents = sorted(d for text in self._order[: self._next] for d in text)
                self._write()
                return True
        return False

    def report(self) -> dict[str, Any]:
        """The entry `until` of a result: how many documents were scored, of how many, and the state of each comparison."""
        if self._comparisons is None:
            return self._earlier
        seen = len(self._requests) if self.documents is None else len(self.documents)
        return {"seen": seen, "of": len(self._requests), "comparisons": self._comparisons.report()}

    def _current(self) -> Comparisons:
        """The comparisons of cells that can be computed; they start again when a cell fails."""
        pairs = [p for p in self.pairs if all(self.answers[n].error is None for n in p)]
        if self._comparisons is None or list(self._comparisons.pairs) != pairs:
            self._comparisons, self._next = Comparisons(self.rule, [len(text) for text in self._order], pairs), 0
        return self._comparisons

    def _score(self, name: str, document: int) -> float | None:
        """A document's metric for one cell; None: not all its requests are answered.

        Raises:
            ConfigError: if the task has no such metric of a document.
        """
        instances = sorted(self._requests[document], key=lambda i: i.idx)
        answers = [self.answers[name].answer(request_hash(i.args)) for i in instances]
        if any(a is None for a in answers):
            return None
        metrics = self.task.process_results(instances[0].doc, [a[:2] for a in answers if a is not None])
        found = of_each(metrics)
        check_stopping(self.task.config.task, self.rule.metric, found)
        return found[self.rule.metric]

    def _write(self) -> None:
        pairs = [[self._ids[n] for n in p] for p in self._current().pairs]
        body = {"documents": self.documents, "pairs": pairs, "report": self.report()}
        with writing(self.file):
            write_in(self.file, json.dumps(body))

    def _restore(self) -> None:
        """Stop after the same documents as an earlier run, if it compared all cells that are compared now."""
        with suppress(OSError, ValueError, KeyError):
            short = not self.file.exists()
            body = json.loads((self._earlier_file if short else self.file).read_text(encoding="utf-8"))
            decided = {tuple(p) for p in body["pairs"]}
            known = {cell for pair in decided for cell in pair}
            digits = EARLIER_DIGITS if short else ID_DIGITS
            compared = {i[:digits] for i in self._compared}
            if compared <= known and all(tuple(self._ids[n][:digits] for n in p) in decided for p in self.pairs):
                documents = body["documents"] if "documents" in body else body["told"]  # its earlier name
                self.documents, self._earlier = list(documents), body["report"]


def comparisons(rule: StoppingRule, cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """The pairs of a group's cells that are compared: equal budget and schedule, or one that ignores budgets and any."""
    first, second = ([c for c in cells if c.policy.name == name] for name in rule.pair)
    return [
        (a, b)
        for a, b in itertools.product(first, second)
        if None in (a.budget, b.budget)
        or (a.budget == b.budget and schedule_for(a.policy, a.schedule) == schedule_for(b.policy, b.schedule))
    ]


@dataclass
class Comparisons:
    """The comparisons of one group, and what is known of them.

    Attributes:
        rule: when a comparison is decided.
        documents: of each text, how many documents share it, seen or not; texts are drawn at random, not documents.
        pairs: names of the cells that are compared.
    """

    rule: StoppingRule
    documents: Sequence[int]
    pairs: Sequence[tuple[str, str]]
    means: list[PairedMean] = field(init=False)

    def __post_init__(self) -> None:
        alpha = (1 - self.rule.confidence) / max(1, len(self.pairs))
        steps = max(self.documents, default=1)
        self.means = [PairedMean(len(self.documents), alpha, steps) for _ in self.pairs]

    def see(self, scores: Mapping[str, Sequence[float]]) -> None:
        """Add the documents of one text: for each cell, the metric of each document."""
        largest = max(self.documents)
        for (a, b), mean in zip(self.pairs, self.means, strict=True):
            mean.see([sum(x - y for x, y in zip(scores[a], scores[b], strict=True)) / largest])

    def interval(self, mean: PairedMean) -> tuple[float, float]:
        """The interval of the difference on all documents.

        A text counts with the sum over its documents, divided by the number of documents of the largest text.
        """
        scale = max(self.documents) * len(self.documents) / sum(self.documents)
        low, high = mean.interval
        return scale * low, scale * high

    @property
    def decided(self) -> bool:
        """Whether every comparison is; a group without one never is."""
        return bool(self.means) and all(map(self._decided, self.means))

    def _decided(self, mean: PairedMean) -> bool:
        rule, (low, high) = self.rule, self.interval(mean)
        if rule.half_width is not None and 100 * (high - low) / 2 <= rule.half_width:
            return True
        return rule.significant and not low <= 0 <= high

    def report(self) -> list[dict[str, Any]]:
        """Of each comparison: the cells, the interval (in the metric's unit) of the difference on all documents, and `e`.

        `e` is the e-value of "no difference" (`PairedMean.e_value`).
        """
        return [
            {"cells": list(pair)} | dict(zip(("low", "high"), self.interval(mean), strict=True)) | {"e": mean.e_value}
            for pair, mean in zip(self.pairs, self.means, strict=True)
        ]


def order_of(texts: int) -> list[int]:
    """The order in which `texts` texts, each with its documents, are visited."""
    order = list(range(texts))
    random.Random(ORDER_SEED).shuffle(order)
    return order


def _group(cell: Cell) -> str:
    same = {k: v for k, v in cell.identity.items() if k not in DIFFER}
    text = json.dumps([same, cell.tail.partition("__")[0]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]
