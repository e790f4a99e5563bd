"""Q-Filters: retain the tokens whose keys lie along the main direction of a head's queries; attention is not used.

Paper: Godey et al., 2025 (arXiv 2503.02812): the queries of a head lie on one side of the origin, along one direction `u`,
the first right singular vector of many queries, on the side of their mean. So a query is expected to give a key a logit in
proportion to `k · u`, which is the priority; no attention is needed. `a2sf calibrate --filters` finds the directions of a
model on plain text, averaged over the query heads of a group. Deviations: none with a file (kvpress has the opposite
sign, for published directions that point the other way). Without a file, `u` is the mean of the last queries (`RECENT`), so
that the method can be tried on any model; results of the paper need the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Rule, Step, TokenFn
from a2sf.shipped import found

KEY = "policy.file"
ALLOWED = "give a file that `a2sf calibrate --filters` wrote"
NO_SCORES = Rule(scored=False)
RECENT = 32


@dataclass(frozen=True, kw_only=True)
class QFilter(Policy):
    """Keys along the main direction of the queries.

    Attributes:
        file: the path of the JSON file, or its content. It is read at once, so that its content identifies a result.
    """

    name: ClassVar[str] = "qfilter"
    label: ClassVar[str] = "Q-Filters"

    file: Any = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", _read(self.file))

    @cached_property
    def directions(self) -> Tensor | None:
        """float32 [L, K, D], of each layer and key/value head; None if no file is given."""
        if not self.file:
            return None
        numbers = np.frombuffer(base64.b64decode(self.file["filters"]), dtype="<f4")
        return torch.from_numpy(numbers.copy()).reshape(self.file["shape"])

    @property
    def queries(self) -> int:
        return 0 if self.file else RECENT

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        if not self.file:
            return
        L, K, _ = self.file["shape"]
        if layers != L or (kv_heads is not None and kv_heads != K):
            message = f"it is of a model of {L} layers of {K} key/value heads, and this one has {layers} of {kv_heads}"
            raise ConfigError(KEY, self.file["name"], message)

    def check_head_size(self, size: int) -> None:
        if self.file and size != (of := self.file["shape"][-1]):
            raise ConfigError(KEY, self.file["name"], f"it is of heads of {of} numbers, and this model's have {size}")

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, rule=NO_SCORES)

    def priorities(self, step: Step) -> Tensor:
        if self.directions is None:
            assert step.queries is not None
            return (step.keys * step.queries.sum((2, 3))[:, :, None]).sum(-1)
        return self.along(step.keys, step.layer)

    def along(self, keys: Tensor, layer: int) -> Tensor:
        """`k · u` of keys [B, K, N, D], with the directions of the file."""
        assert self.directions is not None
        direction = self.directions[layer].to(keys)[None]
        self.check_head_size(keys.shape[-1])
        return (keys * direction[:, :, None]).sum(-1)

    def at_entry(self, layer: int) -> TokenFn | None:
        return Along(self, layer) if self.file else None

    def stored_settings(self) -> dict[str, Any]:
        if not self.file:
            return {"file": ""}
        digest = hashlib.sha256(self.file["filters"].encode()).hexdigest()[:16]
        return {"file": {"name": self.file["name"], "shape": self.file["shape"], "digest": digest}}


@dataclass(frozen=True)
class Along:
    """The priorities of a policy with a file, in one layer."""

    policy: QFilter
    layer: int

    def __call__(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        return self.policy.along(keys, self.layer)


def _read(given: Any) -> Any:
    """The content of a file, or "" for none.

    Raises:
        ConfigError: if it cannot be read, or holds something else.
    """
    if given == "":
        return ""
    shown = given if isinstance(given, str) else "(its content)"
    if isinstance(given, str):
        try:
            given = json.loads(found(given).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(KEY, shown, f"{ALLOWED}; {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise ConfigError(KEY, given, ALLOWED)
    name, shape, filters = (given.get(key) for key in ("name", "shape", "filters"))
    try:
        numbers = np.frombuffer(base64.b64decode(filters), dtype="<f4")  # type: ignore[arg-type]
        L, K, D = map(int, shape)  # type: ignore[arg-type]
        fits = isinstance(name, str) and numbers.size == L * K * D and bool(np.isfinite(numbers).all())
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ConfigError(KEY, shown, f"{ALLOWED}; this has no name, shape and finite numbers of that shape")
    return {"name": name, "shape": [L, K, D], "filters": filters}
