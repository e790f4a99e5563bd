"""Passes of the model that score requests of several members: each token once, each failure to whom it concerns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from a2sf.hf.attention import NonFiniteError, Plan, rope_switch, running
from a2sf.hf.attention.mixed import Mixed
from a2sf.hf.calls.chunks import bounds
from a2sf.hf.calls.logits import logits_in_parts
from a2sf.scoring.passes.logits import log_probabilities
from a2sf.scoring.passes.long_rows import Part, in_parts, saves
from a2sf.scoring.passes.packing import Pack, pack
from a2sf.scoring.passes.sequences import Model, Request, pass_of
from a2sf.scoring.systems import Member

LEAST_PASS = 64
"""Tokens per pass below which each sequence is read by itself, and fails by itself where memory does not suffice."""


@dataclass
class Asked:
    """A request of one member; `number` is what the caller calls it."""

    member: Member
    request: Request
    number: int


@dataclass
class Scoring:
    """What a run of passes needs of the model.

    Attributes:
        tokens_per_pass: computed tokens of a pass; halved when memory runs out.
        sequences_per_pass: None: no limit.
        due: when each request is to be read, by its number; None: the longest first.
    """

    model: PreTrainedModel
    about: Model
    tokens_per_pass: int
    sequences_per_pass: int | None = None
    due: Callable[[int], int] | None = None

    def run(
        self,
        asked: Sequence[Asked],
        done: Callable[[Asked, float, bool], None],
        failed: Callable[[Member, Exception, list[int]], None],
        after_pass: Callable[[], None],
    ) -> None:
        """Score all that is asked, a pass at a time.

        Args:
            done: told each request's log-likelihood, and whether greedy decoding would have said it.
            failed: told of a member that cannot go on, and the numbers of its requests that are to blame.
            after_pass: called when a pass has been told.
        """
        todo = [a.request.simplest for a in asked]
        pending = dict.fromkeys(range(len(asked)))
        before, clock = self.tokens_per_pass, time.perf_counter()
        crowded = False
        while pending:
            for row in self._rows(list(pending), asked, todo):
                try:
                    scores, plans = self._score(row, todo)
                except NonFiniteError as error:  # whose rows are requests
                    _fail(asked, error, error.rows, failed)
                    break
                except torch.cuda.OutOfMemoryError as error:
                    torch.cuda.empty_cache()
                    if self.tokens_per_pass >= LEAST_PASS:
                        self.tokens_per_pass //= 2
                    else:
                        crowded = True
                        _fail(asked, error, row.items, failed)
                    break
                except Exception as error:  # of some member alone, perhaps: a window of the model's own, a backend
                    of_member = _by_member(row.items, asked)
                    if len(of_member) == 1:
                        _fail(asked, error, row.items, failed)
                    for own in of_member if len(of_member) > 1 else ():
                        self.run([asked[i] for i in own], done, failed, after_pass)
                        for i in own:
                            del pending[i]
                    clock = time.perf_counter()
                    break
                for i, (value, greedy) in zip(row.items, scores, strict=True):
                    done(asked[i], value, greedy)
                    del pending[i]
                for plan in plans:
                    for i in plan.serves:
                        asked[i].member.ran |= plan.ran
                now = time.perf_counter()
                _share(row, asked, now - clock)
                clock = now
                after_pass()
            pending = {i: None for i in pending if asked[i].member.error is None}
        if crowded:
            self.tokens_per_pass = before  # what comes next may be smaller

    def _rows(self, pending: list[int], asked: Sequence[Asked], todo: Sequence[Request]) -> Iterator[Pack]:
        """Requests in rows; a row never mixes sequences that the model's rotary scaling treats differently."""
        limit = rope_switch(self.model.config)
        most = 1 if self.tokens_per_pass < LEAST_PASS else self.sequences_per_pass
        parts: dict[bool, list[int]] = {}
        for i in pending:
            parts.setdefault(len(todo[i].read) > limit, []).append(i)
        for part in parts.values():
            items = [todo[i].item() for i in part]
            due = None if self.due is None else [self.due(asked[i].number) for i in part]
            for row in pack(items, max_tokens=self.tokens_per_pass, max_items=most, due=due):
                row.items = [part[i] for i in row.items]
                row.owner = [part[i] for i in row.owner]
                yield row

    def _score(self, row: Pack, todo: Sequence[Request]) -> tuple[list[tuple[float, bool]], Sequence[Plan]]:
        """(log-likelihood, is greedy) of each request of a row, and what computed them.

        Raises:
            NonFiniteError: if one depends on NaN or infinity; its `rows` are those requests' places in `todo`. A logit of
                -infinity counts only where it is a target's: no probability is nought, so it is an overflow. Others may
                be, as models mark entries of the vocabulary that no token uses.
        """
        device = self.about.device
        # positions of the row that some request scores, each once
        scored = [row.last(which, len(todo[i].targets)) for which, i in enumerate(row.items)]
        index, where = torch.cat([torch.from_numpy(s) for s in scored]).unique(return_inverse=True)
        targets = torch.tensor([t for i in row.items for t in todo[i].targets])
        chosen, greedy = torch.zeros(len(targets)), torch.zeros(len(targets), dtype=torch.bool)
        dtype = self.model.dtype
        try:
            reading = pass_of(row, todo, self.about)
            for part in self._parts(row, reading, todo):
                # which of the targets, and of the columns, are this part's
                mine = ((index >= part.begin) & (index < part.end))[where].nonzero()[:, 0]
                asked, at = index[where[mine]].unique(return_inverse=True)
                columns = asked - part.begin if len(asked) else torch.tensor([0])  # a model gives logits of something
                with running(part.reading):
                    done = 0
                    for (logits,) in logits_in_parts(
                        self.model,
                        columns.to(device),
                        input_ids=torch.tensor([row.tokens[part.begin : part.end]], device=device),
                        position_ids=torch.tensor([row.positions[part.begin : part.end]], device=device),
                        use_cache=False,
                    ):
                        dtype = logits.dtype
                        here = ((at >= done) & (at < done + len(logits))).nonzero()[:, 0]
                        those = mine[here]
                        asks = ((at[here] - done).to(logits.device), targets[those].to(logits.device))
                        chosen[those], greedy[those] = (x.cpu() for x in log_probabilities(logits, *asks))
                        done += len(logits)
                        del logits
        except NonFiniteError as error:  # whose rows are segments
            bad = set(error.rows)
            through = [i for i, path in zip(row.items, row.path, strict=True) if bad.intersection(path)]
            raise NonFiniteError(error.where, error.dtype, through) from error
        sizes = [len(todo[i].targets) for i in row.items]
        if not bool(torch.isfinite(chosen).all()):
            pieces = zip(row.items, torch.isfinite(chosen).split(sizes), strict=True)
            raise NonFiniteError("the logits", dtype, sorted(i for i, finite in pieces if not finite.all()))
        scores = [
            (float(c.double().sum()), bool(g.all()))
            for c, g in zip(chosen.split(sizes), greedy.split(sizes), strict=True)
        ]
        return scores, reading.plans

    def _parts(self, row: Pack, reading: Plan | Mixed, todo: Sequence[Request]) -> Iterator[Part]:
        """The passes that read a row: one, or for a long row several that hold less together than at once."""
        size = len(row.tokens)
        # one that hangs over a little, as rows of short requests do, is read at once
        ends = bounds(size, max(LEAST_PASS, self.tokens_per_pass))
        if len(ends) > 1 and saves(row, ends, todo, self.model.config):
            return in_parts(reading, ends)
        return iter([Part(0, size, reading)])


