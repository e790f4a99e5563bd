"""How a policy ranks the cached tokens: by data, or by one function of a step.

The unprotected token with the smallest priority is evicted (ties: the oldest first). Priorities of the form

    priority_j = b_j + m_j * A_j / N_j

are data, which the compiled kernels run. `A` is the sum of `phi(p)` over the steps so far; at every step it is first
multiplied by the forgetting factor. Any other priority is one function of a `Step`, in plain torch, for all rows and
heads.

Shapes: B rows, K key/value heads, G query heads per key/value head, N columns, T tokens, D key size, V value size, M
numbers that a policy stores for each token, W last tokens whose queries a policy requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, TypeAlias

from a2sf.policies.model.softmax import PLAIN, Softmax
from a2sf.policies.renamed import renamed_fields
from a2sf.whole_numbers import set_whole_numbers, whole_number

if TYPE_CHECKING:  # so that commands which only list policies do not load torch
    from torch import Tensor

    from a2sf.policies.model.rotary import Projection, Rotary


@dataclass(frozen=True)
class Step:
    """The state of the cache at one step: the newest token is cached and has attended, and nothing is evicted yet.

    Where a schedule evicts many tokens at once (the cut after a prompt, and `every`), the columns are exactly the cached
    tokens in the order of their positions, and there is one row. Only if the heads hold different numbers of tokens, the
    last columns of some heads are empty. At other steps the columns are in no particular order. A column without a token is
    False in `cached`, -1 in `positions` and 0 elsewhere. Floating-point tensors are float32, or float64 for float64 inputs.
    A priority function must not change any of them.

    Attributes:
        probabilities: [B, K, G, N], the attention of each query head to the cached tokens, with sum 1; less where the model
            has learned attention sinks.
        keys: [B, K, N, D], the cached keys.
        values: [B, K, N, V], the cached values.
        positions: int64 [B, K, N], the position of each token in its sequence, from 0.
        cached: bool [B, K, N], whether the column holds a token.
        now: int64 [B, 1, 1], the position of the newest token.
        scores: [B, K, N], accumulated attention `A`, this step included.
        memory: [B, K, N, M], the numbers that the policy stores for each token, this step included if it has a method
            `remember`; else those before this step, 0 for the newest token.
        queries: [B, K, G, W, D], the queries of the last `W` tokens, the newest last, if the policy asks for them
            (`queries = W`); else None. Where fewer tokens were read there are fewer, or the first ones are 0 (see
            `query_positions`).
        layer: number of the layer, from 0.
        layers: how many layers the model has.
        budget: int64 [B, K, 1], tokens that each KV head of this layer holds after the step, `C`.
        prompt: int64 [B, 1, 1], tokens of each row's prompt under the prompt schedule; else None.
        scale: what query · key is multiplied by before the softmax.
        rotary: its rotary embedding, if the policy asks for it (`unrotated = True`) and the model has one; else None.
        projection: the projection after the layer's attention, if the policy asks for it (`projected = True`) and there is a
            model; else None.
        evictable: bool [B, K, N], which tokens are not protected.
        softmax: what the model makes of logits (softcap, learned attention sinks): call it to compute attention from them.
        prepared: [B, K, N], the numbers that the policy prepared for the prompt's tokens, 0 for others; None: it has none.
    """

    probabilities: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    cached: Tensor
    now: Tensor
    scores: Tensor
    memory: Tensor
    queries: Tensor | None = None
    layer: int = 0
    layers: int = 1
    budget: Tensor | None = None
    prompt: Tensor | None = None
    scale: float = 1.0
    rotary: Rotary | None = None
    prepared: Tensor | None = None
    projection: Projection | None = None
    evictable: Tensor | None = None
    softmax: Softmax = PLAIN

    @property
    def ages(self) -> Tensor:
        """int64 [B, K, N], steps since each token was cached: 0 for the newest; without meaning where no token is cached."""
        return self.now - self.positions

    @property
    def query_positions(self) -> Tensor:
        """int64 [B, 1, 1, W], the position of each token in `queries`; negative where there is none."""
        import torch

        assert self.queries is not None, "the policy does not ask for queries (queries = W)"
        W = self.queries.shape[-2]
        return self.now[..., None] - torch.arange(W - 1, -1, -1, device=self.now.device)

    @property
    def attention(self) -> Tensor:
        """[B, K, G, W, N], the attention of each of `queries` to those cached tokens that are not after it.

        A query where no token was read has attention 0 to all.
        """
        assert self.queries is not None, "the policy does not ask for queries (queries = W)"
        logits = self.queries @ self.keys[:, :, None].transpose(-1, -2) * self.scale
        later = self.positions[:, :, None, None] > self.query_positions[..., None]
        hidden = later | ~self.cached[:, :, None, None]
        return self.softmax(logits, hidden).masked_fill(hidden, 0)

    @property
    def unrotated_keys(self) -> Tensor:
        """`keys` before the rotary embedding; as they are where no model's embedding is known (`rotary` is None)."""
        return self.keys if self.rotary is None else self.rotary.unrotate(self.keys, self.positions)

    @property
    def unrotated_queries(self) -> Tensor:
        """`queries` before the rotary embedding; as they are where no model's embedding is known (`rotary` is None)."""
        assert self.queries is not None, "the policy does not ask for queries (queries = W)"
        return self.queries if self.rotary is None else self.rotary.unrotate(self.queries, self.query_positions)


