"""The recursion on plain tensors, without a model: shapes as in `a2sf.engine.state`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from a2sf.engine import kernels
from a2sf.engine.checks import check_state, check_tensors
from a2sf.engine.eviction import wants_gradient
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Options, Segments, remembered
from a2sf.errors import ConfigError, UserError
from a2sf.policies.arguments import policy_of, schedule_of
from a2sf.policies.base import Policy, check_name
from a2sf.policies.budget import Budget, growing
from a2sf.policies.model.softmax import PLAIN, Softmax
from a2sf.policies.prepared import Prepared
from a2sf.policies.rule import Rule
from a2sf.policies.schedule import Schedule, schedule_for


def attend(
    policy: Policy | type[Policy] | str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    budget: int | Tensor | Budget | None = None,
    schedule: Schedule | str | None = None,
    prompt: int | Tensor | None = None,
    lengths: Tensor | None = None,
    layer: int = 0,
    layers: int = 1,
    state: EvictionState | None = None,
    scale: float | None = None,
    backend: str = "auto",
    prepared: Sequence[Prepared | None] | None = None,
    softcap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> tuple[Tensor, EvictionState]:
    """Causal attention over a cache that `policy` prunes; a row's result never depends on the other rows.

    Args:
        policy: any policy; its name or class stands for one with its defaults.
        query: [B, H, T, D], any floating dtype.
        key: [B, K, T, D] and
        value: [B, K, T, V]; `H` is a multiple of `K` (grouped-query attention).
        budget: `C`, int or int tensor [B], or a `Budget` of tokens, or of a ratio of base `seen`, which grows with the
            tokens read, those of `state` included; None for a policy that ignores it.
        schedule: when tokens are evicted, a `Schedule` or its name; None: after every token, or after the prompt for a
            policy that knows no other.
        prompt: int or int tensor [B], tokens of each row's prompt; for the prompt schedule. It counts from the row's
            first token, also where `state` is given, and may lie beyond this call's tokens.
        lengths: int tensor [B], the rows' own lengths if they are right-padded; output past a row's length is 0.
        layer: the layer's number, from 0, for policies whose numbers differ by layer.
        layers: how many layers there are.
        state: continue from here; None: empty caches.
        scale: factor on the logits; default `D ** -0.5`.
        backend: `auto`, or the name of one of `a2sf.engine.kernels.BACKENDS`; only `reference` has gradients.
        prepared: of each row, what `policy.prepare` returned for its prompt; for a policy that prepares.
        softcap: a bound on the logits, as in Gemma 2: `x` becomes `softcap * tanh(x / softcap)`; None: there is none.
        learned_sinks: [H], one more logit in each query head's softmax, without key and value, as in GPT-OSS; None:
            there are none.

    Returns:
        output [B, H, T, V] in the query's dtype, and the state after each row's last token; `state.positions`
        [B, K, slots] are the retained positions in ascending order, -1 where a slot is empty.

    Raises:
        ConfigError: if a setting does not fit the policy, or the policy the layers and heads.
        ValueError: if shapes do not fit, a number is out of range, or the policy's function returns no priorities.
    """
    policy = policy_of(policy)
    check_name(type(policy))
    schedule = schedule_for(policy, schedule_of(schedule))
    _check_tokens(query, key, value)
    B, T = query.shape[0], query.shape[2]
    if not isinstance(layer, numbers.Integral) or not 0 <= layer < layers:
        raise ConfigError("layer", layer, f"give a number from 0 to {layers - 1}, the model has {layers} layers")
    policy.check(layers, key.shape[1])
    if budget is None and policy.uses_budget:
        raise ConfigError("budget", None, f"the policy {policy.name} needs a number of tokens, at least 1")
    if not policy.causal and state is not None:
        raise UserError(f"{policy.name} looks at later tokens, so it reads a whole sequence at once; give no state")
    if isinstance(budget, Budget):
        budget.check(layers)
    seen = budget if isinstance(budget, Budget) and budget.grows else None
    C = _per_row("budget", 1 if budget is None or seen is not None else _tokens(budget, layer), B, torch.int64)
    if bool((C < 1).any()):
        raise ConfigError("budget", int(C.min()), "give a whole number of tokens, at least 1")
    read = None
    if schedule.prompt:
        if prompt is None:
            raise ConfigError("prompt", None, "the prompt schedule needs each row's number of prompt tokens")
        read = _per_row("prompt", prompt, B, torch.int64)
        if bool((read < 1).any()):
            raise ConfigError("prompt", int(read.min()), "a prompt has at least 1 token")
    prompts = [None] * B if read is None else read.tolist()
    fits = read is None or (seen is None and bool((read <= C).all()))
    if prepared is None and policy.prepares and read is not None and (not fits or schedule.then != "keep"):
        raise ConfigError("prepared", None, f"the policy {policy.name} needs what its prepare returned for each prompt")
    ready = [None] * B if prepared is None else list(prepared)
    if len(ready) != B:
        raise ConfigError("prepared", f"{len(ready)} rows", f"give one for each of the {B} rows")
    rows = zip(C.tolist(), prompts, ready, strict=True)
    if seen is not None and policy.uses_budget:
        each = [growing(policy, seen, layers, schedule, n, p)[layer] for _, n, p in rows]
    else:
        each = [policy.keeps(c, layer, layers, n, p) for c, n, p in rows]
    segments = Segments.of_rows(BatchRetention.of(each, schedule, read), _lengths(lengths, B, T))
    softmax = Softmax.of(softcap, learned_sinks, query.shape[1], key.shape[1])
    return _run(query, key, value, segments, scale, state, backend, layer, layers, softmax)


def evicting_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    budget: int | Tensor,
    recent: int | Tensor,
    sinks: int | Tensor = 0,
    forgetting_factor: float | Tensor,
    scale: float | None = None,
    lengths: Tensor | None = None,
    state: EvictionState | None = None,
    backend: str = "auto",
    softcap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> tuple[Tensor, EvictionState]:
    """Causal attention over a cache that token pruning limits to `budget` tokens per KV head.

    It evicts by accumulated attention, outside of a recent window and sinks; `attend` runs any policy. The numbers may
    differ from row to row; a row's result never depends on the other rows.

    Args:
        query, key, value, scale, lengths, state, backend, softcap, learned_sinks: as in `attend`.
        budget: int, or int tensor [B]: tokens that a KV head holds, `C` of docs/semantics.md.
        recent: int, or int tensor [B]: newest tokens that are protected, `r`.
        sinks: int, or int tensor [B]: first tokens that are protected, `s`.
        forgetting_factor: float, or float tensor [B], in [0, 1].

    Returns:
        output [B, H, T, V] in the query's dtype, and the state after each row's last token.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.
    """
    _check_tokens(query, key, value)
    B, T = query.shape[0], query.shape[2]
    integers = {"budget": budget, "recent": recent, "sinks": sinks}
    C, r, s = (_per_row(n, x, B, torch.int64) for n, x in integers.items())
    factor = _per_row("forgetting_factor", forgetting_factor, B, torch.float64)
    if bool((C < 1).any() or (r < 0).any() or (s < 0).any() or (r + s > C).any()):
        raise ValueError("every row needs budget >= 1, recent >= 0, sinks >= 0 and recent + sinks <= budget")
    if not bool(((factor >= 0) & (factor <= 1)).all()):
        raise ValueError("every row's forgetting_factor must lie in [0, 1]")
    retention = BatchRetention(budget=C, recent=r, sinks=s, forgetting_factor=factor)
    segments = Segments.of_rows(retention, _lengths(lengths, B, T))
    softmax = Softmax.of(softcap, learned_sinks, query.shape[1], key.shape[1])
    return _run(query, key, value, segments, scale, state, backend, softmax=softmax)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    state: EvictionState | None,
    backend: str,
    layer: int = 0,
    layers: int = 1,
    softmax: Softmax = PLAIN,
) -> tuple[Tensor, EvictionState]:
    if state is not None:
        _check_state(state, query, key, value, segments.rule)
    if backend != "reference" and wants_gradient(query, key, value, state, softmax):
        raise ConfigError("backend", backend, "only reference has gradients; give it, or call under torch.no_grad()")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    options = Options(scale=factor, return_state=True, layer=layer, layers=layers, softmax=softmax)
    attended = kernels.attend(query, key, value, segments, options, state, backend=backend)
    assert attended.state is not None
    return attended.output, attended.state


def _tokens(budget: int | Tensor | Budget, layer: int) -> int | Tensor:
    """A budget as `attend` is given it, in tokens of a layer."""
    if not isinstance(budget, Budget):
        return budget
    if budget.ratio is not None:
        raise ConfigError("budget.ratio", budget.ratio, "attend takes a number of tokens, or a ratio of base seen")
    return budget.slots(total=0, context=0, layer=layer)


def _per_row(name: str, x: int | float | Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    integer = not dtype.is_floating_point
    try:
        given = torch.as_tensor(x, dtype=None if integer else dtype).cpu()
        fits = not integer or not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ConfigError(
            name, repr(x), f"give a {'whole ' if integer else ''}number, or a tensor of {rows}, one per row"
        )
    if given.ndim and given.shape != (rows,):
        raise ValueError(f"{name} must be one number or a tensor of {rows}, one per row; got {tuple(given.shape)}")
    return given.to(dtype).expand(rows).contiguous()


def _lengths(lengths: Tensor | None, rows: int, tokens: int) -> Tensor:
    length = _per_row("lengths", tokens if lengths is None else lengths, rows, torch.int64)
    if bool((length < 0).any() or (length > tokens).any()):
        raise ValueError(f"every row's length must lie between 0 and the {tokens} tokens given")
    return length


def _check_state(state: EvictionState, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> None:
    if (None if state.memory is None else state.memory.shape[-1]) != remembered(rule):
        raise ValueError(
            "the state was made by another policy: what it remembers per token differs; continue with the same one"
        )
    if (0 if state.queries is None else state.queries.shape[3]) != rule.queries:
        raise ValueError(
            "the state was made by another policy: of how many tokens it has the queries differs; continue with the same one"
        )
    check_state(state, len(query), key.shape[1], key.shape[-1], value.shape[-1], rule)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(name, kind, "give a tensor of a floating dtype, such as float32")
    check_tensors(query, key, value)
