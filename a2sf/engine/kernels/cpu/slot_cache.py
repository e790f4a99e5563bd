"""`SlotCache`: caches of a batch in memory allocated once, to read on token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2sf.engine.checks import check_fits, check_lengths, check_state
from a2sf.engine.kernels.cpu import run as cpu_run
from a2sf.engine.kernels.cpu.attend import Work, run_plan, threads_for
from a2sf.engine.kernels.cpu.memory import (
    NO_CALL,
    NO_TRACE,
    allocate,
    as_arrays,
    empty_slots,
    make_call,
    make_scratch,
    rule_flags,
)
from a2sf.engine.kernels.cpu.plan import LARGEST_BLOCK, KernelPlan
from a2sf.engine.kernels.cpu.run import Program
from a2sf.engine.kernels.cpu.state import COUNT, SEEN, Shape, whole
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState
from a2sf.policies.rule import ACCUMULATED, Rule


class SlotCache:
    """Caches of a batch of rows in memory allocated once, for reading a sequence token by token or in short chunks.

    Besides `slots` cached tokens per KV head there is room for the token being read, rounded up to 16 slots in all.

    Args:
        rows, heads, group: B, K and H // K.
        slots: the largest budget of any row, or the longest sequence where that is less.
        D, V: sizes of keys and values.
        rule: how tokens are ranked.
        spare: tokens that may be cached beyond the budget before some are evicted; `slots` counts them.
    """

    backend = "numba"

    def __init__(
        self, rows: int, heads: int, group: int, slots: int, D: int, V: int, rule: Rule = ACCUMULATED, spare: int = 0
    ) -> None:
        self.rule = rule
        room = slots + 1 if slots >= 128 else whole(slots + 1)  # of few slots, some more do not matter
        self._shape = Shape(heads, group, D, V, whole(room), room, LARGEST_BLOCK, spare, **rule_flags(rule))
        self._states = allocate(rows * heads, self._shape)
        self._scratch, self._scratch_of = make_scratch(1, self._shape._replace(block=1)), (1, 1)

    @property
    def rows(self) -> int:
        return len(self._states.counters) // self._shape.heads

    @property
    def _work(self) -> Work:
        return Work(NO_CALL, self._states, self._scratch)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._states)

    @property
    def seen(self) -> Tensor:
        """Tokens read so far, int64 [B]."""
        return torch.from_numpy(self._states.counters[:: self._shape.heads, SEEN].copy())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        retention: BatchRetention,
        *,
        scale: float | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Read the next tokens of every row; other arguments as in `a2sf.evicting_attention`, output [B, H, T, V].

        Args:
            retention: what each of the B rows retains; its rule and schedule are those that the cache was made with.

        Raises:
            ValueError: if a row needs more slots than there are.
        """
        shape, B, T, D = self._shape, self.rows, query.shape[2], query.shape[3]
        check_fits(query, key, value, B, shape.heads, shape.group, shape.D, shape.V)
        room = shape.room
        length = np.broadcast_to(T if lengths is None else lengths.numpy(), B)
        budget, recent, sinks = (x.numpy() for x in (retention.budget, retention.recent, retention.sinks))
        check_lengths(length, budget, T)
        limit = budget + self._shape.spare
        after = self._states.counters[:: self._shape.heads, COUNT] + length
        need = np.minimum(after, limit + 1)
        if need.max() > room:
            raise ValueError(f"a row needs {need.max()} slots and the cache has {room}")
        block = np.minimum(np.where(after > limit, room - limit, T), self._shape.block)
        output = torch.zeros(B, T, query.shape[1], value.shape[-1])
        positions = None
        if self.rule.weight is not None or self.rule.bias is not None:
            tokens, lengths = torch.arange(T), torch.from_numpy(length.copy())[:, None, None]
            positions = (self.seen[:, None, None] + tokens).where(tokens < lengths, -1)  # -1 for padding
        scale = D**-0.5 if scale is None else scale
        call = make_call(query, key, value, output, NO_TRACE, scale, self.rule, positions)
        numbers = (budget, recent, sinks, block)
        self._run(length, 0, Work(call, self._states, self._scratch), retention.forgetting_factor.numpy(), numbers)
        return output.transpose(1, 2).to(query.dtype)

    def state(self) -> EvictionState:
        """What is cached, in canonical form."""
        shape, most = self._shape, max(1, int(self._states.counters[:, COUNT].max(initial=0)))
        state = empty_slots(self.rows, shape.heads, most, shape.D, shape.V)
        self._run(0, 0, self._work._replace(final=as_arrays(state)))
        return state.compact()

    def load(self, state: EvictionState, forgetting_factor: Tensor | float = 1.0) -> None:
        """Take over a state of as many rows; the factor is that of what was read, for a rule that divides by age."""
        shape = self._shape
        check_state(state, self.rows, shape.heads, shape.D, shape.V, self.rule)
        if state.most > shape.room:
            raise ValueError(f"the state holds more tokens than the cache's {self._shape.room} slots")
        work = self._work._replace(given=as_arrays(state, self.rule))
        self._run(0, cpu_run.GIVEN - np.arange(self.rows), work, forgetting_factor)

    def reorder(self, rows: Tensor) -> None:
        """Keep `rows` in that order; a row may be taken several times (beam search)."""
        pick, B = rows.numpy(), self.rows
        before, self._states = self._states, allocate(len(pick) * self._shape.heads, self._shape)
        for new, old in zip(self._states, before, strict=True):
            new.reshape(-1)[:] = old.reshape(B, old.size // B)[pick].reshape(-1)

    def _run(
        self,
        length: np.ndarray | int,
        source: np.ndarray | int,
        work: Work,
        factor: np.ndarray | Tensor | float = 1.0,
        numbers: tuple[Any, ...] = (1, 0, 0, 1),
    ) -> None:
        """One segment per row, which continues the row's states unless `source` says otherwise; numbers as in `Program`."""
        B, shape = self.rows, self._shape
        steps = torch.empty((B, 11), dtype=torch.int64).numpy()
        scored = int(self.rule.scored)
        for i, column in enumerate((np.arange(B), np.arange(B), 0, length, source, 0, *numbers, scored)):
            steps[:, i] = column
        factors = torch.empty(B).numpy()
        factors[:] = factor
        left = steps[:, cpu_run.LENGTH] + 1
        block = max(1, int(steps[:, cpu_run.BLOCK].max(initial=1)))
        plan = KernelPlan(Program(np.arange(B + 1), steps, factors), left, int(left.sum()), shape.slots, block, 1, 0)
        # a quota, so that every item has states of its own; large enough to run it in one go
        quota = int(left.max(initial=1))
        threads, shape = threads_for(plan, shape), shape._replace(block=block)
        # reused, because a step of one token takes less time than allocating it
        if self._scratch_of != (threads, block):
            self._scratch, self._scratch_of = make_scratch(threads, shape), (threads, block)
            work = work._replace(scratch=self._scratch)
        run_plan(plan, threads, quota, shape, work)
