"""How tables name a system: its policy's settings, budget and forgetting factor."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

import pandas as pd

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
LONGEST_SETTING = 24
"""Characters of a setting in a label."""


def factor_label(value: Any) -> str:
    """How tables write a forgetting factor: a number, or the range of a list of one per layer."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return DASH
    parts = sorted({float(v) for v in str(value).split("/")})
    return (
        f"{parts[0]:g}"
        if len(parts) == 1
        else f"{parts[0]:g} to {parts[-1]:g} by layer #{zlib.crc32(str(value).encode()):08x}"
    )


def name_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the settings in which two systems of one policy differ to their labels; `policy_label` is the one without."""
    frame["policy_label"] = frame["label"]
    for _, rows in frame.groupby("policy"):
        variants = rows["settings"].unique()
        if len(variants) > 1:
            parsed = {v: dict(json.loads(v)) for v in variants}
            differing = [
                k for k in sorted(set().union(*parsed.values())) if len({str(p.get(k)) for p in parsed.values()}) > 1
            ]
            for v, settings in parsed.items():
                text = ", ".join(_setting_text(k, settings.get(k, DASH)) for k in differing)
                chosen = rows.index[rows["settings"] == v]
                frame.loc[chosen, "label"] = frame.loc[chosen, "label"] + f" ({text})"
    varied = frame["variant"] != ""
    frame.loc[varied, "label"] = frame.loc[varied, "label"] + " [" + frame.loc[varied, "variant"] + "]"
    frame["short_label"] = frame["label"]
    if frame.loc[~frame["is_full"], "schedule"].nunique() > 1:
        frame["label"] = frame["label"].where(frame["is_full"], frame["label"] + ", " + frame["schedule"])
    return frame


def _setting_text(key: str, setting: Any) -> str:
    """A setting in a label: named data by the name alone, other long settings by the beginning of their hash."""
    if _is_named(setting):
        return str(setting["name"])
    text = str(setting)
    return f"{key} " + (text if len(text) <= LONGEST_SETTING else f"#{hashlib.sha256(text.encode()).hexdigest()[:6]}")


def _is_named(setting: Any) -> bool:
    return isinstance(setting, dict) and isinstance(setting.get("name"), str)


def shorten_names(frame: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """Where data of one name differ only between budgets, the name alone identifies the system.

    Args:
        place: the columns that identify a cell, `settings` among them.
    """
    parsed = {v: dict(json.loads(v)) for v in frame["settings"].unique()}
    short = {
        v: json.dumps({k: {"name": x["name"]} if _is_named(x) else x for k, x in settings.items()}, sort_keys=True)
        for v, settings in parsed.items()
    }
    shortened = frame.assign(settings=frame["settings"].map(short))
    for _, rows in shortened.groupby(["policy", "settings"]):
        if frame.loc[rows.index, "settings"].nunique() > 1 and not rows.duplicated(place).any():
            frame.loc[rows.index, "settings"] = rows["settings"]
    return frame


def settings_label(text: Any) -> str:
    """A policy's settings without the forgetting factor, which has its own column."""
    if not isinstance(text, str):
        return "{}"
    settings = {k: v for k, v in json.loads(text).items() if k != "forgetting_factor"}
    return json.dumps(settings, sort_keys=True)


OWN = "own"
"""The budget of a policy that evicts and takes none: with a threshold, the table of cached shares says what comes out."""


def budget_label(is_full: bool, ratio: Any, tokens: Any, base: Any) -> tuple[str, float]:
    """How tables write a budget, and where it sorts."""
    if is_full:
        return DASH, math.inf
    if not pd.isna(tokens):
        text = str(tokens) if isinstance(tokens, str) else f"{tokens:g}"
        return f"{text} tokens", 1.0 + first_number(tokens)
    if pd.isna(ratio):  # a policy without a budget
        return OWN, 0.0
    text = ratio if isinstance(ratio, str) else f"{ratio:g}"
    return text if base in ("total", None) or pd.isna(base) else f"{text} of {base}", first_number(ratio)


BUDGET_KINDS = {
    "tokens": "tokens",
    "total": "share of the sequence",
    "context": "share of the context",
    "seen": "share of the tokens read so far",
}
"""What a budget counts in, as an axis says it."""


def budget_kind(label: str) -> tuple[str, str]:
    """The number of a budget that `budget_label` wrote, and its kind, a key of `BUDGET_KINDS`."""
    number, _, base = label.partition(" of ")
    return (label.removesuffix(" tokens"), "tokens") if label.endswith(" tokens") else (number, base or "total")


def budget_axis(labels: Iterable[str]) -> tuple[str, set[str]]:
    """The title of an axis of budgets, and the kinds that these have."""
    kinds = {budget_kind(label)[1] for label in labels}
    return f"budget ({BUDGET_KINDS[min(kinds)]})" if len(kinds) == 1 else "budget", kinds


def first_number(value: Any) -> float:
    return float(str(value).split("/")[0])
