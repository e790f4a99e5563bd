"""How a policy ranks the cached tokens: as data, or as one function of what a step shows.

The unprotected token of the smallest priority goes, of equals the oldest. What can be said as

    priority_j = b_j + m_j * A_j / N_j

is data, which the compiled kernels run: `A` is the accumulated `phi(p)`, forgotten by the forgetting factor at every step.
Anything else is one function from a `Step` to priorities in plain torch, over all rows and heads at once.
Shapes: B rows, K key/value heads, G query heads per key/value head, N columns, T tokens, D key size, V value size, M numbers
that a policy keeps per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # what only needs names loads no torch
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What one step shows: the newest token is cached and has attended, and nothing has been evicted yet.

    Columns are in no particular order; one that holds no token is False in `cached`, -1 in `positions` and 0 elsewhere.
    Floating tensors are float32, or float64 for float64 inputs. A rule only looks: it must not change any of them.

    Attributes:
        probabilities: [B, K, G, N], each query head's attention to the cached tokens, sum 1.
        keys: [B, K, N, D] and
        values: [B, K, N, V].
        positions: int64 [B, K, N].
        cached: bool [B, K, N].
        now: int64 [B, 1, 1], the newest token's position.
        scores: [B, K, N], accumulated attention `A`, this step's included.
        memory: [B, K, N, M], what the rule keeps per token; 0 for the newest token.
    """

    probabilities: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    cached: Tensor
    now: Tensor
    scores: Tensor
    memory: Tensor

    @property
    def ages(self) -> Tensor:
        """int64 [B, K, N], steps since each token entered: 0 for the newest, meaningless where nothing is cached."""
        return self.now - self.positions


@dataclass(frozen=True)
class Sequence:
    """A whole sequence, as a policy that is not causal sees it beforehand.

    Attributes:
        query: [B, K, G, T, D], key: [B, K, T, D], value: [B, K, T, V].
        lengths: int64 [B], the rows' own lengths; what is beyond is padding.
        scale: factor of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor
    scale: float


Fixed: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
"""`(keys [..., D], values [..., V], positions [...]) -> [...]`: a number that is fixed when a token enters."""
Own: TypeAlias = "Callable[[Step], Tensor | tuple[Tensor, Tensor]]"
"""A step to priorities [B, K, N], or to those and new memory [B, K, N, M]."""


@dataclass(frozen=True)
class Cut:
    """What is particular about the one cut after a prompt.

    Only the queries of the last `recent` prompt tokens add to `A` (and none after the prompt); at the cut the `A` of the
    tokens before them is averaged over neighbours, and takes the place of their `A`. The rule's priorities rank the tokens
    at the cut as at any step.

    Attributes:
        pooled: neighbours that the average is over, odd; those beyond the ends and in the window count as 0.
        floor: None: every head keeps `C`. Else how a layer's slots beside the protected tokens are divided among its heads:
            a head gets `(1 - floor) * won + floor * equal` of them, where `won` is how many of the layer's best tokens are
            its own and `equal` is an equal share (docs/semantics.md); from 0 to 1, and 1 comes to None.

    Raises:
        ValueError: if a number is out of range.
    """

    pooled: int = 1
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.pooled < 1 or self.pooled % 2 == 0:
            raise ValueError(f"pooled must be an odd number of neighbours, at least 1, got {self.pooled}")
        if self.floor is not None and not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")


@dataclass(frozen=True, kw_only=True)
class Head:
    """What one key/value head of a layer keeps, where heads have numbers of their own.

    Attributes:
        share: its part of the layer's slots, relative to the other heads' (see `head_slots`).
        forgetting_factor: `a`.
        recent_share: share of its own budget that the newest tokens take, rounded down.
        sinks: how many of the first tokens it never evicts; they come before recent ones.
        by_age: as in `Rule`.
    """

    share: float = 1.0
    forgetting_factor: float = 1.0
    recent_share: float = 0.0
    sinks: int = 0
    by_age: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a step makes priorities. The default is accumulated attention, `A`.

    Attributes:
        scored: whether `A` is looked at; False is `m = 0`.
        counted: `phi(p)` is 1 where `p >= 1/n`, `n` the number of cached tokens, else 0; by default it is `p`.
        by_age: `N_j` is the sum of `a^i` for `i` from 0 to the token's age, so that `A / N` is a mean; by default 1.
        weight, bias: `m` and `b`; by default 1 and 0.
        shared: one kept set for the layer: priorities are averaged over its key/value heads.
        cut: for rules that look at the end of a prompt.
        whole: key/value heads that keep everything.
        heads: one entry for each key/value head of the layer, where they have numbers of their own: these take the place of
            the retention's `recent`, `sinks`, `forgetting_factor` and of `by_age`; the layer's slots are as many as before.
        own: priorities by a function instead; `weight`, `bias` and `by_age` are not used. At a cut the `scores` that it
            is shown are the averaged ones.
        memory: numbers that `own` keeps per token, `M`.
        foresee: only where a policy is not causal: what it knows of each token beforehand, a `Sequence` to [B, K, T, M].

    Raises:
        ValueError: if some heads are to keep everything, and all heads one set or slots of each other; if all heads are to
            keep one set and to give each other slots; or if heads have numbers of their own and are to share or shift
            something, or are ranked by a function.
    """

    scored: bool = True
    counted: bool = False
    by_age: bool = False
    shared: bool = False
    weight: Fixed | None = None
    bias: Fixed | None = None
    cut: Cut | None = None
    whole: tuple[int, ...] = ()
    heads: tuple[Head, ...] = ()
    own: Own | None = None
    memory: int = 0
    foresee: Callable[[Sequence], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.whole and (self.shared or (self.cut is not None and self.cut.floor is not None)):
            raise ValueError(
                "heads that keep everything (whole) neither share a kept set nor give slots to other heads"
            )
        if self.shared and self.cut is not None and self.cut.floor is not None:
            raise ValueError("heads that share one kept set (shared) do not give slots to each other (a cut's floor)")
        if self.heads and (self.shared or self.whole or self.by_age or self.cut is not None or self.own is not None):
            raise ValueError(
                "heads with numbers of their own (heads) go with neither shared, whole, by_age, cut nor own"
            )


ACCUMULATED = Rule()
"""The rule of A2SF and H2O."""
