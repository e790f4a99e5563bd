"""Calibration from its first passage to the file that a policy reads.

First the error that each setting makes in each layer by itself (`local`), then the best few, all layers together, on text
that the first stage did not see (`end_to_end`). The last decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from a2sf.calibration.allot import allot
from a2sf.calibration.capture import Layer as Seen
from a2sf.calibration.capture import look, projections
from a2sf.calibration.end_to_end import HeldOut
from a2sf.calibration.grid import H2O, PAPER, named, settings
from a2sf.calibration.local import Trial, errors
from a2sf.calibration.partial import Partial
from a2sf.calibration.texts import Passages
from a2sf.errors import UserError
from baselines.calibrated import Calibrated, Layer

OBJECTIVE = "mean absolute change of a token's log-likelihood against the full cache, on held-out text"
LOCAL = (
    "squared error of a layer's output after its projection over the output's own square, mean over layers and passages"
)
MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Of the mean budget, where the error of a layer or head is measured before slots are shared out."""
PERS = ("model", "layer", "head")
THRESHOLDS = (0.0, 0.1)
"""How much less error a layer's or head's own setting must make, as a share, to be taken instead of the model's."""
STRENGTHS = (0.5, 1.0)
"""How much of the way from equal budgets to those of least error."""


@dataclass(frozen=True)
class Asked:
    """What is to be found.

    Attributes:
        ratios: budgets, as shares of a sequence's tokens; one file is to serve them all.
        per: whether settings may differ by `layer`, by key/value `head`, or not at all (`model`).
        shares: whether layers (and heads, where `per` is `head`) may have budgets of their own.
        top: how many of the settings for all layers are tried end to end.
    """

    ratios: tuple[float, ...]
    per: str = "layer"
    shares: bool = False
    top: int = 4


