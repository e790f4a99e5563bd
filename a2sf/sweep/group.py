"""Cells that are computed together: the same model, documents and examples, whatever the policy, budget and schedule.

Documents and prompts are made once, each token is computed once for all cells, and lm-eval then computes its metrics cell by
cell. A cell alone is a group of one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from a2sf.engine.trace import Trace
from a2sf.hf.warned import Warned
from a2sf.scoring.generation.thinking import Thinking
from a2sf.scoring.requests import Requests, by_kind
from a2sf.scoring.scorer import Scorer
from a2sf.store.runs import DiskError
from a2sf.sweep.answer_store import AnswerStore
from a2sf.sweep.cell import Cell
from a2sf.sweep.early_stopping import EarlyStopping, check_can_stop_early
from a2sf.sweep.evaluate import evaluate
from a2sf.sweep.full_texts import FullTexts
from a2sf.sweep.reuse import find_extendable
from a2sf.tasks import shared_texts
from a2sf.tasks.prompting import Prompting
from a2sf.tasks.spec import provenance
from a2sf.tasks.warned import collected

_END = object()
DIFFER = ("policy", "budget", "schedule")
"""Fields in which the cells of a group differ."""


def group_key(cell: Cell) -> Hashable:
    """Equal for cells that are computed together."""
    return tuple(getattr(cell, f.name) for f in dataclasses.fields(cell) if f.name not in DIFFER)


def grouped(cells: Iterable[Cell], more: Callable[[Cell], Hashable] = lambda cell: None) -> list[list[Cell]]:
    """Cells by group, in the order of each group's first cell.

    Args:
        more: a second key; cells of a group have the same.
    """
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((group_key(cell), more(cell)), []).append(cell)
    return list(groups.values())


@dataclass(frozen=True)
class Computed:
    """What became of a cell: a result with its documents, or an error.

    Attributes:
        ran: which implementations of the engine ran (`a2sf.engine.kernels.backends_run`).
        traces: what was evicted from the first documents.
    """

    cell: Cell
    result: dict[str, Any] | None = None
    documents: pd.DataFrame | None = None
    error: Exception | None = None
    ran: frozenset[str] = frozenset()
    traces: tuple[Trace, ...] = ()


@dataclass(frozen=True)
class GroupRequests:
    """What the cells of a group are scored on.

    Attributes:
        task: lm-eval's, which has made its requests.
        requests: those in tokens, by kind.
        documents: fingerprint of the documents.
    """

    task: Any
    requests: Sequence[Requests]
    documents: str

    def of_documents(self, documents: Set[int]) -> GroupRequests:
        """The same with the requests of some documents only, by their numbers."""
        return dataclasses.replace(self, requests=[r.of_documents(documents) for r in self.requests])


class CellGroup:
    """Computes a group of cells.

    Args:
        cells: equal in `group_key`.
        scorer: of their model.
        directory: of the sweep, where unfinished cells keep their answers.
        checkpoint_seconds: after so much time the answers so far are written there.
        trace: the number of first documents whose evictions are recorded.
        full_texts: whether the full cache's texts are read under each system (`FullTexts`).
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        scorer: Scorer,
        directory: Path,
        checkpoint_seconds: float = 60.0,
        trace: int = 0,
        full_texts: bool = False,
    ) -> None:
        self.cells, self.scorer, self.directory = cells, scorer, directory
        self.checkpoint_seconds, self.trace = checkpoint_seconds, trace
        self.full_texts = full_texts
        self._store: AnswerStore | None = None
        self._texts: FullTexts | None = None
        self._stopping: EarlyStopping | None = None
        self._unfinished: dict[str, Cell] = {}  # by name, those that can be scored and have no result yet
        self._warned = Warned()  # of what is done for all cells

    def shares(self) -> dict[str, float]:
        """By the name of an unfinished cell, how much of its work is done, from 0 to 1."""
        answers = self._store.all if self._store else {}
        return {name: a.share for name, a in answers.items() if a.progress.requests}

    def compute(self) -> Iterator[Computed]:
        """Score what was not scored before, and evaluate each cell. An error of one cell does not affect others.

        Raises:
            DiskError: if the disk refuses answers.
        """
        clock = time.perf_counter()
        try:
            given = self._prepare_requests()
        except Exception as error:
            yield from (Computed(c, error=error) for c in self.cells)
            return
        store = self._store = AnswerStore(self.directory, given.documents, self.checkpoint_seconds)
        yield from self._add_systems(given, store, clock)
        self._prepare_comparisons(given, store)
        try:
            yield from self._score_and_evaluate(given, store)
            yield from self._evaluate_remaining(given, store)
        except BaseException:  # interrupted: what was computed since the last checkpoint is written
            with suppress(DiskError):
                store.save(store.all)
            raise

    def _prepare_requests(self) -> GroupRequests:
        """What all cells are scored on; an error concerns all of them."""
        first = self.cells[0]
        with collected(self._warned):
            task = first.spec.build(first.seed)
            if first.stopping_rule is not None:
                check_can_stop_early(task)
            instances = task.make_requests(self.scorer.lm, first.prompting, first.limit)
        shared, prompting = (task.config.metadata or {}).get("shared_context"), first.prompting
        requests = by_kind(self.scorer.lm, instances, shared, self._thinking(prompting), prompting.samples)
        self.scorer.seed = first.seed
        return GroupRequests(task, requests, provenance(task)["fingerprint"])

    def _add_systems(self, given: GroupRequests, store: AnswerStore, clock: float) -> Iterator[Computed]:
        """Add each cell with its system and its known answers to the store; gives the cells whose system has an error.

        Args:
            clock: when the group began; each cell is charged with its share of the time since then.
        """
        finished = find_extendable(self.directory.parent, self.cells)
        each = (time.perf_counter() - clock) / len(self.cells)
        for cell in self.cells:
            try:
                answers = self.scorer.answers(self.scorer.system(cell.policy, cell.budget, cell.schedule))
            except Exception as error:
                yield Computed(cell, error=error)
                continue
            self._unfinished[cell.name] = cell
            store.add(cell, answers, finished.get(cell.name), {key for r in given.requests for key in r.keys})
            answers.progress.seconds += each

    def _prepare_comparisons(self, given: GroupRequests, store: AnswerStore) -> None:
        """Set up what looks at several cells: the full cache's texts under each system, and early stopping."""
        first, cells = self.cells[0], list(self._unfinished.values())
        if self.full_texts and cells and first.spec.generates:
            self._texts = FullTexts(self.scorer, cells, store, self.directory)
        if first.stopping_rule is not None and cells:
            field = shared_texts.field_of(given.task, first.data.cluster)
            self._stopping = EarlyStopping(first.stopping_rule, self.directory, cells, store.all, given.task, field)

    def _thinking(self, prompting: Prompting) -> Thinking | None:
        """How thinking is recognised in texts by the cells' settings; None: by the arguments of the model."""
        given = prompting.think_end_token
        return None if given is None else Thinking.of(given, self.scorer.lm.tokenizer, prompting.enable_thinking)

    def _score_and_evaluate(self, given: GroupRequests, store: AnswerStore) -> Iterator[Computed]:
        """Score the requests; where the group cannot stop early, each cell is evaluated once it has all answers.

        An error that is not of a single cell becomes the error of each cell that has none yet.
        """
        try:
            for _ in self._score_needed(given, store):
                store.save_due()
                if self._stopping is not None:
                    continue
                # at once, so that a failure of another cell loses nothing
                for name in self._ready_to_evaluate(given.requests, store):
                    yield from self._evaluate(self._unfinished.pop(name), given, store)
        except DiskError:
            raise
        except Exception as error:
            store.save(store.all)
            for answers in store.all.values():
                answers.error = answers.error or error

    def _evaluate_remaining(self, given: GroupRequests, store: AnswerStore) -> Iterator[Computed]:
        """Evaluate the cells that have no result yet, where the group stopped early on the documents that decided."""
        given = self._decisive(given)
        self._ready_to_evaluate(given.requests, store)  # for the texts that it reads under the systems that remain
        for cell in self._unfinished.values():
            yield from self._evaluate(cell, given, store)

    def _decisive(self, given: GroupRequests) -> GroupRequests:
        """The requests of the documents that decided every comparison; all, if that is not known or nothing is compared."""
        if self._stopping is None or self._stopping.documents is None:
            return given
        return given.of_documents(set(self._stopping.documents))

    def _score_needed(self, given: GroupRequests, store: AnswerStore) -> Iterator[None]:
        """Pass by pass, until all requests have an answer, or those of enough documents to stop."""
        stopping = self._stopping
        if stopping is not None:
            for documents in stopping.batches(self.scorer.tokens_per_pass):
                for _ in self._score(given.of_documents(set(documents)), store):
                    yield
                    if stopping.decide():
                        break
                if stopping.decide():
                    break
        # cells that are not compared may still lack answers for the documents that decided
        yield from self._score(self._decisive(given), store)

    def _score(self, given: GroupRequests, store: AnswerStore) -> Iterator[None]:
        """Pass by pass, until all these requests have an answer."""
        for of_kind in given.requests:
            passes = self.scorer.score(of_kind, list(store.all.values()))
            while True:
                with collected(self._warned, again=True):  # not open while this generator is suspended
                    if next(passes, _END) is _END:
                        break
                yield

    def _ready_to_evaluate(self, requests: Sequence[Requests], store: AnswerStore) -> list[str]:
        """Names of the cells that can be evaluated; with `full_texts` their systems read the full cache's texts first."""
        finished = store.finished
        if self._texts is None or not finished:
            return finished
        with collected(self._warned, again=True):
            return self._texts.ready(finished, requests)

    def _evaluate(self, cell: Cell, given: GroupRequests, store: AnswerStore) -> Iterator[Computed]:
        """A cell's result from its answers, which are dropped after the caller has taken the result."""
        answers, stopping = store[cell.name], self._stopping
        try:
            if answers.error is not None:
                raise answers.error
            chosen = None if stopping is None else stopping.documents
            result, documents = evaluate(cell, given.task, given.requests, answers, self.scorer, chosen)
            documents = documents if self._texts is None else self._texts.added(cell.name, result, documents)
            traces = {t.document: t for r in given.requests for t in self.scorer.traces(r, answers, self.trace)}
        except Exception as error:
            store.save([cell.name])  # the error may have come after the answers
            store.drop(cell.name)
            yield Computed(cell, error=error)
            return
        if stopping is not None:
            result |= {"until": stopping.report()}
        result = with_notes(result, answers.warned, self._warned)
        yield Computed(cell, result, documents, ran=frozenset(answers.ran), traces=tuple(traces.values()))
        store.finish(cell.name)


def with_notes(result: dict[str, Any], *warned: Warned) -> dict[str, Any]:
    """A result with these warnings added to its notes; without `notes` if there are none."""
    notes = [*result.pop("notes", ()), *(note for w in warned for note in w.notes)]
    return result | ({"notes": notes} if notes else {})
