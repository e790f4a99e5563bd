"""What policies retain of two texts, against what kvpress 0.5.5 retains (tests/vectors/peers/, made by scripts/parity/).

The same tokens in all heads. Where they differ, the test asserts why: two tokens whose priorities differ by no more than
float32 rounds, or a deviation that docs/parity.md tells.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2sf import Policy, Schedule
from a2sf.calibration.capture import Captured, capture
from a2sf.engine import kernels
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Options, Segments
from a2sf.policies.rule import Step

FOLDER = Path(__file__).parents[1] / "vectors" / "peers"
PEERS = np.load(FOLDER / "kvpress.npz")
SAID = json.loads((FOLDER / "kvpress.json").read_text())
WINDOW = 32
CLOSE = 2e-4
"""Relative difference of two priorities that rounding in float32 may turn: softmax and sums of some hundred terms."""


@dataclass(frozen=True)
class Pair:
    """A policy and what it is compared with.

    Attributes:
        policy: its name and settings.
        schedule: how it is run.
        ties: whether many priorities are equal by definition, so that only the retained numbers are compared.
        own: whether each layer has the budget that the peer's had.
    """

    policy: tuple[str, dict[str, Any]]
    schedule: str = "prompt"
    ties: bool = False
    own: bool = False


PAIRS = {
    "key_norm": Pair(("key_norm", {})),
    "keydiff": Pair(("keydiff", {})),
    "keydiff_block": Pair(("keydiff", {}), schedule="every15"),
    "streaming": Pair(("streaming", {})),
    "mean_attention": Pair(("mean_attention", {"recent_share": 0.0})),
    "tova": Pair(("tova", {})),
    "snapkv": Pair(("snapkv", {"window": WINDOW})),
    "pyramidkv": Pair(("snapkv", {"window": WINDOW}), own=True),
    "lagkv": Pair(("lagkv", {}), ties=True),
    "curdkv": Pair(("curdkv", {})),
    "chunkkv_key_norm": Pair(("chunkkv", {"by": "key_norm"}), own=True),
    "chunkkv_keydiff": Pair(("chunkkv", {"by": "keydiff"}), own=True),
    "expected_attention": Pair(("expected_attention", {})),
    "expected_attention_mean": Pair(("expected_attention", {"covariance": False})),
}
"""Case of the stored sets -> our policy."""


@dataclass
class Run:
    """One policy on one text: what it retained, and the last priorities that it gave."""

    retained: Tensor
    steps: list[tuple[Step, Tensor]] = field(default_factory=list)


def peer(case: str, text: int, ratio: float) -> Tensor:
    """bool [L, K, T], what kvpress retained."""
    T = len(PEERS[f"text{text}"])
    return torch.from_numpy(np.unpackbits(PEERS[f"{case}/{text}/{ratio}"], axis=-1)[..., :T].astype(bool))


@cache
def layers_of(smollm2, text: int) -> list[Captured]:
    found: list[Captured] = []
    capture(smollm2.model, PEERS[f"text{text}"].tolist(), found.append)
    return found


def run(policy: Policy, layer: Captured, budget: int, schedule: str, layers: int, rotary) -> Tensor:
    """bool [K, T], what a layer retains."""
    T = layer.query.shape[2]
    retention = policy.keeps(budget, layer.number, layers, T if schedule == "prompt" else None)
    rows = BatchRetention.of([retention], Schedule.named(schedule), [T])
    segments = Segments.of_rows(rows, torch.tensor([T]))
    options = Options(scale=layer.scale, return_state=True, layer=layer.number, layers=layers, rotary=rotary)
    state = kernels.attend(layer.query, layer.key, layer.value, segments, options).state
    found = torch.zeros(layer.key.shape[1], T + 1, dtype=torch.bool)
    found.scatter_(1, state.positions[0], torch.ones_like(state.positions[0], dtype=torch.bool))  # -1 is the last
    return found[:, :T]
