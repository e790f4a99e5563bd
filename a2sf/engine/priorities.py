"""What a step adds to the scores, the priorities that a rule makes of them, and the tokens of the smallest priorities.

Columns are slots in any order. B rows, K key/value heads, N columns; `retention` is `BatchRetention.per_head`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import LATE, Options
from a2sf.errors import PolicyError, UserError, definition, first_line, place
from a2sf.policies.ranking import data_priorities, of_columns
from a2sf.policies.rule import AttentionRows, Rule, Step, TokenFn

SHARE = 1 - 1e-5
"""`p * n` from which a token counts as above uniform attention: 1, but for the rounding of equal shares."""


def added_scores(rule: Rule, probabilities: Tensor, count: Tensor) -> Tensor:
    """What a step adds to `A`, [B, K, N]: the sum of `phi(p)` over the group [B, K, G, N], with `count` cached tokens."""
    if not rule.count_above_uniform:
        return probabilities.sum(2)
    # an uncached column has p = 0
    return (probabilities * count[..., None] >= SHARE).to(probabilities.dtype).sum(2)


def rule_priorities(retention: BatchRetention, step: Step, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`b + m * A / N` of every column, [B, K, N]; `weight` and `bias` are `m` and `b`."""
    rule = retention.rule
    return averaged_over_heads(rule, data_priorities(rule, step, retention.forgetting_factor, weight, bias))


def averaged_over_heads(rule: Rule, priority: Tensor) -> Tensor:
    """The same priorities for all KV heads of a row, where the rule shares one set of tokens."""
    return priority.mean(1, keepdim=True).expand_as(priority) if rule.shared else priority


