"""From logits to attention probabilities: a plain softmax, or one with a softcap (Gemma 2) or learned sinks (GPT-OSS)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that commands which only list policies do not load torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """What a layer makes of its logits (query · key, times the scale). Call it: every attention is computed by it.

    Attributes:
        softcap: a bound on the logits: `x` becomes `softcap * tanh(x / softcap)`. None: there is none.
        learned_sinks: [K, G], one more logit in the softmax of each query head, without key and value. The probabilities of
            the tokens then sum to less than 1. None: there are none.
    """

    softcap: float | None = None
    learned_sinks: Tensor | None = None

    @staticmethod
    def of(softcap: Any, learned_sinks: Any, heads: int, kv_heads: int) -> Softmax:
        """That of a layer with so many query and KV heads.

        Args:
            softcap: a number above 0; None: there is none.
            learned_sinks: a floating tensor [heads]; None: there are none.

        Raises:
            ValueError: for anything else.
        """
        if softcap is None and learned_sinks is None:
            return PLAIN
        _check_softcap(softcap)
        if learned_sinks is not None:
            _check_sinks(learned_sinks, heads)
            learned_sinks = learned_sinks.unflatten(0, (kv_heads, -1))
        return Softmax(softcap, learned_sinks)

    @property
    def plain(self) -> bool:
        """Whether it is a softmax and nothing else."""
        return self.softcap is None and self.learned_sinks is None

    def capped(self, logits: Tensor) -> Tensor:
        """Logits of any shape with the softcap."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def __call__(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Attention probabilities [..., K, G, Q, N].

        Args:
            logits: [..., K, G, Q, N], before the softcap.
            hidden: bool, broadcast to that shape: the tokens that a query does not see. A query that sees none has NaN
                everywhere, or 0 where there are sinks.
        """
        import torch

        logits = self.capped(logits).masked_fill(hidden, -torch.inf)
        if self.learned_sinks is None:
            return logits.softmax(-1)
        sinks = self.learned_sinks.to(logits)[..., None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1].contiguous()

    def heads(self, heads: Tensor) -> Softmax:
        """That of the KV heads `heads` int64 [K'], in their order."""
        sinks = self.learned_sinks
        return self if sinks is None else replace(self, learned_sinks=sinks[heads.to(sinks.device)])


PLAIN = Softmax()
"""A softmax and nothing else, as most models have it."""


def _check_softcap(softcap: Any) -> None:
    number = isinstance(softcap, int | float) and not isinstance(softcap, bool)
    if softcap is not None and not (number and isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a finite number above 0, got {softcap}")


def _check_sinks(learned_sinks: Any, heads: int) -> None:
    import torch

    shape = tuple(learned_sinks.shape) if isinstance(learned_sinks, torch.Tensor) else type(learned_sinks).__name__
    if shape != (heads,) or not learned_sinks.is_floating_point():
        raise ValueError(f"learned_sinks must be a floating tensor of {heads}, one for each query head; got {shape}")
