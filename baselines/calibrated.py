"""Calibrated: accumulated or mean attention with settings for each layer, or for each key/value head, read from a file.

`a2sf calibrate` writes the file. It found on plain text: the forgetting factor, the share of the newest tokens, the
sinks, whether tokens are ranked by the mean, and how the slots are divided among layers (and heads). This policy only
reads it.

Source: the rankings are A2SF's (arXiv 2407.20485) and the mean attention of RoCo (2402.06262). Slots are divided by the
error that fewer slots cause, as in AdaKV (2407.11550), but once for a model instead of for each prompt. Deviations: a
layer or head whose share is below 1 evicts before `C` tokens are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import yaml

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.renamed import notice
from a2sf.policies.rule import Head, Rule
from a2sf.policies.slots import apportion, head_slots
from a2sf.shipped import found

KEY = "policy.file"
ALLOWED = "give a file that `a2sf calibrate` wrote"
DEFAULT = Head(forgetting_factor=0.7, recent_share=0.25)
"""The settings of every layer if no file is given."""
NUMBERS = {"share": 0.0, "forgetting_factor": 1.0, "recent_share": 1.0}
"""Settings that are fractions, and the largest value; 0.0: any value above 0."""
STORED = {"mean_over_age": "by_age"}
"""Settings with another name in stored results and in files of the previous version."""


@dataclass(frozen=True, kw_only=True)
class Calibrated(Policy):
    """Settings for each layer, from a file.

    Attributes:
        file: the path of the YAML file, or its content: `name`, and `layers` with one entry for each layer of the model. An
            entry holds `forgetting_factor`, `recent_share`, `sinks`, `mean_over_age` and `share` (of the slots, relative to
            the other layers), or it holds `share` and `heads`, with such settings for each key/value head. The file is read
            at once, so that its content identifies a result, not its path. Without a file, every layer has A2SF's rule with
            factor 0.7 and a quarter of the budget for the newest tokens.
    """

    name: ClassVar[str] = "calibrated"
    label: ClassVar[str] = "Calibrated"

    file: Any = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", _read(self.file)[0])

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The settings of each layer; empty if no file is given."""
        return _read(self.file)[1]

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        if self.layers and len(self.layers) != layers:
            message = f"it was calibrated for a model of {len(self.layers)} layers, and this one has {layers}"
            raise ConfigError(KEY, self.file["name"], message)
        for layer in self.layers:
            if len(layer.heads) > 1 and kv_heads is not None and len(layer.heads) != kv_heads:
                message = (
                    f"it has settings for {len(layer.heads)} key/value heads a layer, and this model has {kv_heads}"
                )
                raise ConfigError(KEY, self.file["name"], message)

    def acting_budget(self, budget: int, layer: int, acts: tuple[bool, ...], prompt: int | None) -> int:
        if len(self.layers) != len(acts):
            return budget
        shares = tuple(x.share for x, on in zip(self.layers, acts, strict=True) if on)
        return budget if len(set(shares)) == 1 else apportion(budget * len(shares), shares)[sum(acts[:layer])]

    def layer_budget(self, budget: int, layer: int, layers: int, prompt: int | None = None) -> int:
        return self.acting_budget(budget, layer, (True,) * layers, prompt)

    def retention(self, budget: int, layer: int) -> Retention:
        heads = self.layers[layer].heads if self.layers else (DEFAULT,)
        if len(heads) > 1:  # the rule has all numbers
            return Retention(budget=budget, rule=Rule(heads=heads))
        ((C, recent, sinks),), (head,) = head_slots(heads, budget), heads
        return Retention(
            budget=C,
            recent=recent,
            sinks=sinks,
            forgetting_factor=head.forgetting_factor,
            rule=Rule(mean_over_age=head.mean_over_age),
        )

    def stored_settings(self) -> dict[str, Any]:
        layers = [layer.as_data(stored=True) for layer in self.layers]
        return {"file": {"name": self.file["name"], "layers": layers} if self.file else ""}

    def __repr__(self) -> str:
        return f"Calibrated(file={self.stored_settings()['file']!r})"  # as in stored caches of the previous version


@dataclass(frozen=True)
class Layer:
    """The settings of one layer.

    Attributes:
        share: of the slots, relative to the other layers.
        heads: one entry for all key/value heads, or one for each.
    """

    share: float
    heads: tuple[Head, ...]

    def as_data(self, *, stored: bool = False) -> dict[str, Any]:
        """The layer's entry in the file, or in stored results."""
        names = STORED if stored else {}
        heads = [{names.get(key, key): x for key, x in asdict(head).items()} for head in self.heads]
        return {"share": self.share, "heads": heads} if len(heads) > 1 else heads[0] | {"share": self.share}


def _read(given: Any) -> tuple[Any, tuple[Layer, ...]]:
    """The part of a file, or of its content, that moves numbers: as plain data, and as layers. No file: "" and no layers.

    Raises:
        ConfigError: if the file cannot be read, or holds something else.
    """
    if given == "":
        return "", ()
    shown = given if isinstance(given, str) else "(its content)"
    if isinstance(given, str):
        try:
            given = yaml.safe_load(found(given).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(KEY, shown, f"{ALLOWED}; {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping):
        raise ConfigError(KEY, given, ALLOWED)
    name, layers = given.get("name"), given.get("layers")
    if not isinstance(name, str) or not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ConfigError(KEY, shown, f"{ALLOWED}; this has no name, or no list of layers")
    made = tuple(_layer(shown, number, layer) for number, layer in enumerate(layers))
    return {"name": name, "layers": [layer.as_data() for layer in made]}, made


def _layer(shown: str, number: int, given: Any) -> Layer:
    where = f"layer {number}"
    if not isinstance(given, Mapping):
        raise ConfigError(KEY, shown, f"{ALLOWED}; {where} is not a mapping of settings")
    if "heads" not in given:
        head = _head(shown, where, given)
        return Layer(head.share, (_head(shown, where, {**given, "share": 1.0}),))
    share = _head(shown, where, {"share": given.get("share", 1.0)}).share
    heads = given["heads"]
    if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads or set(given) - {"share", "heads"}:
        raise ConfigError(KEY, shown, f"{ALLOWED}; {where} may have only share and heads, a list of settings")
    return Layer(share, tuple(_head(shown, f"{where}, head {h}", settings) for h, settings in enumerate(heads)))


def _head(shown: str, where: str, given: Any) -> Head:
    default = asdict(Head())
    if isinstance(given, Mapping):
        for new, old in STORED.items():
            if old in given:
                notice(f"{old} in {KEY}", new)
                given = {new if key == old else key: x for key, x in given.items()}
    if not isinstance(given, Mapping) or set(given) - set(default):
        raise ConfigError(KEY, shown, f"{ALLOWED}; {where} may have only these settings: {', '.join(default)}")
    settings = default | dict(given)
    for key, largest in NUMBERS.items():
        value = settings[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 <= value <= largest if largest else 0 < value < float("inf")):
            allowed = f"from 0 to {largest:.0f}" if largest else "above 0"
            raise ConfigError(KEY, shown, f"{key} {value} of {where} must be a number {allowed}")
        settings[key] = float(value)
    sinks, mean = settings["sinks"], settings["mean_over_age"]
    if not isinstance(sinks, int) or isinstance(sinks, bool) or sinks < 0 or not isinstance(mean, bool):
        raise ConfigError(KEY, shown, f"{where} needs a whole number of sinks, and true or false for mean_over_age")
    return Head(**settings)