@dataclass(frozen=True)
class AttentionRows:
    """The attention of Q tokens that follow each other: of one token at a step, of many where a prompt is read in parts.

    Attributes:
        probabilities: [B, K, G, Q, N], the attention of each query head; 0 for later tokens, and where no token is cached.
        positions: int64 [B, K, N], of the cached tokens, -1 where no token is cached.
        now: int64 [B, 1, Q], the positions of the Q tokens.
        memory: [B, K, N, M], the numbers stored for each cached token before; 0 for those of the Q tokens.
    """

    probabilities: Tensor
    positions: Tensor
    now: Tensor
    memory: Tensor

    @property
    def seen(self) -> Tensor:
        """bool [B, K, Q, N], which columns hold a token that each of the Q tokens attends to."""
        positions = self.positions[:, :, None]
        return (positions >= 0) & (positions <= self.now[..., None])


@dataclass(frozen=True)
class Sequence:
    """All tokens of a sequence, which an oracle (a policy that is not causal) sees before the first step.

    Attributes:
        query: [B, K, G, T, D].
        key: [B, K, T, D].
        value: [B, K, T, V].
        lengths: int64 [B], the length of each row in tokens; the tokens after it are padding.
        scale: what query · key is multiplied by.
        softmax: what the model makes of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor
    scale: float
    softmax: Softmax = PLAIN


POOLINGS = ("mean", "max")
"""What a cut makes of the scores of neighbouring tokens."""
TokenFn: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""`(keys [..., D], values [..., V], positions [...]) -> [...]`: one number for each token, computed when it is cached."""
MergeFn: TypeAlias = "Callable[[Step, Tensor], Tensor | tuple[Tensor, Tensor]]"
MemoryFn: TypeAlias = "Callable[[AttentionRows], Tensor]"
PriorityFn: TypeAlias = "Callable[[Step], Tensor | tuple[Tensor, Tensor]]"
"""From a step to priorities [B, K, N], or to priorities and new memory [B, K, N, M]."""


@renamed_fields(pooled="kernel_size")
@dataclass(frozen=True)
class Cut:
    """How tokens are ranked at the single eviction after a prompt.

    Only the queries of the last `recent` prompt tokens add to `A`, and no query after the prompt. At the cut, the `A` of the
    tokens before them becomes its mean (or maximum) over neighbours. Then priorities are computed as at any other step.

    Attributes:
        kernel_size: how many neighbouring tokens are taken together, an odd number. Neighbours beyond the ends or among the
            last `recent` tokens count as 0.
        floor: None: every head retains `C` tokens. A number from 0 to 1: the slots of a layer beside the protected tokens
            are divided among its heads. A head gets `(1 - floor) * won + floor * equal` slots: `won` counts the layer's best
            tokens that are this head's, `equal` is an equal share (docs/semantics.md). 1 is the same as None.
        pooling: `mean` or `max`, over the neighbours.

    Raises:
        ValueError: if a number is out of range.
    """

    kernel_size: int = 1
    floor: float | None = None
    pooling: str = "mean"

    def __post_init__(self) -> None:
        set_whole_numbers(self, "kernel_size")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number of neighbours, at least 1, got {self.kernel_size}")
        if self.floor is not None and not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling}")


