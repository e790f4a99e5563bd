"""Watching a group's answers come in, and stopping it where its comparisons are told (`a2sf.sweep.until`).

runs/<sweep>/.checkpoints/until-<group>.json   where a group stopped, for the cells that are still to be written
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from a2sf.errors import ConfigError, UserError
from a2sf.scoring.systems import Member, request_hash
from a2sf.store.names import EARLIER_DIGITS, ID_DIGITS
from a2sf.store.runs import DiskError
from a2sf.sweep.cell import Cell
from a2sf.sweep.checkpoint import FOLDER, write_in
from a2sf.sweep.until import Until, Watch, order_of
from a2sf.tasks.numbers import number_of

OWN = ("policy", "policy_settings", "policy_source", "policy_version", "cut", "budget", "schedule")
"""What the cells of a group differ in, of their identity."""


def check(task: Any) -> None:
    """Refuse a task that cannot be looked at one document after the other.

    Raises:
        UserError: saying what it is.
    """
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise UserError(f"until is for tasks whose answers are scored, and {task.config.task} is {task.OUTPUT_TYPE}")


class Told(Exception):
    """Every comparison of a group is told; nothing more need be computed."""


class Stop:
    """When a group may stop.

    Args:
        directory: of the sweep.
        cells: those of the group that are to be computed.
        members: each cell's answers, by its name.
        task: whose requests are made when the first are answered.
        text_of: a document -> what it has in common with those that share its text; None: it shares none.

    Attributes:
        told: numbers of the documents that told everything, ascending; None: not told yet.
    """

    def __init__(
        self,
        until: Until,
        directory: Path,
        cells: Sequence[Cell],
        members: Mapping[str, Member],
        task: Any,
        text_of: Callable[[Any], Hashable] | None = None,
    ) -> None:
        self.until, self.task, self.members, self.text_of = until, task, dict(members), text_of
        self.pairs = [(a.name, b.name) for a, b in until.comparisons(cells)]
        self._ids = {c.name: c.id for c in cells}
        self._compared = {c.id for c in cells if c.policy.name in until.pair}
        self.file = directory / FOLDER / f"until-{_group(cells[0])}.json"
        self._earlier_file = directory / FOLDER / f"until-{_group(cells[0])[:EARLIER_DIGITS]}.json"
        self.told: list[int] | None = None
        self._requests: dict[int, list[Any]] = {}
        self._order: list[list[int]] = []
        self._place: dict[int, int] = {}
        self._next = 0
        self._watch: Watch | None = None
        self._earlier: dict[str, Any] = {}
        self._restore()

    def due(self, document: int) -> int:
        """When a document is visited."""
        return self._place[document]

    def look(self) -> None:
        """Take in the documents that are answered by now; the task has made its requests.

        Raises:
            Told: if nothing more need be computed.
        """
        if not self._order:
            for instance in self.task.instances:
                self._requests.setdefault(instance.doc_id, []).append(instance)
            texts: dict[Hashable, list[int]] = {}
            for number in sorted(self._requests):
                key = number if self.text_of is None else self.text_of(self._requests[number][0].doc)
                texts.setdefault(key, []).append(number)
            whole = list(texts.values())
            self._order = [whole[i] for i in order_of(len(whole))]
            self._place = {document: i for i, document in enumerate(d for text in self._order for d in text)}
        if self.told is not None:
            return
        watch = self._watching()
        watched = {name for pair in watch.pairs for name in pair}
        while self._next < len(self._order) and watched:
            found = {name: [self._score(name, d) for d in self._order[self._next]] for name in watched}
            if any(None in scores for scores in found.values()):
                break
            self._next += 1
            watch.see({name: [s for s in scores if s is not None] for name, scores in found.items()})
            if watch.told:
                self.told = sorted(d for text in self._order[: self._next] for d in text)
                self._keep()
                raise Told

    def report(self) -> dict[str, Any]:
        """What a result says of it: documents seen, of how many, and what was told."""
        if self._watch is None:
            return self._earlier
        seen = len(self._requests) if self.told is None else len(self.told)
        return {"seen": seen, "of": len(self._requests), "comparisons": self._watch.report()}

    def _watching(self) -> Watch:
        pairs = [p for p in self.pairs if all(self.members[n].error is None for n in p)]
        if self._watch is None or list(self._watch.pairs) != pairs:  # one cannot go on: what it was compared with does
            self._watch, self._next = Watch(self.until, [len(text) for text in self._order], pairs), 0
        return self._watch

    def _score(self, name: str, document: int) -> float | None:
        """A document's metric for one cell; None: not all its requests are answered.

        Raises:
            ConfigError: if the task has no such metric of a document.
        """
        asked = sorted(self._requests[document], key=lambda i: i.idx)
        answers = [self.members[name].answer(request_hash(i.args)) for i in asked]
        if any(a is None for a in answers):
            return None
        metrics = self.task.process_results(asked[0].doc, [a[:2] for a in answers if a is not None])
        found = {m: number for m, v in metrics.items() if (number := number_of(v)) is not None and 0 <= number <= 1}
        if self.until.metric not in found:
            raise ConfigError(
                "until.metric", self.until.metric, f"{self.task.config.task} has {', '.join(found)} of each document"
            )
        return found[self.until.metric]

    def _keep(self) -> None:
        told = self._watching().pairs
        body = {"told": self.told, "pairs": [[self._ids[n] for n in p] for p in told], "report": self.report()}
        try:
            write_in(self.file, json.dumps(body))
        except OSError as error:
            raise DiskError(f"{self.file} cannot be written ({error.strerror or error})") from error

    def _restore(self) -> None:
        """Stop where the group stopped before, unless a cell that is to be compared was not compared then."""
        with suppress(OSError, ValueError, KeyError):
            short = not self.file.exists()
            body = json.loads((self._earlier_file if short else self.file).read_text(encoding="utf-8"))
            told = {tuple(p) for p in body["pairs"]}
            known = {cell for pair in told for cell in pair}
            digits = EARLIER_DIGITS if short else ID_DIGITS
            compared = {i[:digits] for i in self._compared}
            if compared <= known and all(tuple(self._ids[n][:digits] for n in p) in told for p in self.pairs):
                self.told, self._earlier = list(body["told"]), body["report"]


def _group(cell: Cell) -> str:
    same = {k: v for k, v in cell.identity.items() if k not in OWN}
    told = json.dumps([same, cell.tail.partition("__")[0]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:ID_DIGITS]
