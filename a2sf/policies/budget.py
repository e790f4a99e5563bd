"""How many tokens a layer may hold: a ratio of the sequence, or a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from a2sf.errors import ConfigError

BASES = ("total", "context")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A cache budget as a user gives it: exactly one of `ratio` and `tokens`, for all layers or as a list of one per layer.

    Attributes:
        ratio: share of the sequence, `0 < ratio <= 1`. `C = max(1, floor(ratio * T))`, exact in decimal.
        tokens: `C` itself, at least 1.
        base: what `ratio` is a share of. `total`: all tokens that the model reads for the request (context +
            continuation - 1), as in the paper. `context`: the tokens of the context.

    Raises:
        ConfigError: if a value is not allowed.
    """

    ratio: Any = None
    tokens: Any = None
    base: str = "total"

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ConfigError("budget.base", self.base, f"give one of {', '.join(BASES)}")
        if (self.ratio is None) == (self.tokens is None):
            raise ConfigError(
                "budget",
                f"{{ratio: {self.ratio}, tokens: {self.tokens}}}",
                "give exactly one of budget.ratio (0 < ratio <= 1) and budget.tokens (at least 1)",
            )
        object.__setattr__(self, "ratio", _each("budget.ratio", self.ratio, _check_ratio))
        object.__setattr__(self, "tokens", _each("budget.tokens", self.tokens, _check_tokens))

    def check(self, layers: int) -> None:
        """Raise `ConfigError` if a list does not have one entry for each of `layers` layers."""
        for key in ("ratio", "tokens"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != layers:
                raise ConfigError(
                    f"budget.{key}",
                    list(value),
                    f"a list needs one entry per layer, {layers} for this model, and this one has {len(value)}",
                )

    def slots(self, *, total: int, context: int, layer: int) -> int:
        """`C` for one sequence in one layer.

        Args:
            total: number of tokens that the model reads for the request, `T`.
            context: number of tokens in its context.
            layer: index of the layer, from 0.
        """
        if self.tokens is not None:
            return self.tokens[layer] if isinstance(self.tokens, tuple) else self.tokens
        ratio = self.ratio[layer] if isinstance(self.ratio, tuple) else self.ratio
        # decimal, because floor(0.29 * 100) is 28 in binary floating point
        return max(1, int(Decimal(str(ratio)) * (total if self.base == "total" else context)))


def _each(key: str, value: Any, check: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ConfigError(key, list(value), "the list is empty; give one number, or one per layer")
        return tuple(check(key, v) for v in value)
    return check(key, value)


def _check_ratio(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:  # NaN fails the comparison
        raise ConfigError(key, value, "give a number with 0 < ratio <= 1, or a list of one per layer")
    return float(value)


def _check_tokens(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(key, value, "give a whole number of tokens, at least 1, or a list of one per layer")
    return value
