"""Passes of the model that score sequences of several systems: each token is computed once."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from a2sf.hf.attention import NonFiniteError, Plan
from a2sf.hf.attention.named import Configs, configs_of
from a2sf.scoring.passes.logits import log_probabilities
from a2sf.scoring.passes.looks import LookingRow, rows_of
from a2sf.scoring.passes.packing import Pack
from a2sf.scoring.passes.sequences import PassSettings, ScoredSequence, pass_of
from a2sf.scoring.systems import Answers

LEAST_PASS = 64
"""Tokens per pass below which each sequence is read by itself, and fails by itself where memory does not suffice."""


@dataclass(frozen=True)
class Pending:
    """A log-likelihood that a system lacks.

    Attributes:
        answers: of the system.
        request, window: its place among the requests, and among the windows of its request.
        lengths: tokens of context and continuation, as they were before the context lost what is too long.
    """

    answers: Answers
    sequence: ScoredSequence
    request: int
    window: int = 0
    lengths: tuple[int, int] = (0, 0)


@dataclass
class PassResult:
    """What a pass computed.

    Attributes:
        scores: each log-likelihood, whether greedy decoding would have produced the continuation, and the tokens that were
            cached at the end, mean over layers and heads, where a threshold decides it; else None.
        failures: answers of a system that cannot be computed, why, and the places of the requests that are to blame.
    """

    scores: list[tuple[Pending, float, bool, float | None]] = field(default_factory=list)
    failures: list[tuple[Answers, Exception, list[int]]] = field(default_factory=list)


@dataclass
class Passes:
    """Passes of a model.

    Attributes:
        tokens_per_pass: computed tokens of a pass; halved when memory runs out.
        sequences_per_pass: None: no limit.
        room: tokens for whose states there is memory in all layers.
    """

    model: PreTrainedModel
    settings: PassSettings
    tokens_per_pass: int
    sequences_per_pass: int | None
    room: int

    @cached_property
    def _configs(self) -> Configs:
        return configs_of(self.model)

    def run(self, pending: Sequence[Pending]) -> Iterator[PassResult]:
        """Compute what is pending, a pass at a time; nothing more is computed for a system whose answers have an `error`."""
        sequences = [p.sequence.simplest for p in pending]
        left = dict.fromkeys(range(len(pending)))
        before, clock = self.tokens_per_pass, time.perf_counter()
        crowded = False
        while left:
            most = 1 if self.tokens_per_pass < LEAST_PASS else self.sequences_per_pass
            for packs in rows_of(list(left), sequences, self.model, self.tokens_per_pass, self.room, most):
                read = LookingRow.of(packs, sequences, self.settings.device)
                items = read.items
                try:
                    scores, plans = self._score(read)
                except NonFiniteError as error:  # whose rows are places in `pending`
                    yield _failed(pending, error, error.rows)
                    break
                except torch.cuda.OutOfMemoryError as error:
                    torch.cuda.empty_cache()
                    if self.tokens_per_pass >= LEAST_PASS:
                        self.tokens_per_pass //= 2
                    else:
                        crowded = True
                        yield _failed(pending, error, items)
                    break
                except Exception as error:  # perhaps of one system alone: a policy on a sliding window, a backend
                    of_system = by_system(items, pending)
                    if len(of_system) == 1:
                        yield _failed(pending, error, items)
                    for places in of_system if len(of_system) > 1 else ():
                        yield from self.run([pending[i] for i in places])
                        for i in places:
                            del left[i]
                    clock = time.perf_counter()
                    break
                cached = {i: n for plan in plans for i, n in plan.cached_by().items()}
                done = PassResult([(pending[i], *scores[i], cached.get(i)) for i in items])
                for i in items:
                    del left[i]
                record_costs(read, packs, plans, pending, time.perf_counter() - clock)
                yield done
                clock = time.perf_counter()
            left = {i: None for i in left if pending[i].answers.error is None}
        if crowded:
            self.tokens_per_pass = before  # what comes next may be smaller

    def _score(self, read: LookingRow) -> tuple[dict[int, tuple[float, bool]], Sequence[Plan]]:
        """(log-likelihood, is greedy) of each sequence of a row, by number, and what computed them.

        Raises:
            NonFiniteError: if one depends on NaN or infinity; its `rows` are the numbers of these. A logit of -infinity
                counts only if it is a target's: no probability is 0, so it is an overflow. Other logits may be -infinity,
                as models mark entries of the vocabulary that no token uses.
        """
        row = read.row
        # positions of the row that some request scores, each once
        targets_of = [read.sequences[i].targets for i in row.items]
        scored = [row.last(which, len(targets)) for which, targets in enumerate(targets_of)]
        index, where = torch.cat([torch.from_numpy(s) for s in scored]).unique(return_inverse=True)
        targets = torch.tensor([t for of_one in targets_of for t in of_one])
        chosen, greedy = torch.zeros(len(targets)), torch.zeros(len(targets), dtype=torch.bool)
        dtype = self.model.dtype
        try:
            reading = pass_of(row, read.sequences, self.settings)
            tokens = max(LEAST_PASS, self.tokens_per_pass)
            for number, part in enumerate(read.parts(reading, tokens, self.model)):
                # which of the targets, and of the columns, are this part's
                mine = ((index >= part.begin) & (index < part.end))[where].nonzero()[:, 0]
                needed, at = index[where[mine]].unique(return_inverse=True)
                with read.logits(number, part, needed, self.model, self._configs) as logits_of:
                    before = 0
                    for (logits,) in logits_of:
                        dtype = logits.dtype
                        here = ((at >= before) & (at < before + len(logits))).nonzero()[:, 0]
                        those = mine[here]
                        asks = ((at[here] - before).to(logits.device), targets[those].to(logits.device))
                        chosen[those], greedy[those] = (x.cpu() for x in log_probabilities(logits, *asks))
                        before += len(logits)
                        del logits
        except NonFiniteError as error:  # whose rows are segments
            raise NonFiniteError(error.where, error.dtype, read.blamed(error.rows)) from error
        sizes = [len(of_one) for of_one in targets_of]
        if not bool(torch.isfinite(chosen).all()):
            pieces = zip(row.items, torch.isfinite(chosen).split(sizes), strict=True)
            raise NonFiniteError("the logits", dtype, sorted(i for i, finite in pieces if not finite.all()))
        scores = {
            i: (float(c.double().sum()), bool(g.all()))
            for i, c, g in zip(row.items, chosen.split(sizes), greedy.split(sizes), strict=True)
        }
        return scores, reading.plans


def _failed(pending: Sequence[Pending], error: Exception, places: Sequence[int]) -> PassResult:
    """The outcome of a pass that failed because of some of `pending`; the error is set on the answers of their systems."""
    if not places:  # of no system, so that the next pass would fail, too
        raise error
    traceback.clear_frames(error.__traceback__)  # which would hold what the pass had in memory
    done = PassResult()
    for of_system in by_system(places, pending):
        answers = pending[of_system[0]].answers
        answers.error = error
        done.failures.append((answers, error, [pending[i].request for i in of_system]))
    return done


def by_system(places: Sequence[int], pending: Sequence[Pending]) -> list[list[int]]:
    """Places in `pending`, those of each system together."""
    found: dict[int, list[int]] = {}
    for i in places:
        found.setdefault(id(pending[i].answers), []).append(i)
    return list(found.values())


def record_costs(
    read: LookingRow, packs: Sequence[Pack], plans: Sequence[Plan], pending: Sequence[Pending], seconds: float
) -> None:
    """Note for each system what ran and warned when rows were read together, and divide their tokens and the time.

    Args:
        packs: these rows, without what policies looked at.
        plans: what computed them.
    """
    answers = [p.answers for p in pending]
    record_backends(plans, answers)
    read.note_warned(answers)
    tokens = sum(len(row.tokens) for row in packs)
    for row in packs:
        divide_costs(row, pending, seconds * len(row.tokens) / tokens)


def record_backends(plans: Sequence[Plan], answers: Sequence[Answers]) -> None:
    """Note for each system which backends ran and what warned in its plans; `answers` are those of each sequence."""
    for plan in plans:
        # what is looked at has a negative number, and is in a call of the sequences that it serves
        for one in {id(answers[i]): answers[i] for i in plan.serves if i >= 0}.values():
            one.ran |= plan.ran
            if plan.warned is not None:
                one.warned.update(plan.warned)


def divide_costs(row: Pack, pending: Sequence[Pending], seconds: float) -> None:
    """Divide the tokens and `seconds` of a pass among systems: each segment, or scored column, among those that need it."""
    systems = {id(pending[i].answers): pending[i].answers for i in row.items}
    through: list[set[int]] = [set() for _ in row.start]
    scoring: dict[int, set[int]] = {}
    for which, i in enumerate(row.items):
        system = id(pending[i].answers)
        for segment in row.path[which]:
            through[segment].add(system)
        for column in row.last(which, len(pending[i].sequence.targets)).tolist():
            scoring.setdefault(column, set()).add(system)
    computed = dict.fromkeys(systems, 0.0)
    for length, users in zip(row.length, through, strict=True):
        for system in users:
            counts = systems[system].counts
            computed[system] += length / len(users)
            counts.needed += length
            counts.together += length if len(users) > 1 else 0
    for users in scoring.values():
        for system in users:
            systems[system].counts.scored += 1 / len(users)
    for system, tokens in computed.items():
        systems[system].counts.computed += tokens
        systems[system].progress.seconds += seconds * tokens / len(row.tokens)
