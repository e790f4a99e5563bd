"""In torch: the priorities of a rule that is data, of any policy at a step; tokens in another order; sums over pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from a2sf.policies.rule import Rule, Step


def terms(factor: Tensor, ages: Tensor) -> Tensor:
    """`N`, the sum of `factor ** i` for `i` from 0 to each age; 1 for a negative age."""
    n = (ages + 1).clamp(min=1)
    geometric = -torch.expm1(n * factor.log()) / (1 - factor)
    return torch.where(factor < 1, geometric, n.to(factor.dtype))


def data_priorities(
    rule: Rule, step: Step, factor: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`b + m * A / N` of every column, [B, K, N].

    Args:
        factor: the forgetting factor, of the scores' dtype; it broadcasts with [B, K, N].
        weight: `m` [B, K, N]; None for 1.
        bias: `b` [B, K, N]; None for 0.
    """
    priority = step.scores
    if rule.mean_over_age:
        priority = priority / terms(factor, step.ages)
    if weight is not None:
        priority = priority * weight
    return priority if bias is None else priority + bias


@dataclass(frozen=True)
class Ranking:
    """How a policy ranks tokens at a step, whatever its budget.

    Attributes:
        rule: the policy's rule, with its `priorities` as `priority_fn` if it has them.
        forgetting_factor: `a`.
    """

    rule: Rule
    forgetting_factor: float

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        """Priorities [B, K, N] and memory [B, K, N, M]."""
        rule, memory = self.rule, step.memory
        if rule.priority_fn is not None:
            given = rule.priority_fn(step)
            priority, memory = given if isinstance(given, tuple) else (given, memory)
        else:
            tokens = step.keys, step.values, step.positions
            weight, bias = (None if f is None else f(*tokens) for f in (rule.weight, rule.bias))
            priority = data_priorities(rule, step, step.scores.new_tensor(self.forgetting_factor), weight, bias)
        return (priority.mean(1, keepdim=True).expand_as(priority) if rule.shared else priority), memory


def chunk_sums(numbers: Tensor, positions: Tensor, size: int) -> Tensor:
    """For each token, the sum of `numbers` over the cached tokens of its chunk: positions 0 to `size - 1`, and so on.

    Args:
        numbers: [B, K, N], 0 where no token is cached.
        positions: int64 [B, K, N], -1 where no token is cached.
        size: tokens of a chunk.

    Returns:
        [B, K, N], without meaning where no token is cached.
    """
    chunk = positions.clamp(min=0) // size
    sums = numbers.new_zeros(*numbers.shape[:2], int(chunk.max()) + 1)
    return sums.scatter_add_(2, chunk, numbers).gather(2, chunk)


def of_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Some tokens of each head: `x` [B, K, N, ...] at `columns` int64 [B, K, n], as [B, K, n, ...].

    The same as `gather`, which reads keys and values number by number, and so takes about eight times as long on a CPU.
    """
    if x.ndim == 3:
        return x.gather(2, columns)
    B, K, N = x.shape[:3]
    first = torch.arange(B * K, device=x.device).view(B, K, 1) * N
    return x.flatten(0, 2).index_select(0, (columns + first).flatten()).view(*columns.shape, *x.shape[3:])
