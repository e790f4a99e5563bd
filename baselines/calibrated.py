"""Calibrated: accumulated or mean attention with settings for each layer, or each key/value head, read from a file.

The file is what `a2sf calibrate` writes: factor, recent share, sinks and whether the mean ranks, found on plain text, and
how the layers (and heads) share out the slots. Nothing of it is chosen here.

Source: A2SF (arXiv 2407.20485) and the mean attention of RoCo (2402.06262) for what ranks; slots shared out by what is lost
as in AdaKV (2407.11550), but fixed beforehand instead of at each prompt. Deviations: where a layer's or head's share is
below 1, tokens go from there before `C` of them have been read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import yaml

from a2sf.errors import ConfigError
from a2sf.policies.base import Policy, Retention
from a2sf.policies.rule import Head, Rule
from a2sf.policies.slots import head_slots, shared_out
from a2sf.shipped import found

KEY = "policy.file"
ALLOWED = "give a file that `a2sf calibrate` wrote"
PLAIN = Head(forgetting_factor=0.7, recent_share=0.25)
"""What every layer goes by where no file is given."""
NUMBERS = {"share": 0.0, "forgetting_factor": 1.0, "recent_share": 1.0}
"""Settings that are numbers: the least (of a share, exclusive), or the largest that is allowed."""


@dataclass(kw_only=True)
class Calibrated(Policy):
    """Settings layer by layer, from a file.

    Attributes:
        file: the path of the YAML file, or what it holds: `name`, and `layers`, one entry for each layer of the model:
            `forgetting_factor`, `recent_share`, `sinks`, `by_age`, `share` (of the slots, relative to the other layers), or
            `share` and `heads`, one such entry for each key/value head. It is read at once, so that what identifies a result
            is what the file holds. Without one every layer has A2SF's rule with factor 0.7 and a quarter for the newest.
    """

    name: ClassVar[str] = "calibrated"
    label: ClassVar[str] = "Calibrated"

    file: Any = ""

    def __post_init__(self) -> None:
        self.file, self.layers = _content(self.file)

    def check(self, layers: int, kv_heads: int | None = None) -> None:
        if self.layers and len(self.layers) != layers:
            told = f"it was calibrated for a model of {len(self.layers)} layers, and this one has {layers}"
            raise ConfigError(KEY, self.file["name"], told)
        for layer in self.layers:
            if len(layer.heads) > 1 and kv_heads is not None and len(layer.heads) != kv_heads:
                told = f"it has settings for {len(layer.heads)} key/value heads a layer, and this model has {kv_heads}"
                raise ConfigError(KEY, self.file["name"], told)

    def of_layer(self, budget: int, layer: int, layers: int, prompt: int | None = None) -> int:
        shares = tuple(x.share for x in self.layers)
        if len(shares) != layers or len(set(shares)) == 1:
            return budget
        return shared_out(budget * layers, shares)[layer]

    def retention(self, budget: int, layer: int) -> Retention:
        heads = self.layers[layer].heads if self.layers else (PLAIN,)
        ((C, recent, sinks), *others) = head_slots(heads, budget)
        first = heads[0]
        if others:  # the numbers beside the rule are not looked at
            return Retention(budget=budget, rule=Rule(heads=heads))
        return Retention(
            budget=C,
            recent=recent,
            sinks=sinks,
            forgetting_factor=first.forgetting_factor,
            rule=Rule(by_age=first.by_age),
        )


@dataclass(frozen=True)
class Layer:
    """A layer's part of the slots, relative to the other layers', and its heads' settings: one for all, or one each."""

    share: float
    heads: tuple[Head, ...]

    def as_data(self) -> dict[str, Any]:
        """As the file holds it."""
        if len(self.heads) > 1:
            return {"share": self.share, "heads": [asdict(h) for h in self.heads]}
        return asdict(self.heads[0]) | {"share": self.share}


def _content(given: Any) -> tuple[Any, tuple[Layer, ...]]:
    """What a file holds that moves numbers, as plain data and as layers; "" and none where no file is given.

    Raises:
        ConfigError: if it cannot be read, or holds something else.
    """
    if isinstance(given, str) and not given:
        return "", ()
    told = given if isinstance(given, str) else "(its content)"
    if isinstance(given, str):
        try:
            given = yaml.safe_load(found(given).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(KEY, told, f"{ALLOWED}; {why}") from error
    if not isinstance(given, Mapping):
        raise ConfigError(KEY, given, ALLOWED)
    name, layers = given.get("name"), given.get("layers")
    if not isinstance(name, str) or not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ConfigError(KEY, told, f"{ALLOWED}; this has no name, or no list of layers")
    made = tuple(_layer(told, number, layer) for number, layer in enumerate(layers))
    return {"name": name, "layers": [layer.as_data() for layer in made]}, made


def _layer(told: str, number: int, given: Any) -> Layer:
    if not isinstance(given, Mapping):
        raise ConfigError(KEY, told, f"{ALLOWED}; layer {number} is no mapping of settings")
    where = f"layer {number}"
    if "heads" not in given:
        head = _head(told, where, given)
        return Layer(head.share, (_head(told, where, {**given, "share": 1.0}),))
    share = _head(told, where, {"share": given.get("share", 1.0)}).share
    heads = given["heads"]
    if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads or set(given) - {"share", "heads"}:
        raise ConfigError(KEY, told, f"{ALLOWED}; {where} needs share and heads alone, a list of settings")
    return Layer(share, tuple(_head(told, f"{where}, head {h}", settings) for h, settings in enumerate(heads)))


def _head(told: str, where: str, given: Any) -> Head:
    known = asdict(Head())
    if not isinstance(given, Mapping) or set(given) - set(known):
        raise ConfigError(KEY, told, f"{ALLOWED}; {where} may have {', '.join(known)}, a setting each")
    for key, largest in NUMBERS.items():
        value = given.get(key, known[key])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 <= value <= largest if largest else 0 < value < float("inf")):
            allowed = f"from 0 to {largest:.0f}" if largest else "above 0"
            raise ConfigError(KEY, told, f"{key} {value} of {where} has to be a number {allowed}")
    sinks, by_age = given.get("sinks", 0), given.get("by_age", False)
    if not isinstance(sinks, int) or isinstance(sinks, bool) or sinks < 0 or not isinstance(by_age, bool):
        raise ConfigError(KEY, told, f"{where} needs a whole number of sinks, and true or false for by_age")
    numbers = {key: float(given.get(key, known[key])) for key in NUMBERS}
    return Head(sinks=sinks, by_age=by_age, **numbers)