@renamed_fields(by_age="mean_over_age")
@dataclass(frozen=True, kw_only=True)
class Head:
    """The settings of one key/value head of a layer, where heads differ.

    Attributes:
        share: weight of this head when the slots of the layer are divided (see `head_slots`).
        forgetting_factor: `a`, from 0 to 1.
        recent_share: share of the head's budget for the newest tokens, rounded down.
        sinks: how many of the first tokens are never evicted; they come before the newest ones.
        mean_over_age: as in `Rule`.

    Raises:
        ValueError: if `sinks` is not whole.
    """

    share: float = 1.0
    forgetting_factor: float = 1.0
    recent_share: float = 0.0
    sinks: int = 0
    mean_over_age: bool = False

    def __post_init__(self) -> None:
        set_whole_numbers(self, "sinks")


@dataclass(frozen=True, eq=False)
class Recording:
    """What another run of the same tokens evicted, so that the same is evicted again: equal only to itself.

    Attributes:
        evicted_at: int64 [K, T], the step after which each key/value head evicts each position; T or more: never. No
            position is evicted before its own step.
    """

    evicted_at: Tensor

    def evicted(self, step: Step) -> Tensor:
        """bool [B, K, N], the cached tokens that are evicted at a step.

        Raises:
            ValueError: if the layer has another number of heads, or a token is later than the last one of the recording.
        """
        heads, tokens = self.evicted_at.shape
        if step.positions.shape[1] != heads:
            raise ValueError(f"the recording has {heads} key/value heads, and the layer {step.positions.shape[1]}")
        if bool((step.now >= tokens).any()):
            raise ValueError(f"the recording ends after {tokens} tokens, and more are read")
        known = self.evicted_at.to(step.positions.device).expand(len(step.positions), -1, -1)
        return step.cached & (known.gather(2, step.positions.clamp(min=0)) <= step.now)


