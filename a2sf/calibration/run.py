"""Calibration, from the first passage to the content of the file that the policy `calibrated` reads.

The first stage measures the error of each setting in each layer alone (`local`). The second stage measures the best
settings in all layers together, on held-out text (`end_to_end`), and chooses the one with the smallest change of
log-likelihood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from a2sf.calibration.allocate import allocate_budget
from a2sf.calibration.capture import Captured, capture, projections
from a2sf.calibration.checkpoint import Checkpoint
from a2sf.calibration.end_to_end import HeldOut
from a2sf.calibration.grid import H2O, PAPER, describe, settings
from a2sf.calibration.local import HeadAtRatio, errors
from a2sf.calibration.texts import Passages
from a2sf.errors import UserError
from baselines.calibrated import Calibrated, Layer

OBJECTIVE = "mean absolute change of a token's log-likelihood against the full cache, on held-out text"
LOCAL = (
    "squared error of a layer's output after its projection over the output's own square, mean over layers and passages"
)
MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Multiples of the mean budget at which the error of a layer or head is measured, to divide the slots."""
THRESHOLDS = (0.0, 0.1)
"""By which share the error must fall for a layer or head to get its own setting instead of the model's."""
STRENGTHS = (0.5, 1.0)
"""0 stands for equal budgets, 1 for those with the smallest sum of errors."""


@dataclass(frozen=True)
class SearchOptions:
    """What a calibration searches.

    Attributes:
        ratios: budgets, as shares of a sequence's tokens; one file is written for all of them.
        per: whether settings may differ by `layer`, by key/value `head`, or not at all (`model`).
        shares: whether budgets may differ by layer (and by head, if `per` is `head`).
        top: how many of the settings for all layers are measured end to end.
    """

    ratios: tuple[float, ...]
    per: str = "layer"
    shares: bool = False
    top: int = 4