@dataclass(frozen=True)
class Candidate:
    """Settings of all layers, with the sum of local errors that speaks for them (over the paper's; None: not measured)."""

    name: str
    layers: tuple[Layer, ...]
    local: float | None

    def policy(self, name: str = "") -> Calibrated:
        """The policy of these settings."""
        return Calibrated(file={"name": name or self.name, "layers": [layer.as_data() for layer in self.layers]})

    @property
    def key(self) -> str:
        """Identifies the settings, whatever they are called."""
        data = json.dumps([layer.as_data() for layer in self.layers], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """What came out: every candidate with its change end to end, in the order they were tried, and the best."""

    tried: tuple[tuple[Candidate, float], ...]

    @property
    def best(self) -> tuple[Candidate, float]:
        """The least change; of equals the first."""
        return min(self.tried, key=lambda pair: pair[1])


Track = Callable[[str, int, Iterable[int]], Iterable[int]]
"""`track(what, total, items)` gives the items on and shows how far it is."""


class Calibration:
    """One model and its passages.

    Args:
        model: any that `capture.check_model` accepts.
        passages: what to choose on, and what to hold the choice against.
        partial: what is known already.
        track: shows progress.
    """

    def __init__(self, model: Any, passages: Passages, asked: Asked, partial: Partial, track: Track) -> None:
        self.model, self.passages, self.asked, self.partial, self.track = model, passages, asked, partial, track
        self.settings = settings()
        self.projections = projections(model)

    def run(self) -> Found:
        """Find the settings.

        Raises:
            UserError: if budgets leave nothing to share out.
        """
        held_out = HeldOut(self.model, self.passages.held_out)
        tried = [(c, self._change(held_out, c)) for c in self.candidates()]
        if self.asked.shares:
            best, _ = Found(tuple(tried)).best
            tried += [(c, self._change(held_out, c)) for c in self._shared(best)]
        return Found(tuple(tried))

    @cached_property
    def errors(self) -> np.ndarray:
        """Local errors, mean over passages, float64 [layers, ratios, settings, KV heads + 1]; the last is the layer's."""
        trials = [Trial(s, ratio) for ratio in self.asked.ratios for s in self.settings]
        found = self._local("errors by layer", "local", lambda layer: trials)
        return found.reshape(len(found), len(self.asked.ratios), len(self.settings), -1)

    def candidates(self) -> list[Candidate]:
        """What is tried end to end, with equal budgets: settings for all layers, then those of each layer and head."""
        scaled = self._scaled(self.errors)  # [layers, settings, heads + 1]
        whole = scaled[..., -1]
        order = np.argsort(whole.mean(0), kind="stable")
        paper, h2o = self.settings.index(PAPER), self.settings.index(H2O)
        first = list(dict.fromkeys([paper, h2o, *order[: self.asked.top].tolist()]))
        made = [self._candidate("", np.full((len(whole), 1), s), whole[..., None]) for s in first]
        base = int(order[0])
        if self.asked.per != "model":
            made += [self._own("layer", whole[..., None], base, t) for t in THRESHOLDS]
        if self.asked.per == "head":
            made += [self._own("head", scaled[..., :-1], base, t) for t in THRESHOLDS]
        return list({c.key: c for c in reversed(made)}.values())[::-1]

    def _own(self, per: str, scaled: np.ndarray, base: int, threshold: float) -> Candidate:
        """The best setting of each layer or head [layers, settings, n], where it is that much better than `base`."""
        best = scaled.argmin(1)  # [layers, n]
        least = np.take_along_axis(scaled, best[:, None], 1)[:, 0]
        chosen = np.where(least < (1 - threshold) * scaled[:, base], best, base)
        return self._candidate(
            f"{per} by {per}" + (f", if {threshold:.0%} better" if threshold else ""), chosen, scaled
        )

    def _candidate(self, name: str, chosen: np.ndarray, scaled: np.ndarray) -> Candidate:
        """The settings numbered in `chosen` [layers, n], of errors [layers, settings, n]."""
        local = float(np.take_along_axis(scaled, chosen[:, None], 1).sum(-1).mean())
        layers = tuple(Layer(1.0, tuple(self.settings[s] for s in row)) for row in chosen.tolist())
        return Candidate(name or f"all layers: {named(layers[0].heads[0])}", layers, local)

    def _scaled(self, found: np.ndarray) -> np.ndarray:
        """Mean over budgets of errors [layers, ratios, ...], each over what the paper's setting makes at that budget."""
        paper = self.errors[:, :, self.settings.index(PAPER), -1].mean(0)
        return (found / paper.reshape(1, -1, *[1] * (found.ndim - 2))).mean(1)

    def _shared(self, best: Candidate) -> list[Candidate]:
        """`best` with slots shared out among layers, or among all heads where those may differ."""
        multiples = [m for m in MULTIPLES if m * max(self.asked.ratios) <= 1]
        if multiples[-1] <= 1:
            raise UserError(
                f"at budgets of {max(self.asked.ratios):g} there is nothing to share out; leave out --shares"
            )
        of_layer = [list(dict.fromkeys(layer.heads)) for layer in best.layers]
        points = [(m, ratio) for ratio in self.asked.ratios for m in multiples]

        def trials(layer: int) -> list[Trial]:
            return [Trial(head, m * ratio) for head in of_layer[layer] for m, ratio in points]

        found = self._local("slots", f"slots {best.key}", trials, pad=max(map(len, of_layer)) * len(points))
        K = found.shape[-1] - 1
        curves = np.full((len(found), len(self.asked.ratios), K + 1, len(multiples)), np.nan)
        for number, layer in enumerate(best.layers):
            each = found[number].reshape(-1, len(self.asked.ratios), len(multiples), K + 1)
            for h in range(K):
                curves[number, :, h] = each[of_layer[number].index(layer.heads[h % len(layer.heads)]), ..., h]
            one = len(layer.heads) == 1
            curves[number, :, K] = each[0, ..., K] if one else curves[number, :, :K].sum(1)
        curves = self._scaled(curves)  # [layers, heads + 1, multiples]
        heads = self.asked.per == "head" and K > 1
        curves = (curves[:, :K] if heads else curves[:, K:]).reshape(-1, len(multiples))
        made = []
        for told, weights in (("", np.ones(len(found))), (", by layers' weights", self.weights)):
            shares = allot(curves * np.repeat(weights, len(curves) // len(found))[:, None], multiples)
            among = f"{'heads' if heads else 'layers'}{told}"
            made += [self._with_shares(best, among, s, shares.reshape(len(found), -1)) for s in STRENGTHS]
        return made

    @cached_property
    def weights(self) -> np.ndarray:
        """What a layer's local error weighs end to end, float64 [layers], mean 1.

        The square of the change that the paper's setting makes in this layer alone, over its local error: changes go as the
        root of errors, and those of several layers add up in squares. Measured on one passage of each length, of those that
        local errors were measured on.
        """
        some = HeldOut(self.model, self.passages.local[: len({len(p) for p in self.passages.local})])
        policy = Candidate("", (Layer(1.0, (PAPER,)),) * len(self.projections), None).policy("one layer")
        key = f"weights {json.dumps(self.asked.ratios)}"
        done, n = self.partial.get(key)[0], len(some.passages) * len(self.projections)
        sums = np.zeros(len(self.projections))
        for step in self.track("weights of layers", n, range(done, n)):
            which, layer = divmod(step, len(sums))
            sums[:] = 0
            sums[layer] = some.change(policy, self.asked.ratios, which, only=layer)
            self.partial.add(key, sums)
        changes = self.partial.get(key)[1]
        local = self.errors[:, :, self.settings.index(PAPER), -1].mean(1)
        found = changes**2 / np.maximum(local, 1e-12)
        return found / found.mean()

    def _with_shares(self, best: Candidate, among: str, strength: float, shares: np.ndarray) -> Candidate:
        """`best` with shares [layers, 1 or heads], mean 1, weakened to `strength`."""
        shares = (1 + strength * (shares - 1)).round(4)
        layers = []
        for layer, row in zip(best.layers, shares, strict=True):
            mean = float(row.mean())
            heads = layer.heads
            if len(row) > 1:
                own = heads if len(heads) > 1 else heads * len(row)
                heads = tuple(replace(h, share=round(float(s) / mean, 4)) for h, s in zip(own, row, strict=True))
            layers.append(Layer(round(mean, 4), heads))
        return Candidate(f"{best.name}; slots shared among {among}, {strength:.0%}", tuple(layers), None)

    def _local(self, what: str, key: str, trials: Callable[[int], Sequence[Trial]], pad: int = 0) -> np.ndarray:
        """Local errors of each layer's trials, mean over passages, [layers, trials (`pad`, if given), KV heads + 1]."""
        key = f"{key} {json.dumps(self.asked.ratios)}"
        done, _ = self.partial.get(key)
        local, layers = self.passages.local, len(self.projections)
        steps = iter(self.track(what, len(local) * layers, range(done * layers, len(local) * layers)))
        for ids in local[done:]:
            rows: dict[int, np.ndarray] = {}

            def see(layer: Seen, rows: dict[int, np.ndarray] = rows) -> None:
                next(steps)
                some = errors(layer, self.projections[layer.number], trials(layer.number))
                rows[layer.number] = np.pad(some, ((0, max(0, pad - len(some))), (0, 0)))

            look(self.model, ids, see)
            self.partial.add(key, np.stack([rows[i] for i in range(layers)]))
        next(steps, None)
        done, total = self.partial.get(key)
        return total / done

    def _change(self, held_out: HeldOut, candidate: Candidate) -> float:
        """Mean absolute change of a held-out token's log-likelihood."""
        key = f"change {candidate.key} {json.dumps(self.asked.ratios)}"
        policy, n = candidate.policy(), len(self.passages.held_out)
        for which in self.track(candidate.name, n, range(self.partial.get(key)[0], n)):
            self.partial.add(key, held_out.change(policy, self.asked.ratios, which))
        return float(self.partial.get(key)[1]) / held_out.tokens


def written(found: Found, name: str, about: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: the best settings, and where they are from."""
    best, change = found.best
    data = best.policy(name).file
    tried = [
        {"name": c.name, "change": round(x, 6), **({} if c.local is None else {"local": round(c.local, 4)})}
        for c, x in found.tried
    ]
    made = {
        "chosen": best.name,
        "change": round(change, 6),
        "objective": OBJECTIVE,
        "local": f"{LOCAL}, A2SF 0.1's = 1",
    }
    return {**data, "made": {**made, **about, "tried": tried}}


def rows_of(calibration: Calibration) -> list[dict[str, Any]]:
    """Local errors as rows: layer, head (None: the layer), budget, setting, error."""
    rows = []
    for (layer, r, s, h), error in np.ndenumerate(calibration.errors):
        head = None if h == calibration.errors.shape[-1] - 1 else h
        setting = {k: v for k, v in asdict(calibration.settings[s]).items() if k != "share"}
        rows.append({"layer": layer, "head": head, "budget": calibration.asked.ratios[r], **setting, "error": error})
    return rows
