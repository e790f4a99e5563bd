"""What a policy finds out about a prompt by reading it before it is cut: numbers for its tokens, shares of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeVar

from a2sf.policies.model.softmax import PLAIN, Softmax

if TYPE_CHECKING:  # so that commands which only list policies do not load torch
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerRead:
    """What one layer computed while a text of T tokens was read with the full cache.

    Attributes:
        layer: its number, from 0.
        query: [K, G, T, D].
        key: [K, T, D].
        value: [K, T, V]; query, key and value in float32 or better.
        scale: what query · key is multiplied by.
        hidden: [T, hidden size], what the projections of the layer's attention read, so after a norm that comes before them;
            in the model's dtype. None unless the policy states `hidden_states = True`.
        softmax: what the model makes of the logits (softcap, learned attention sinks).
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    hidden: Tensor | None = None
    softmax: Softmax = PLAIN

    def attention(self, first: int, last: int | None = None) -> Tensor:
        """The attention of the tokens `[first, last)` to all tokens, [K, G, last - first, T]; later tokens get 0."""
        import torch

        logits = self.query[:, :, first:last] @ self.key[:, None].transpose(-1, -2) * self.scale
        at = torch.arange(self.key.shape[1], device=logits.device)
        return self.softmax(logits, at > at[first:last, None])


class Reader(Protocol):
    """A model that a policy can read texts with."""

    @property
    def layers(self) -> int:
        """How many layers it has."""
        ...

    def read(self, tokens: Sequence[int], look: Callable[[LayerRead], T]) -> list[T]:
        """Read a text with the full cache, and return what `look` makes of each layer."""
        ...


@dataclass(frozen=True, eq=False)
class Numbers:
    """One number for each token of a prompt and each key/value head of a layer: `of` [K, T]."""

    of: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `Policy.conclude` or `Policy.prepare` returns for one prompt.

    Attributes:
        numbers: for each layer; None: none. `priorities` sees them as `Step.prepared`.
        shares: of each layer in the model's slots, relative to the others; None: budgets are not changed.
        by_numbers: the slots of a layer are as many as it has of the model's largest numbers, instead of `shares`.
        least: number of slots that every layer gets, as far as there are enough.
        recent: how many of the prompt's newest tokens count before all others in `by_numbers`, because they are protected.
        acts: on which layers the policy acts; None: on all. The others have a sliding window of their own.
    """

    numbers: tuple[Numbers, ...] | None = None
    shares: tuple[float, ...] | None = None
    by_numbers: bool = False
    least: int = 1
    recent: int = 0
    acts: tuple[bool, ...] | None = None
    _known: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def divides(self) -> bool:
        """Whether it says how slots are divided among layers."""
        return self.by_numbers or self.shares is not None

    def budgets(self, total: int, prompt: int) -> tuple[int, ...]:
        """The budget of each layer, with sum `total`; none is more than the prompt's tokens while another has fewer."""
        if (total, prompt) not in self._known:  # each layer needs them
            self._known[total, prompt] = self._divided(total, prompt)
        return self._known[total, prompt]

    def _divided(self, total: int, prompt: int) -> tuple[int, ...]:
        if self.acts is not None and not all(self.acts):
            on = [i for i, acts in enumerate(self.acts) if acts]
            only = replace(
                self,
                numbers=None if self.numbers is None else tuple(self.numbers[i] for i in on),
                shares=None if self.shares is None else tuple(self.shares[i] for i in on),
                acts=None,
            )
            each = total // len(self.acts)
            found = dict(zip(on, only.budgets(each * len(on), prompt), strict=True)) if on else {}
            return tuple(found.get(i, each) for i in range(len(self.acts)))
        shares = self.shares
        if self.by_numbers:
            import torch

            assert self.numbers is not None
            every = torch.stack([n.of[:, :prompt] for n in self.numbers])  # [L, K, T]
            every[..., max(0, prompt - self.recent) :] = torch.inf
            most = min(total * every.shape[1], every.numel())
            best = every.flatten().topk(most).indices // every[0].numel()
            counts = tuple(map(float, torch.bincount(best, minlength=len(every)).tolist()))
            slots = list(divided(total, prompt, counts, 0))
            while min(slots) < min(self.least, total // len(slots), prompt):  # the layer with most gives one
                slots[slots.index(max(slots))] -= 1
                slots[slots.index(min(slots))] += 1
            return tuple(slots)
        assert shares is not None
        return divided(total, prompt, shares, self.least)


@lru_cache(maxsize=4096)
def divided(total: int, most: int, shares: tuple[float, ...], least: int = 1) -> tuple[int, ...]:
    """Divide `total` slots in proportion to `shares`, each between `least` and `most`, by the largest remainders.

    Where these bounds do not allow the total, the lower one gives way, and beyond the upper one all get the same.
    """
    n = len(shares)
    if total >= n * most:
        return tuple(total // n + (i < total % n) for i in range(n))
    low = min(least, total // n, most)
    room, left = most - low, float(total - n * low)
    slots, open_ = [0.0] * n, list(range(n))
    while open_:
        of_open = sum(shares[i] for i in open_)
        each = {i: left * (shares[i] / of_open if of_open > 0 else 1 / len(open_)) for i in open_}
        full = [i for i in open_ if each[i] >= room]
        for i in full or open_:
            slots[i] = float(room) if full else each[i]
        if not full:
            break
        left -= room * len(full)
        open_ = [i for i in open_ if i not in full]
    floors = [min(room, int(x + 1e-9)) for x in slots]
    order = sorted((i for i in range(n) if floors[i] < room), key=lambda i: floors[i] - slots[i])
    missing = total - n * low - sum(floors)
    for i in order[:missing]:
        floors[i] += 1
    return tuple(low + x for x in floors)