@dataclass(frozen=True)
class Candidate:
    """Settings of all layers.

    Attributes:
        name: a short description for tables.
        layers: the settings of each layer.
        local: the error by layer over that of the paper's setting, mean over layers; None: not measured.
    """

    name: str
    layers: tuple[Layer, ...]
    local: float | None

    def policy(self, name: str = "") -> Calibrated:
        """The policy with these settings."""
        return Calibrated(file={"name": name or self.name, "layers": [layer.as_data() for layer in self.layers]})

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that identify the settings, without the name."""
        data = json.dumps([layer.as_data() for layer in self.layers], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """The candidates.

    Attributes:
        tried: each candidate and its mean |Δ log-likelihood|, in the order in which they were measured.
    """

    tried: tuple[tuple[Candidate, float], ...]

    @property
    def best(self) -> tuple[Candidate, float]:
        """The candidate with the smallest change (ties: the first)."""
        return min(self.tried, key=lambda pair: pair[1])


Track = Callable[[str, int, Iterable[int]], Iterable[int]]
"""`track(description, total, items)` yields the items and shows progress."""


class Calibration:
    """The calibration of one model.

    Args:
        model: a transformers model that `capture.check_model` accepts.
        passages: the text of both stages.
        options: what is searched.
        checkpoint: sums that are known already, and where new ones are kept.
        track: shows progress.
    """

    def __init__(
        self, model: Any, passages: Passages, options: SearchOptions, checkpoint: Checkpoint, track: Track
    ) -> None:
        self.model, self.passages, self.options = model, passages, options
        self.checkpoint, self.track = checkpoint, track
        self.settings = settings()
        self.projections = projections(model)

    def run(self) -> Result:
        """Measure all candidates.

        Raises:
            UserError: if budgets are too large for slots to be divided.
        """
        held_out = HeldOut(self.model, self.passages.held_out)
        tried = [(c, self._change(held_out, c)) for c in self.candidates()]
        if self.options.shares:
            best, _ = Result(tuple(tried)).best
            tried += [(c, self._change(held_out, c)) for c in self._divided(best)]
        return Result(tuple(tried))

    @cached_property
    def errors(self) -> np.ndarray:
        """Errors by layer, mean over passages, float64 [layers, ratios, settings, KV heads + 1]; the last is the layer's."""
        tried = [HeadAtRatio(s, ratio) for ratio in self.options.ratios for s in self.settings]
        found = self._local("errors by layer", "local", lambda layer: tried)
        return found.reshape(len(found), len(self.options.ratios), len(self.settings), -1)

    def candidates(self) -> list[Candidate]:
        """The candidates with equal budgets: the same settings for all layers, then settings of each layer and head."""
        scaled = self._scaled(self.errors)  # [layers, settings, heads + 1]
        of_layers = scaled[..., -1]
        order = np.argsort(of_layers.mean(0), kind="stable")
        paper, h2o = self.settings.index(PAPER), self.settings.index(H2O)
        first = list(dict.fromkeys([paper, h2o, *order[: self.options.top].tolist()]))
        made = [self._candidate("", np.full((len(of_layers), 1), s), of_layers[..., None]) for s in first]
        base = int(order[0])
        if self.options.per != "model":
            made += [self._varied("layer", of_layers[..., None], base, t) for t in THRESHOLDS]
        if self.options.per == "head":
            made += [self._varied("head", scaled[..., :-1], base, t) for t in THRESHOLDS]
        return list({c.key: c for c in reversed(made)}.values())[::-1]

    def _varied(self, per: str, scaled: np.ndarray, base: int, threshold: float) -> Candidate:
        """The best setting of each layer or head, if its error is smaller than that of `base` by the share `threshold`.

        Args:
            per: `layer` or `head`.
            scaled: errors [layers, settings, n].
            base: index of the setting for the others.
            threshold: from 0 to 1.
        """
        best = scaled.argmin(1)  # [layers, n]
        smallest = np.take_along_axis(scaled, best[:, None], 1)[:, 0]
        chosen = np.where(smallest < (1 - threshold) * scaled[:, base], best, base)
        return self._candidate(
            f"{per} by {per}" + (f", if {threshold:.0%} better" if threshold else ""), chosen, scaled
        )

    def _candidate(self, name: str, chosen: np.ndarray, scaled: np.ndarray) -> Candidate:
        """The candidate of the settings with indices `chosen` [layers, n], given their errors [layers, settings, n]."""
        local = float(np.take_along_axis(scaled, chosen[:, None], 1).sum(-1).mean())
        layers = tuple(Layer(1.0, tuple(self.settings[s] for s in row)) for row in chosen.tolist())
        return Candidate(name or f"all layers: {describe(layers[0].heads[0])}", layers, local)

    def _scaled(self, found: np.ndarray) -> np.ndarray:
        """Mean over budgets of errors [layers, ratios, ...], divided by the paper's setting's error at that budget."""
        paper = self.errors[:, :, self.settings.index(PAPER), -1].mean(0)
        return (found / paper.reshape(1, -1, *[1] * (found.ndim - 2))).mean(1)

    def _divided(self, best: Candidate) -> list[Candidate]:
        """`best` with slots divided among the layers, or among all heads if heads may differ."""
        multiples = [m for m in MULTIPLES if m * max(self.options.ratios) <= 1]
        if multiples[-1] <= 1:
            raise UserError(
                f"budgets of {max(self.options.ratios):g} are too large to divide slots among layers; leave out --shares"
            )
        distinct = [list(dict.fromkeys(layer.heads)) for layer in best.layers]
        points = [(m, ratio) for ratio in self.options.ratios for m in multiples]

        def tried(layer: int) -> list[HeadAtRatio]:
            return [HeadAtRatio(head, m * ratio) for head in distinct[layer] for m, ratio in points]

        found = self._local("slots", f"slots {best.key}", tried, pad=max(map(len, distinct)) * len(points))
        K = found.shape[-1] - 1
        curves = np.full((len(found), len(self.options.ratios), K + 1, len(multiples)), np.nan)
        for number, layer in enumerate(best.layers):
            each = found[number].reshape(-1, len(self.options.ratios), len(multiples), K + 1)
            for h in range(K):
                curves[number, :, h] = each[distinct[number].index(layer.heads[h % len(layer.heads)]), ..., h]
            one = len(layer.heads) == 1
            curves[number, :, K] = each[0, ..., K] if one else curves[number, :, :K].sum(1)
        curves = self._scaled(curves)  # [layers, heads + 1, multiples]
        heads = self.options.per == "head" and K > 1
        curves = (curves[:, :K] if heads else curves[:, K:]).reshape(-1, len(multiples))
        made = []
        for suffix, weights in (("", np.ones(len(found))), (", by layers' weights", self.weights)):
            shares = allocate_budget(curves * np.repeat(weights, len(curves) // len(found))[:, None], multiples)
            among = f"{'heads' if heads else 'layers'}{suffix}"
            made += [self._with_shares(best, among, s, shares.reshape(len(found), -1)) for s in STRENGTHS]
        return made

    @cached_property
    def weights(self) -> np.ndarray:
        """The weight of each layer's error end to end, float64 [layers], mean 1.

        The weight is the square of the change of log-likelihood when only this layer is pruned with the paper's setting,
        divided by its error: a change is proportional to the root of the error, and squared changes of layers add up. It
        is measured on one passage of each length, from the text of the first stage.
        """
        some = HeldOut(self.model, self.passages.local[: len({len(p) for p in self.passages.local})])
        policy = Candidate("", (Layer(1.0, (PAPER,)),) * len(self.projections), None).policy("one layer")
        key = f"weights {json.dumps(self.options.ratios)}"
        done, n = self.checkpoint.get(key)[0], len(some.passages) * len(self.projections)
        sums = np.zeros(len(self.projections))
        for step in self.track("weights of layers", n, range(done, n)):
            which, layer = divmod(step, len(sums))
            sums[:] = 0
            sums[layer] = some.change(policy, self.options.ratios, which, only=layer)
            self.checkpoint.add(key, sums)
        changes = self.checkpoint.get(key)[1]
        local = self.errors[:, :, self.settings.index(PAPER), -1].mean(1)
        found = changes**2 / np.maximum(local, 1e-12)
        return found / found.mean()

    def _with_shares(self, best: Candidate, among: str, strength: float, shares: np.ndarray) -> Candidate:
        """`best` with shares [layers, 1 or heads], mean 1, moved towards equal shares unless `strength` is 1."""
        shares = (1 + strength * (shares - 1)).round(4)
        layers = []
        for layer, row in zip(best.layers, shares, strict=True):
            mean = float(row.mean())
            heads = layer.heads
            if len(row) > 1:
                heads = heads if len(heads) > 1 else heads * len(row)
                heads = tuple(replace(h, share=round(float(s) / mean, 4)) for h, s in zip(heads, row, strict=True))
            layers.append(Layer(round(mean, 4), heads))
        return Candidate(f"{best.name}; slots shared among {among}, {strength:.0%}", tuple(layers), None)

    def _local(
        self, description: str, key: str, tried: Callable[[int], Sequence[HeadAtRatio]], pad: int = 0
    ) -> np.ndarray:
        """Errors by layer, mean over passages, float64 [layers, settings, KV heads + 1].

        Args:
            description: for the progress bar.
            key: name of the sum in the checkpoint.
            tried: from the index of a layer to its settings.
            pad: the number of settings in the result, if layers have fewer; the rest is 0.
        """
        key = f"{key} {json.dumps(self.options.ratios)}"
        done, _ = self.checkpoint.get(key)
        local, layers = self.passages.local, len(self.projections)
        steps = iter(self.track(description, len(local) * layers, range(done * layers, len(local) * layers)))
        for ids in local[done:]:
            rows: dict[int, np.ndarray] = {}

            def measure(layer: Captured, rows: dict[int, np.ndarray] = rows) -> None:
                next(steps)
                some = errors(layer, self.projections[layer.number], tried(layer.number))
                rows[layer.number] = np.pad(some, ((0, max(0, pad - len(some))), (0, 0)))

            capture(self.model, ids, measure)
            self.checkpoint.add(key, np.stack([rows[i] for i in range(layers)]))
        next(steps, None)
        done, total = self.checkpoint.get(key)
        return total / done

    def _change(self, held_out: HeldOut, candidate: Candidate) -> float:
        """Mean |Δ log-likelihood| of a held-out token."""
        key = f"change {candidate.key} {json.dumps(self.options.ratios)}"
        policy, n = candidate.policy(), len(self.passages.held_out)
        for which in self.track(candidate.name, n, range(self.checkpoint.get(key)[0], n)):
            self.checkpoint.add(key, held_out.change(policy, self.options.ratios, which))
        return float(self.checkpoint.get(key)[1]) / held_out.tokens


def content(result: Result, name: str, about: dict[str, Any]) -> dict[str, Any]:
    """The content of the file: the best settings, and how they were found.

    Args:
        name: the name of the settings in results.
        about: further entries of `made`.
    """
    best, change = result.best
    data = best.policy(name).file
    tried = [
        {"name": c.name, "change": round(x, 6), **({} if c.local is None else {"local": round(c.local, 4)})}
        for c, x in result.tried
    ]
    made = {
        "chosen": best.name,
        "change": round(change, 6),
        "objective": OBJECTIVE,
        "local": f"{LOCAL}, A2SF 0.1's = 1",
    }
    return {**data, "made": {**made, **about, "tried": tried}}


def rows_of(calibration: Calibration) -> list[dict[str, Any]]:
    """The errors by layer as rows: layer, head (None: the layer), budget, setting, error."""
    rows = []
    for (layer, r, s, h), error in np.ndenumerate(calibration.errors):
        head = None if h == calibration.errors.shape[-1] - 1 else h
        setting = {k: v for k, v in asdict(calibration.settings[s]).items() if k != "share"}
        rows.append({"layer": layer, "head": head, "budget": calibration.options.ratios[r], **setting, "error": error})
    return rows