@renamed_fields(
    counted="count_above_uniform",
    by_age="mean_over_age",
    whole="full_heads",
    own="priority_fn",
    foresee="precompute",
)
@dataclass(frozen=True, kw_only=True)
class Rule:
    """How priorities are computed at a step. The default is accumulated attention, `A`.

    Attributes:
        scored: whether `A` is used; False is `m = 0`.
        count_above_uniform: `phi(p)` is 1 where `p >= 1/n` with `n` cached tokens, else 0. The default is `phi(p) = p`.
        mean_over_age: `N_j` is the sum of `a^i` for `i` from 0 to the token's age, so that `A / N` is a mean. The default is
            `N_j = 1`.
        weight: `m`; the default is 1.
        bias: `b`; the default is 0.
        shared: all key/value heads of a layer retain the same tokens: priorities are averaged over the heads.
        cut: how tokens are ranked at the eviction after a prompt, if it differs from other steps.
        full_heads: key/value heads that evict nothing.
        heads: one entry for each key/value head of the layer, where heads differ. They replace the retention's `recent`,
            `sinks` and `forgetting_factor`, and `mean_over_age`. The number of slots of the layer is the same.
        priority_fn: a function that computes the priorities; then `weight`, `bias` and `mean_over_age` are not used. At a
            cut, the `scores` in its `Step` are the averaged ones.
        memory: how many numbers `priority_fn` stores for each token, `M`.
        memory_fn: from rows of attention to the memory after them, [B, K, N, M]. It is called before `priority_fn`, which
            then sees the new memory and returns priorities alone. Where there is none, `priority_fn` returns the memory.
        precompute: only for an oracle: from all tokens (`Sequence`) to numbers for each token, [B, K, T, M].
        recording: what is evicted at each step, whatever the budget; then nothing is ranked.
        queries: of how many last tokens the functions see the queries, `W`.
        unrotated: whether they need the model's rotary embedding.
        projected: whether they need the projection after the attention.
        merge_fn: a function that changes values (and keys) of the tokens that stay when others are evicted. It gets the step
            and which tokens are evicted, bool [B, K, N], and returns all values, or values and keys. `weight` and `bias` are
            then computed anew.
        threshold: tokens of at least this priority stay, although the budget is exceeded: the budget is then the number of
            tokens that are cached at least. With a budget of `recent + sinks` it decides alone.
        division_fn: a function of the step at a cut with a `floor`: the priorities by which the layer's slots are divided
            among its heads. The default are those by which tokens are ranked.

    Raises:
        ValueError: if fields contradict each other: `full_heads` with `shared` or with a cut's `floor`; `shared` with a
            cut's `floor`; `heads` with `shared`, `full_heads`, `mean_over_age`, `cut` or a function; `shared` with
            `merge_fn`; `division_fn` without a cut's `floor`; `recording` with anything that
            ranks; `memory_fn` without `memory` or `priority_fn`, or with `precompute`; `threshold` with `heads`,
            `full_heads` or a cut's floor, or one that is no finite number; a number that is not whole; a head of
            `full_heads` that is negative or comes twice.
    """

    scored: bool = True
    count_above_uniform: bool = False
    mean_over_age: bool = False
    shared: bool = False
    weight: TokenFn | None = None
    bias: TokenFn | None = None
    cut: Cut | None = None
    full_heads: tuple[int, ...] = ()
    heads: tuple[Head, ...] = ()
    priority_fn: PriorityFn | None = None
    memory: int = 0
    memory_fn: MemoryFn | None = None
    precompute: Callable[[Sequence], Tensor] | None = None
    recording: Recording | None = None
    queries: int = 0
    unrotated: bool = False
    projected: bool = False
    merge_fn: MergeFn | None = None
    division_fn: PriorityFn | None = None
    threshold: float | None = None

    @property
    def calls(self) -> bool:
        """Whether it has a function of a step."""
        return any(f is not None for f in (self.priority_fn, self.merge_fn, self.division_fn))

    def __post_init__(self) -> None:
        set_whole_numbers(self, "memory", "queries")
        object.__setattr__(self, "full_heads", tuple(whole_number("a head of full_heads", h) for h in self.full_heads))
        if min(self.full_heads, default=0) < 0:
            raise ValueError(f"full_heads counts key/value heads from 0, got {min(self.full_heads)}")
        if len(set(self.full_heads)) < len(self.full_heads):
            raise ValueError(f"full_heads has a key/value head twice, {self.full_heads}")
        divided = self.cut is not None and self.cut.floor is not None
        if self.full_heads and (self.shared or divided):
            raise ValueError("full_heads cannot be combined with shared or with a cut's floor")
        if self.shared and divided:
            raise ValueError("shared cannot be combined with a cut's floor")
        if self.heads and (self.shared or self.full_heads or self.mean_over_age or self.cut is not None or self.calls):
            raise ValueError("heads cannot be combined with shared, full_heads, mean_over_age, cut or a function")
        if self.division_fn is not None and not divided:
            raise ValueError("division_fn needs a cut with a floor")
        if self.threshold is not None and (self.heads or self.full_heads or divided or not isfinite(self.threshold)):
            raise ValueError("threshold is a finite number, not combined with heads, full_heads or a cut's floor")
        if self.memory_fn is not None and (not self.memory or self.priority_fn is None or self.precompute is not None):
            raise ValueError("memory_fn needs memory and priority_fn, and cannot be combined with precompute")
        if self.shared and self.merge_fn is not None:
            raise ValueError("shared cannot be combined with merge_fn, which merges the values of each head by itself")
        if self.recording is not None and replace(self, recording=None) != Rule(scored=False):
            raise ValueError("a recording ranks nothing: combine it with scored=False alone")


ACCUMULATED = Rule()
"""Accumulated attention: the rule of A2SF and H2O."""
