"""Pictures of what eviction does to generated texts: how long they are, and how likely the full cache's texts stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2sf.analysis.results.labels import DASH
from a2sf.report.plots.style import GREY, Line, Style, panels, save, shared_legend, styles_of
from a2sf.store.names import safe


def generated_plots(
    effects: pd.DataFrame, texts: pd.DataFrame, directory: Path, policies: Sequence[str] = ()
) -> list[Path]:
    """Draw one picture for each model, number of shots and task that generates; the PNG and SVG files written.

    Args:
        effects, texts: as `a2sf.analysis.comparisons.generated.text_frame` returns them.
        policies: those of the report.
    """
    policies = [*policies, *effects.loc[effects["budget"] != DASH, "policy"]] if len(effects) else []
    files: list[Path] = []
    for place, rows in effects.groupby(["model", "shots", "task"], sort=True) if len(effects) else ():
        model, shots, task = place if isinstance(place, tuple) else (place, "", "")
        of_task = texts[(texts["model"] == model) & (texts["shots"] == shots) & (texts["task"] == task)]
        name = f"texts-{safe(str(model))}-{shots}shot-{safe(str(task))}"
        figure = generated_figure(rows, of_task, policies)
        figure.suptitle(f"{task}, {model}, {shots}-shot (n = {int(rows['n'].max())})", fontsize=10)
        files += save(figure, directory / name)
    return files


def generated_figure(effects: pd.DataFrame, texts: pd.DataFrame, policies: Sequence[str] = ()) -> Figure:
    """Of one task: lengths of the texts at each budget, and the change of the full cache's texts' log-likelihood."""
    pruned = effects[effects["budget"] != DASH]
    budgets = list(dict.fromkeys(pruned["budget"]))
    shifts = "full_text_shift" in pruned and bool(pruned["full_text_shift"].notna().any())
    number = max(1, len(budgets)) + shifts
    figure, axes = panels(number, (3.4, 3.1), (0, 0), columns=number)
    styles = _styles(pruned, policies)
    for axis, budget in zip(axes, budgets or [DASH], strict=False):
        for key, rows in texts.groupby(["label", "factor", "budget"], sort=False):
            label, factor, of = map(str, key if isinstance(key, tuple) else (key, DASH, DASH))
            if of in (budget, DASH):
                full = of == DASH
                _steps(axis, rows["tokens"], _name(label, factor), None if full else styles[_name(label, factor)])
        axis.set(title=f"budget {budget}", xlabel="tokens generated", ylim=(0, 102))
    axes[0].set_ylabel("texts with at most so many (%)")
    if shifts:
        _shifts(axes[-1], pruned, budgets, styles)
    shared_legend(figure, 6, fontsize=8)
    return figure


def _name(label: str, factor: str) -> str:
    return label if factor == DASH else f"{label} {factor}"


def _styles(pruned: pd.DataFrame, policies: Sequence[str]) -> dict[str, Style]:
    seen = pruned.drop_duplicates(["label", "factor"])
    lines = [Line(_name(str(r.label), str(r.factor)), str(r.policy), []) for r in seen.itertuples()]
    return styles_of(lines, policies)


def _steps(axis: Axes, tokens: pd.Series, label: str, style: Style | None) -> None:
    """The share of texts that have at most so many tokens; the full cache's in grey."""
    x = np.sort(tokens.dropna().to_numpy())
    look = (
        {"color": GREY, "ls": ":", "lw": 2.0} if style is None else {"color": style.colour, "ls": style.dash, "lw": 1.4}
    )
    axis.step(np.r_[0, x], 100 * np.arange(len(x) + 1) / max(1, len(x)), where="post", label=label, **look)


def _shifts(axis: Axes, pruned: pd.DataFrame, budgets: list[str], styles: dict[str, Style]) -> None:
    """The change of the log-likelihood of the full cache's texts by budget, with 95 % intervals."""
    names = list(dict.fromkeys(_name(label, f) for label, f in zip(pruned["label"], pruned["factor"], strict=True)))
    for i, name in enumerate(names):
        of = [_name(label, f) == name for label, f in zip(pruned["label"], pruned["factor"], strict=True)]
        rows = pruned[of].dropna(subset="full_text_shift")
        x = np.array([budgets.index(b) for b in rows["budget"]]) + (i - (len(names) - 1) / 2) * 0.08
        value, low, high = (rows[f"full_text_shift{end}"].to_numpy() for end in ("", "_low", "_high"))
        style = styles[name]
        look = {"color": style.colour, "marker": style.marker, "ls": style.dash, "ms": 4.5, "lw": 1.2, "capsize": 2}
        axis.errorbar(x, value, np.abs(np.array([value - low, high - value])), label=name, **look)  # type: ignore[arg-type]
    axis.axhline(0, color=GREY, lw=0.8)
    axis.set_xticks(range(len(budgets)), budgets)
    axis.set(title="the full cache's texts", xlabel="budget", ylabel="Δ log-likelihood (nats/token)")
