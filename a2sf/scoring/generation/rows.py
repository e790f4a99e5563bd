"""Continuous batching: rows of documents, samples and systems that are generated together.

The model reads one token of every row in a call. A row that is finished makes room at once: its cache is not read any more,
and new rows are let in as soon as a quarter of the rows may come. Their prompts are read in packed passes, each token once
for all systems, as long as no cache was pruned. The later questions of a conversation are read token by token beside the
tokens that other rows generate, so that rows may be in any turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from a2sf.engine.kernels import backends_run
from a2sf.hf.attention import NonFiniteError, attached, running
from a2sf.hf.attention.named import configs_of
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.cache.rows import JointPass, ReadRow, replace_rows
from a2sf.policies.base import UNLIMITED
from a2sf.scoring.generation.reading import Reading, read_prompts
from a2sf.scoring.generation.row import Row
from a2sf.scoring.generation.sampling import Choice
from a2sf.scoring.passes.run import Pending, record_costs
from a2sf.scoring.passes.sequences import PassSettings

WORTHWHILE = 4
"""New rows are let in when they are this part of all rows, since letting rows in moves the caches of the others."""


@dataclass
class Lane:
    """Rows of one rule and schedule in one cache; those that are finished stay in the cache until others join.

    Attributes:
        rows: by their places in the cache; None: the row is finished.
    """

    cache: PrunedCache
    rows: list[Row | None] = field(default_factory=list)

    @property
    def live(self) -> list[Row]:
        return [r for r in self.rows if r is not None]

    @property
    def which(self) -> torch.Tensor:
        """bool [rows of the cache]: those that are not finished."""
        return torch.tensor([r is not None for r in self.rows])

    def join(self, new: Sequence[tuple[Row, ReadRow]]) -> None:
        """Let rows in, and forget those that are finished."""
        stay = [i for i, r in enumerate(self.rows) if r is not None]
        replace_rows(self.cache, stay, [read for _, read in new])
        self.rows = [*self.live, *(row for row, _ in new)]

    def count(self) -> None:
        """Note of rows that are finished how many tokens are cached, where a threshold decides it."""
        layers = [k for k in self.cache.layers if k.retention.rule.threshold is not None]
        done = [(i, r) for i, r in enumerate(self.rows) if r is not None and r.finish is not None]
        counts = [k.state().counts for k in layers] if done else []
        for i, row in done:
            row.note_cached([n[i] for n in counts])

    def drop_finished(self) -> None:
        """Mark finished rows; once half of the cache is theirs, it is made smaller."""
        self.rows = [None if r is None or r.finish is not None else r for r in self.rows]
        if self.rows and 2 * len(self.live) <= len(self.rows):
            self.join([])


class RowGenerator:
    """Generates texts.

    Args:
        about: the model, as passes must know it.
        choice: how tokens are chosen.
        make_cache: an empty cache for rows like the given ones.
        prepare: called with each row before its prompt is read; a row for which it returns False is left out.
        most: rows at a time.
        room: numbers that the caches of all rows may hold: tokens times layers.
        tokens_per_pass: computed tokens of a pass over prompts.

    Attributes:
        alone: whether systems are generated one after the other, after an error that may be of any of them.
        culprits: the rows that a `NonFiniteError` is about.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: PassSettings,
        choice: Choice,
        make_cache: Callable[[Sequence[Row]], PrunedCache],
        prepare: Callable[[Row], bool],
        most: int,
        room: int,
        tokens_per_pass: int,
    ) -> None:
        self.model, self.settings, self.choice, self.make_cache = model, settings, choice, make_cache
        self.prepare = prepare
        self.most, self.room, self.tokens_per_pass = most, room, tokens_per_pass
        self.alone = False
        self.culprits: list[Row] = []
        self.lanes: dict[Hashable, Lane] = {}
        self._configs = configs_of(model)

    @property
    def live(self) -> list[Row]:
        """The rows in work, as they follow each other in the model's batch."""
        return [row for lane in self.lanes.values() for row in lane.live]

    def run(self, waiting: list[Row]) -> Iterator[list[Row]]:
        """Generate the texts of all rows, in their order; yields those that are finished, and takes them off `waiting`.

        After an error, those in work begin anew (`abandon`).
        """
        while waiting or self.live:
            new = self._admissible(waiting)
            finished = self._let_in([row for row in new if self.prepare(row)])
            del waiting[: len(new)]
            if finished:
                yield finished  # before the next call, which may fail
            if finished := self._step():
                yield finished

    def abandon(self) -> list[Row]:
        """Forget all rows in work, and give them back as they were in the beginning."""
        rows = self.live
        self.lanes.clear()
        for row in rows:
            row.restart()
        return rows

    def _admissible(self, waiting: Sequence[Row]) -> list[Row]:
        """The first of the waiting rows for which there is room now; none where it is better to wait for more of them."""
        live = self.live
        room, found = self.room - sum(r.held for r in live), list[Row]()
        systems = {id(r.answers) for r in live[:1]}
        for row in waiting[: max(0, self.most - len(live))]:
            room -= row.held
            systems.add(id(row.answers))
            if (room < 0 and (live or found)) or (self.alone and len(systems) > 1):
                break
            found.append(row)
        few = len(found) < min(len(waiting), max(1, len(live) // WORTHWHILE))
        return [] if live and few else found

    def _let_in(self, new: Sequence[Row]) -> list[Row]:
        """Read prompts, and put the rows into their lanes; returns those that their first token ended."""
        by_lane: dict[Hashable, list[tuple[Row, ReadRow]]] = {}
        clock = time.perf_counter()
        for reading in self._readings(new):
            rows = [new[i] for i in reading.row.items]
            for row, i in zip(rows, reading.row.items, strict=True):
                row.sequence = reading.row.sequences[i]  # decided now, where its policy looked at the prompt
            with self._blaming(rows):
                self._take(rows, reading.logits)
            for row, end in zip(rows, reading.ends, strict=True):
                if row.finish is not None:
                    each = zip(end.retention, end.states, strict=True)
                    row.note_cached([s.counts[0] for k, s in each if k.rule.threshold is not None])
                else:
                    by_lane.setdefault(lane_of(row), []).append((row, end))
            pending = [Pending(r.answers, r.sequence, r.request) for r in new]
            record_costs(reading.row, reading.packs, reading.plans, pending, time.perf_counter() - clock)
            clock = time.perf_counter()
        for key, rows_of in by_lane.items():
            if key not in self.lanes:
                self.lanes[key] = Lane(self.make_cache([rows_of[0][0]]))
            self.lanes[key].join(rows_of)
        return [r for r in new if r.finish is not None]

    def _readings(self, new: Sequence[Row]) -> Iterator[Reading]:
        prompts = [r.sequence for r in new]
        with self._blaming(new):
            if new:
                room = max(1, (self.room - sum(r.held for r in self.live)) // self.settings.layers)
                yield from read_prompts(self.model, self.settings, prompts, self.tokens_per_pass, room)

    def _step(self) -> list[Row]:
        """Read the last token of each row, and add the next one; returns the rows that it ended."""
        lanes = [lane for lane in self.lanes.values() if lane.live]
        rows = [row for lane in lanes for row in lane.live]
        if not rows:
            return []
        clock = time.perf_counter()
        with backends_run() as ran, self._blaming(rows):
            logits = self._logits(lanes, rows)
            for row in rows:
                row.advance()
            predicted = [not row.unread for row in rows]  # others are in the middle of a question
            self._take(rows, logits)
        each = (time.perf_counter() - clock) / len(rows)
        for row, was_predicted in zip(rows, predicted, strict=True):
            row.answers.ran |= ran
            row.answers.progress.seconds += each
            row.answers.counts.computed += 1
            row.answers.counts.needed += 1
            row.answers.counts.scored += was_predicted
        for key, lane in list(self.lanes.items()):
            lane.count()
            lane.drop_finished()
            if not lane.live:
                del self.lanes[key]
        return [r for r in rows if r.finish is not None]

    def _logits(self, lanes: Sequence[Lane], rows: Sequence[Row]) -> torch.Tensor:
        together = JointPass([(lane.cache, lane.which) for lane in lanes])
        device = self.settings.device
        ids, positions = torch.tensor([row.next for row in rows], device=device)[:, :, None].unbind(1)
        done = False
        try:
            with attached(self.model, configs=self._configs), torch.inference_mode(), running(together):
                logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -1]
            done = True
        finally:
            together.end(done)
        for lane, warned in zip(lanes, together.warned, strict=True):
            for answers in {id(row.answers): row.answers for row in lane.live}.values():
                answers.warned.update(warned)
        return logits

    def _take(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Add the token that follows each row, but for those in the middle of a question."""
        finite = torch.isfinite(logits.amax(-1))
        if not bool(finite.all()):
            raise NonFiniteError("the logits", self.model.dtype, (~finite).nonzero()[:, 0].tolist())
        if self.choice.greedy:
            tokens = logits.argmax(-1).tolist()
        else:
            tokens = [
                None if row.unread else self.choice.next_token(one, row.text, row.answer_start, row.generator)
                for one, row in zip(logits.split(1), rows, strict=True)
            ]
        for row, token in zip(rows, tokens, strict=True):
            if not row.unread:
                row.take(token)

    @contextmanager
    def _blaming(self, rows: Sequence[Row]) -> Iterator[None]:
        """Note which of `rows` an error inside is about."""
        try:
            yield
        except NonFiniteError as error:
            self.culprits = [rows[i] for i in error.rows]
            raise


def lane_of(row: Row) -> Hashable:
    """Equal for rows that can be in one cache, and need about the same number of slots there."""
    retention = row.sequence.retention
    largest = max(k.after(len(row.sequence.read) + row.follow).budget for k in retention)
    size = UNLIMITED if largest >= UNLIMITED else largest.bit_length()
    return row.sequence.schedule, tuple(k.rule for k in retention), size
