"""SimLayerKV: layers that attend only to the first and the newest tokens retain only these; the others get their slots.

Paper: Zhang et al., 2024 (arXiv 2410.13846). A layer is lazy if the last query pays at least `threshold` of its attention,
mean over heads, to the first `sinks` and the newest `recent` tokens. A lazy layer retains these alone. Deviations: the sum
of slots is that of equal budgets, so that the other layers retain all tokens only if the slots suffice; else the first and
the newest. The paper's `recent` is 1024, for contexts of many thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a2sf.policies.base import check_share, check_tokens
from a2sf.policies.prepared import LayerRead, Prepared
from baselines.streaming import Streaming


@dataclass(frozen=True, kw_only=True)
class SimLayerKV(Streaming):
    """The first and the newest tokens, with more slots for layers that attend to others.

    Attributes:
        sinks: how many of the first tokens are never evicted.
        recent: number of newest tokens that a lazy layer retains.
        threshold: the share of attention, from 0 to 1, from which a layer is lazy.
    """

    name: ClassVar[str] = "simlayerkv"
    label: ClassVar[str] = "SimLayerKV"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    recent: int = 64
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("policy.recent", self.recent, least=1)
        check_share("policy.threshold", self.threshold)

    def look(self, read: LayerRead) -> float:
        """1 for a layer that attends to other tokens too, and 0 for a lazy one."""
        tokens = read.key.shape[1]
        paid = read.attention(tokens - 1).mean((0, 1, 2))
        others = paid[self.sinks : max(self.sinks, tokens - self.recent)].sum()
        return float(1 - others < self.threshold)

    def conclude(self, found: list[float]) -> Prepared:
        return Prepared(shares=tuple(found), least=self.sinks + self.recent)