def pooled_scores(retention: BatchRetention, step: Step, free: Tensor) -> Tensor:
    """Scores at the prompt's cut, [B, K, N]: the mean or maximum of neighbours for `free` tokens, the others unchanged."""
    cut = retention.rule.cut
    assert cut is not None
    pool = torch.nn.functional.max_pool1d if cut.pooling == "max" else torch.nn.functional.avg_pool1d
    order = step.positions.where(step.cached, LATE).argsort(-1)
    alone = step.scores.where(free, 0).gather(2, order)
    taken = pool(alone, cut.kernel_size, stride=1, padding=cut.kernel_size // 2)
    return torch.empty_like(taken).scatter_(2, order, taken).where(free, step.scores)


def function_priorities(retention: BatchRetention, step: Step, free: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Priorities [B, K, N] and memory [B, K, N, M] by a rule's `priority_fn`, which is called where it has an effect.

    Where many tokens are evicted at once, it sees one row alone, and of it the cached tokens in their order.

    Args:
        excess: int64 [B, K, 1], how many tokens of each head are evicted.

    Raises:
        PolicyError: as `_call_priority_fn`.
    """
    rule, memory = retention.rule, step.memory
    priority = torch.zeros_like(step.scores)
    wanted = ((excess > 0).any(1, keepdim=True) | retention.updates_memory(step.now))[:, 0, 0]
    if not bool(wanted.any()):
        return priority, memory
    many = retention.evicts_many(excess, step.now)[:, 0, 0]
    if not bool(many.any()):
        return _call_priority_fn(rule, step, free)
    memory = memory.clone()
    others = (~many).nonzero()[:, 0]
    if bool(wanted[others].any()):
        priority[others], memory[others] = _call_priority_fn(rule, step_of_rows(step, others), free[others])
    for row in (many & wanted).nonzero()[:, 0].tolist():
        one, order = step_by_position(step_of_rows(step, slice(row, row + 1)))
        ranks, stored = _call_priority_fn(rule, one, free[row : row + 1].gather(2, order))
        priority[row].scatter_(1, order[0], ranks[0])
        memory[row].scatter_(1, order[0, :, :, None].expand_as(stored[0]), stored[0])
    return priority, memory


def merged(retention: BatchRetention, step: Step, out: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, K, N, D] and values [B, K, N, V] once the tokens `out` bool [B, K, N] are merged by a rule's `merge_fn`.

    It is called as in `function_priorities`; tokens that are evicted, and rows that evict none, are unchanged.

    Raises:
        PolicyError: if the function fails, returns another shape or NaN, or changes a tensor of the step.
    """
    assert retention.rule.merge_fn is not None
    keys, values = step.keys.clone(), step.values.clone()
    wanted = out.any(-1).any(1)
    many = retention.evicts_many(out.sum(-1, keepdim=True), step.now)[:, 0, 0]
    rows = (wanted & ~many).nonzero()[:, 0]
    if len(rows):
        stays = (step.cached & ~out)[rows][..., None]
        new = _call_merge_fn(retention.rule.merge_fn, step_of_rows(step, rows), out[rows])
        keys[rows], values[rows] = (x.where(stays, old[rows]) for x, old in zip(new, (keys, values), strict=True))
    for row in (wanted & many).nonzero()[:, 0].tolist():
        one, order = step_by_position(step_of_rows(step, slice(row, row + 1)))
        evicted = out[row : row + 1].gather(2, order)
        stays = (one.cached & ~evicted)[..., None]
        new = _call_merge_fn(retention.rule.merge_fn, one, evicted)
        for x, old, was in zip(new, (keys, values), (one.keys, one.values), strict=True):
            old[row].scatter_(1, order[0, :, :, None].expand_as(was[0]), x.where(stays, was)[0])
    return keys, values


def token_numbers(rule: Rule, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`m` and `b` of a rule for tokens, each [B, K, N]; None where the rule has none.

    Args:
        keys: [B, K, N, D].
        values: [B, K, N, V].
        positions: int64 [B, K, N], negative where a column holds no token: what the rule says of it does not count.

    Raises:
        PolicyError: if one of its functions fails, returns no number for each token, or NaN for one.
    """
    shown = keys, values, positions
    return _of_tokens("weights", rule.weight, *shown), _of_tokens("biases", rule.bias, *shown)


def _of_tokens(what: str, function: TokenFn | None, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor | None:
    if function is None:
        return None
    given: Any = call_policy(function, keys, values, positions)
    try:
        numbers: Tensor = given.expand(positions.shape)
    except (AttributeError, RuntimeError) as error:
        name, where = name_and_place(function)
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        need = f"{tuple(positions.shape)} is needed, one number per token"
        raise PolicyError(f"{name} returns {what} of shape {got}, and {need}{where}") from error
    _refuse_nan(function, what, numbers, positions >= 0)
    return numbers


def _call_merge_fn(function: Callable[..., Any], step: Step, evicted: Tensor) -> tuple[Tensor, Tensor]:
    given = _unchanged(function, step, evicted)
    values, keys = given if isinstance(given, tuple) else (given, step.keys)
    used = (step.cached & ~evicted)[..., None]
    values = _checked(function, "values", values, step.values, used)
    return _checked(function, "keys", keys, step.keys, used), values


def step_fields(retention: BatchRetention, options: Options, positions: Tensor) -> dict[str, Any]:
    """The fields of a `Step` that follow from the layer, the retention and the tokens at `positions` [B, K, N], by name."""
    known: dict[str, Any] = {
        name: getattr(options, name) for name in ("layer", "layers", "scale", "softmax", "rotary", "projection")
    }
    if retention.prepared is not None:
        real = (positions >= 0) & (positions < retention.prepared.shape[-1])
        known["prepared"] = retention.prepared.gather(2, positions.where(real, 0)).where(real, 0)
    return known | {"budget": retention.budget, "prompt": retention.prompt}


def step_of_rows(step: Step, rows: Tensor | slice) -> Step:
    """The rows `rows` [B'] of a step; views for a slice."""
    of_rows: dict[str, Any] = {name: x[rows] for name, x in _tensors(step).items()}
    return replace(step, **of_rows)


def step_by_position(step: Step) -> tuple[Step, Tensor]:
    """A step of one row with its cached tokens sorted by position, and the columns [1, K, n] that they had in `step`."""
    n = max(1, int(step.cached.sum(-1).max()))
    positions = step.positions.where(step.cached, LATE)
    sorted_already = bool((positions[..., 1:] >= positions[..., :-1]).all())  # as in any state
    order = torch.arange(n, device=positions.device).expand(*positions.shape[:2], n)
    if not sorted_already:
        order = positions.argsort(-1)[..., :n]
    queries = step.queries
    if queries is not None:
        read = min(queries.shape[3], int(step.now) + 1)
        queries = queries[:, :, :, queries.shape[3] - read :]
    names = ("keys", "values", "memory", "positions", "cached", "scores", "prepared")
    columns = {name: x for name in names if (x := getattr(step, name)) is not None}
    if sorted_already:
        columns = {name: x[:, :, :n].contiguous() for name, x in columns.items()}
        probabilities = step.probabilities[..., :n].contiguous()
    else:
        columns = {name: of_columns(x, order) for name, x in columns.items()}
        probabilities = of_columns(step.probabilities.transpose(2, 3), order).transpose(2, 3).contiguous()
    return replace(step, probabilities=probabilities, queries=queries, **columns), order


def _tensors(step: Step | AttentionRows) -> dict[str, Tensor]:
    return {f.name: x for f in fields(step) if isinstance(x := getattr(step, f.name), Tensor)}


def name_and_place(function: Callable[..., Any]) -> tuple[str, str]:
    """The name of a policy's function, and " (file:line)" where it is defined ("" if unknown), for an error message."""
    function = getattr(function, "of", function)  # the opposite of a rule is one too
    where = definition(function)
    # an object that is called has the name of its class
    return getattr(function, "__qualname__", type(function).__qualname__), f" ({where})" if where else ""


def call_policy(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a policy's own function returns.

    Raises:
        PolicyError: if it fails; the message says where.
    """
    try:
        return function(*arguments)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        at = place(error)
        raise PolicyError(
            f"{name_and_place(function)[0]} fails: {type(error).__name__}: {first_line(error)}{f' ({at})' if at else ''}"
        ) from error


def _call_priority_fn(rule: Rule, step: Step, free: Tensor) -> tuple[Tensor, Tensor]:
    """Priorities and memory of all rows of a step by a rule's `memory_fn`, if it has one, and its `priority_fn`.

    Raises:
        PolicyError: if it fails, returns another shape or NaN, or changes a tensor of the step.
    """
    assert rule.priority_fn is not None
    if rule.memory_fn is not None:
        newest = AttentionRows(step.probabilities[:, :, :, None], step.positions, step.now, step.memory)
        step = replace(step, memory=memory_after(rule, newest))
    given = _unchanged(rule.priority_fn, replace(step, evictable=free))
    priority, memory = given if isinstance(given, tuple) else (given, step.memory)
    cached = step.cached[..., None]
    priority = _checked(rule.priority_fn, "priorities", priority, step.scores, free)
    if memory is step.memory:
        return averaged_over_heads(rule, priority), memory
    memory = _checked(rule.priority_fn, "memory", memory, step.memory, cached)
    return averaged_over_heads(rule, priority), memory.where(cached, 0)


def memory_after(rule: Rule, rows: AttentionRows) -> Tensor:
    """The memory [B, K, N, M] after `rows` by a rule's `memory_fn`, 0 where no token is cached.

    Raises:
        PolicyError: as `_call_priority_fn`.
    """
    assert rule.memory_fn is not None
    cached = (rows.positions >= 0)[..., None]
    given = _unchanged(rule.memory_fn, rows)
    return _checked(rule.memory_fn, "memory", given, rows.memory, cached).where(cached, 0)


def _unchanged(function: Callable[..., Any], step: Step | AttentionRows, *more: Tensor) -> Any:
    """What a policy's own function returns for a step; it may not write into the step's tensors.

    Raises:
        PolicyError: if it fails, or changes a tensor of the step.
    """
    shown = {n: x for n, x in _tensors(step).items() if not x.is_inference()}
    before = {n: x._version for n, x in shown.items()}
    given = call_policy(function, step, *more)
    if changed := [n for n, x in shown.items() if x._version != before[n]]:
        name, where = name_and_place(function)
        raise PolicyError(
            f"{name} changes the step's {', '.join(changed)} in place, and must not; work on a copy{where}"
        )
    return given


def _checked(function: Callable[..., Any], what: str, given: Any, like: Tensor, used: Tensor) -> Tensor:
    """What a policy's own function returned (`what`), in the dtype of `like`.

    Args:
        like: the tensor of the step whose shape it must have.
        used: bool, broadcast to that shape; NaN is allowed where it is False.

    Raises:
        PolicyError: if it has another shape than `like`, or NaN where it is used.
    """
    got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if got != tuple(like.shape):
        name, where = name_and_place(function)
        raise PolicyError(
            f"{name} returns {what} of shape {got}, and {tuple(like.shape)} is needed, as the step's tensors{where}"
        )
    _refuse_nan(function, what, given, used)
    return given.to(like.dtype)


def _refuse_nan(function: Callable[..., Any], what: str, given: Tensor, used: Tensor) -> None:
    if bool((given.isnan() & used).any()):
        name, where = name_and_place(function)
        raise PolicyError(f"{name} returns NaN among its {what} of cached tokens; give each of them a number{where}")


def smallest(priority: Tensor, positions: Tensor, free: Tensor, n: Tensor) -> Tensor:
    """bool [..., N]: the `n` [..., 1] free columns with the smallest priorities; ties: the oldest first."""
    order = positions.argsort(dim=-1, stable=True)
    order = order.gather(-1, priority.gather(-1, order).argsort(dim=-1, stable=True))
    order = order.gather(-1, (~free).int().gather(-1, order).argsort(dim=-1, stable=True))
    chosen = torch.arange(priority.shape[-1], device=n.device) < n
    return torch.zeros_like(free).scatter_(-1, order, chosen.expand_as(order)) & free


def to_evict(rule: Rule, priority: Tensor, positions: Tensor, free: Tensor, excess: Tensor) -> Tensor:
    """bool [B, K, N]: the `free` tokens that are evicted, `excess` [B, K, 1] of each head or fewer with a threshold."""
    out = smallest(priority, positions, free, excess)
    return out if rule.threshold is None else out & (priority < rule.threshold)


def to_evict_across_heads(retention: BatchRetention, priority: Tensor, step: Step, free: Tensor) -> Tensor:
    """bool [B, K, N]: the `free` tokens that are evicted at a cut which divides a layer's slots among its heads.

    A head retains as many of its best tokens as a mix of two shares says: how many of the layer's best tokens are its own,
    and how many each head would retain if all had the same.
    """
    rule = retention.rule
    assert rule.cut is not None
    assert rule.cut.floor is not None
    by = priority
    if rule.division_fn is not None:
        excess = retention.excess(step.cached.sum(-1, keepdim=True), step.now).where(retention.at_cut(step.now), 0)
        dividing = replace(retention, rule=replace(rule, priority_fn=rule.division_fn, memory=0, memory_fn=None))
        by, _ = function_priorities(dividing, replace(step, memory=step.memory[..., :0]), free, excess)
    K, N = free.shape[1:]
    count, evictable = step.cached.sum(-1), free.sum(-1)  # [B, K]
    equal = (torch.minimum(count, retention.budget[..., 0]) - (count - evictable)).clamp(min=0)
    # ties: the newest is the better one, then that of the lower head
    age = step.positions * K + torch.arange(K - 1, -1, -1, device=free.device)[:, None]
    over = (evictable.sum(1) - equal.sum(1))[:, None]
    ranks, ages, candidates = (x.flatten(1) for x in (by, age, free))
    evicted = smallest(ranks, ages, candidates, over).unflatten(1, (K, N)).sum(-1)
    # in units of 1 / `denominator`: exact, as 0.7 is in decimal
    floor = Fraction(str(rule.cut.floor)).limit_denominator(10**9)
    numerator, denominator = floor.numerator, floor.denominator
    mixed = (denominator - numerator) * (evictable - evicted) + numerator * equal
    share, rest = mixed // denominator, mixed % denominator
    best = rest.argsort(dim=-1, descending=True, stable=True)
    more = torch.arange(K, device=free.device) < (equal - share).sum(1, keepdim=True)
    share = share + torch.zeros_like(share).scatter_(1, best, more.long())
    return smallest(priority, step.positions, free, (evictable - share)[..., None])