def _fail(
    asked: Sequence[Asked],
    error: Exception,
    rows: Sequence[int],
    failed: Callable[[Member, Exception, list[int]], None],
) -> None:
    """Tell each member that some of the requests `rows` belong to."""
    if not rows:  # nobody's, so it would come again
        raise error
    for own in _by_member(rows, asked):
        member = asked[own[0]].member
        member.error = error
        failed(member, error, [asked[i].number for i in own])


def _by_member(rows: Sequence[int], asked: Sequence[Asked]) -> list[list[int]]:
    """Places in `asked`, those of each member together."""
    found: dict[int, list[int]] = {}
    for i in rows:
        found.setdefault(id(asked[i].member), []).append(i)
    return list(found.values())


def _share(row: Pack, asked: Sequence[Asked], seconds: float) -> None:
    """Divide what a pass computed among the members: each segment, and each scored position, by those who needed it."""
    members = {id(asked[i].member): asked[i].member for i in row.items}
    through: list[set[int]] = [set() for _ in row.start]
    scoring: dict[int, set[int]] = {}
    for which, i in enumerate(row.items):
        member = id(asked[i].member)
        for segment in row.path[which]:
            through[segment].add(member)
        for column in row.last(which, len(asked[i].request.targets)).tolist():
            scoring.setdefault(column, set()).add(member)
    computed = dict.fromkeys(members, 0.0)
    for length, who in zip(row.length, through, strict=True):
        for member in who:
            counts = members[member].counts
            computed[member] += length / len(who)
            counts.needed += length
            counts.together += length if len(who) > 1 else 0
    for who in scoring.values():
        for member in who:
            members[member].counts.scored += 1 / len(who)
    for key, tokens in computed.items():
        members[key].counts.computed += tokens
        members[key].seconds += seconds * tokens / len(row.tokens)
