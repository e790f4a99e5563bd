"""docs/findings.md, from text to figures: `python scripts/findings.py calibrate | test | figures`.

calibrate   settings by layer, head and share at three budgets, on plain text, to runs/reference/findings (half an hour)
test        the held-out test, resumable, and its archive in runs/reference/findings (hours)
figures     tables and figures from what is stored there (seconds)

runs/reference/findings/README.md is the design, written before the test.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from a2sf.analysis.comparisons.against import compare_against
from a2sf.analysis.comparisons.fidelity import fidelity_frame
from a2sf.analysis.results.gather import gather
from a2sf.analysis.results.grid import AVERAGE, SystemResults
from a2sf.analysis.results.selection import Selection
from a2sf.errors import UserError
from a2sf.report.heads import errors_figure
from a2sf.report.output import replace_block
from a2sf.report.plots.style import MARKERS, OKABE_ITO, Line, Style, save
from a2sf.report.tables.summaries import against_tables, fidelity_tables
from a2sf.report.tables.text import TextTable, text_markdown

STORE = Path("runs/reference/findings")
SETTINGS_OF = STORE / "smollm2-135m"
TESTED = STORE / "heldout.a2sf.zip"
SEEDED = STORE / "seeds.a2sf.zip"
"""Calibrated by head with slots shared, on what other seeds read."""
FIGURES = Path("docs/figures/findings")
PAGE = Path("docs/findings.md")
BUDGETS = ("0.1", "0.2", "0.4")
KINDS = {
    "model": "one setting",
    "layer": "by layer",
    "head": "by head",
    "layer-shares": "layers, slots shared",
    "head-shares": "heads, slots shared",
}
"""File -> what tables call it."""
DRAWN = ("H2O", "A2SF 0.1", "Mean attention", *(f"Calibrated ({KINDS[k]})" for k in ("model", "head", "head-shares")))
"""Of the held-out test, in the picture; the others are in the table."""
PRESET = Path("conf/sweep/heldout.yaml")
FACTOR = ("policy=a2sf", "forgetting_factor=0.4", "budget.ratio=0.4")
"""A2SF with the factor that calibration found at 0.4: no cell of the preset, which sweeps files of settings, too."""
RULES = ("h2o", "a2sf", "mean_attention", "tova")
NAMED = ("a2sf", "h2o")
FAMILY = ("0.1", "0.2")
"""Budgets of the comparisons that were decided on beforehand."""
SEEDS = (1, 2)
"""Beside the test's 0."""
MORE = SETTINGS_OF / "seeds" / "head-shares-0.2-more.yaml"
"""The test's seed, on three times the text."""
SETTINGS = {
    "share": ("slots, over the mean", "cividis"),
    "recent_share": ("share for the newest", "viridis"),
    "forgetting_factor": ("forgetting factor", "plasma"),
    "mean_over_age": ("ranked by A / N", "Greys"),
}
"""What a calibrated file says of a head, as a picture's title and colours."""


def held_out_tables(sweep: Path) -> str:
    """Markdown: the comparisons that were decided on beforehand, corrected over all of them, then every system."""
    grid = gather([sweep])
    closeness, _ = fidelity_frame(grid)
    named = gather([sweep], Selection(policies=("full", "calibrated", *NAMED), budgets=FAMILY))
    return "\n\n".join(
        (
            "### Decided on beforehand",
            text_markdown(against_tables(compare_against(named, NAMED)[0], named.percent)),
            "### Every system",
            text_markdown(fidelity_tables(grid, closeness)),
        )
    )


def seeds_tables(sweeps: Sequence[Path], files: dict[str, Sequence[Path]], more: Sequence[Path] = ()) -> str:
    """Markdown: what settings of each seed are worth, and how similar they are.

    Args:
        sweeps: the held-out test's, and that of other seeds.
        files: budget -> the settings of each seed.
        more: other settings, to be shown beside those.
    """
    grid = gather(sweeps, Selection(policies=("full", "calibrated", *NAMED), budgets=tuple(files)))
    shown = [*itertools.chain(*files.values()), *more]
    names = {f"Calibrated ({yaml.safe_load(file.read_text(encoding='utf-8'))['name']})" for file in shown}
    found = [a for a in compare_against(grid, NAMED)[0] if a.first.label in names]
    if lacking := names - {a.first.label for a in found}:
        raise UserError(
            f"There are no results of {', '.join(sorted(lacking))}; `python scripts/findings.py test` makes them."
        )
    legend = "As above; p-values are left out, since these decide nothing."
    tables = [
        replace(t, frame=t.frame.drop(columns=["p", "p (Holm)"]), legend=legend)
        for t in against_tables(found, grid.percent)
    ]
    similar = []
    for budget, seeds in files.items():
        numbers = [_numbers(yaml.safe_load(file.read_text(encoding="utf-8")))[0] for file in seeds]
        row = {"Budget": budget}
        for key, (title, _) in SETTINGS.items():
            pairs = itertools.combinations([n[key].ravel() for n in numbers], 2)
            row[title] = ", ".join(f"{spearmanr(a, b).statistic:.2f}" for a, b in pairs if np.ptp(a) and np.ptp(b))
        similar.append(row)
    legend = "Rank correlation over heads, for each pair of seeds in which heads differ."
    tables.append(TextTable("Similarity between seeds", pd.DataFrame(similar), legend, ("Budget",)))
    return text_markdown(tables)


def closeness_figure(sweep: Path) -> Figure:
    """Accuracy, and change of the choices' log-likelihoods, against the budget; a row for each number of shots."""
    grid = gather([sweep])
    parts = grid.by_model()
    figure, panels = plt.subplots(
        len(parts), 3, figsize=(11, 3.1 * len(parts) + 0.8), squeeze=False, layout="constrained"
    )
    for (_, shots, part), axes in zip(parts, panels, strict=True):
        close, _ = fidelity_frame(part)
        close = close[close["task"] == AVERAGE]
        groups: dict[str, list[SystemResults]] = {}
        for s in part.systems():
            if not s.is_full and s.average(part.tasks) is not None:
                groups.setdefault(_name_of(s), []).append(s)
        drawn = {name: of for name, of in groups.items() if name in DRAWN} or groups
        lines = [Line(name, of[0].policy, of) for name, of in drawn.items()]
        # most are one policy: colours of their own
        looks = itertools.product(("-", "--"), zip(OKABE_ITO, MARKERS, strict=False))
        styles = {line.label: Style(*look, dash) for line, (dash, look) in zip(lines, looks, strict=False)}
        for line in lines:
            style, x = styles[line.label], [s.budget_order for s in line.systems]
            look: dict[str, Any] = {"color": style.colour, "marker": style.marker, "ls": style.dash, "ms": 5}
            axes[0].plot(x, [100 * (s.average(part.tasks) or 0) for s in line.systems], label=line.label, **look)
            rows = pd.concat([_of(close, s) for s in line.systems])
            for axis, measure in zip(axes[1:], ("change", "agreement"), strict=True):
                scale = 100 if measure == "agreement" else 1
                axis.plot(x, scale * rows[measure], label=line.label, **look)
                axis.fill_between(
                    x,
                    scale * rows[f"{measure}_low"],
                    scale * rows[f"{measure}_high"],
                    color=style.colour,
                    alpha=0.15,
                    lw=0,
                )
        for s in part.systems():
            if s.is_full and (value := s.average(part.tasks)) is not None:
                axes[0].axhline(100 * value, color="0.35", ls=(0, (1, 1)), label=s.label)
        axes[1].set_ylim(bottom=0)
        for axis, title in zip(
            axes, ("accuracy (%)", "mean |Δ log-likelihood| (nats)", "same answer (%)"), strict=True
        ):
            axis.set_title(f"{title}, {shots}-shot")
            axis.set_xticks(sorted({s.budget_order for line in lines for s in line.systems}))
            axis.set_xlabel("budget")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def chosen_figure(files: Sequence[Path]) -> Figure:
    """What calibration chose for each layer and head: a column for each file, a row for each setting."""
    figure, panels = plt.subplots(
        len(SETTINGS),
        len(files),
        figsize=(3.4 * len(files) + 1, 1.25 * len(SETTINGS) + 0.9),
        squeeze=False,
        layout="constrained",
    )
    read = [_numbers(yaml.safe_load(f.read_text(encoding="utf-8"))) for f in files]
    for row, (axes, (key, (title, colours))) in enumerate(zip(panels, SETTINGS.items(), strict=True)):
        most = max(1.0, *(float(numbers[key].max()) for numbers, _ in read))
        for axis, (numbers, heading) in zip(axes, read, strict=True):
            shown = axis.imshow(numbers[key].T, aspect="auto", vmin=0, vmax=most, cmap=colours)
            axis.grid(False)
            axis.set_yticks(range(numbers[key].shape[1]))
            if row == 0:
                axis.set_title(heading)
            if row == len(panels) - 1:
                axis.set_xlabel("layer")
            else:
                axis.set_xticklabels([])
        axes[0].set_ylabel("KV head")
        figure.colorbar(shown, ax=list(axes), label=title, shrink=0.95)
    return figure


def _numbers(file: dict[str, Any]) -> tuple[dict[str, np.ndarray], str]:
    """Setting -> [layers, heads], and what the picture calls the file."""
    most = max(len(layer.get("heads", [layer])) for layer in file["layers"])
    found: dict[str, list[list[float]]] = {key: [] for key in SETTINGS}
    for layer in file["layers"]:
        heads = layer.get("heads", [layer])
        inside = "heads" in layer
        for key, rows in found.items():
            row = [float(h[key]) * (layer["share"] if inside and key == "share" else 1) for h in heads]
            rows.append(row * (most // len(row)))
    budgets = ", ".join(f"{b:g}" for b in file["made"]["budgets"])
    return {key: np.array(rows) for key, rows in found.items()}, f"{file['name']}, budget {budgets}"


def _of(close: pd.DataFrame, s: SystemResults) -> pd.DataFrame:
    return close[(close["label"] == s.label) & (close["budget"] == s.budget) & (close["factor"] == s.factor)]


def _name_of(s: SystemResults) -> str:
    return f"{s.label} {s.factor}" if s.policy == "a2sf" else s.label


def calibrate() -> None:
    """Every file anew; what was measured before is used."""
    for budget in BUDGETS:
        for kind, name in KINDS.items():
            _calibrate(SETTINGS_OF / f"{kind}-{budget}.yaml", kind, budget, "--name", name)
    for budget, files in by_seed().items():
        for seed, file in enumerate(files[1:], 1):
            named = f"{KINDS['head-shares']}, seed {seed}"
            _calibrate(file, "head-shares", budget, "--seed", str(seed), "--name", named)
    named = f"{KINDS['head-shares']}, three times the text"
    _calibrate(MORE, "head-shares", "0.2", "--tokens", "12288", "--held-out", "6144", "--name", named)
    own = [f"calibrated,file={SETTINGS_OF}/head-shares-{b}.yaml" for b in BUDGETS]
    frames = []
    for budget, file in zip(BUDGETS, own, strict=True):
        out = Path(f"runs/calibrated/by_layer-{budget}.csv")
        _a2sf("layer-errors", *RULES, file, "future", "--budget", budget, "--out", str(out))
        frames.append(pd.read_csv(out).replace({"policy": {file: "calibrated"}}))
    pd.concat(frames).to_csv(STORE / "by_layer.csv", index=False, float_format="%.6g")


def by_seed() -> dict[str, list[Path]]:
    """Budget -> settings by head with slots shared, of the test's seed and of the others."""
    return {
        b: [
            SETTINGS_OF / f"head-shares-{b}.yaml",
            *(SETTINGS_OF / "seeds" / f"head-shares-{b}-seed{seed}.yaml" for seed in SEEDS),
        ]
        for b in FAMILY
    }


def _calibrate(kept: Path, kind: str, budget: str, *options: str) -> None:
    """`a2sf calibrate`, and its file where the repository has it."""
    per, _, shares = kind.partition("-")
    file = Path("runs/calibrated") / kept.name
    _a2sf("calibrate", "--budget", budget, "--per", per, *["--shares"] * bool(shares), *options, "--out", str(file))
    kept.write_text(
        re.sub(r"^# .*", f"# a2sf run policy=calibrated policy.file={kept}", file.read_text(encoding="utf-8"), count=1)
    )


def like_the_preset(sweep: str) -> list[str]:
    """What the held-out preset says of model, data, tasks and shots, for cells that it does not have."""
    preset = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    groups = [f"{key.split('/')[-1]}={name}" for default in preset["defaults"] for key, name in default.items()]
    return [
        *groups,
        f"model.dtype={preset['model']['dtype']}",
        f"tasks=[{','.join(preset['tasks'])}]",
        f"limit={preset['limit']}",
        f"shots={preset['hydra']['sweeper']['params']['shots']}",
        f"sweep_name={sweep}",
    ]


def test() -> None:
    """The preset, A2SF with the factor that calibration found at 0.4, other seeds, and more text, as two archives."""
    _a2sf("run", "+sweep=heldout")
    _a2sf("run", "-m", *FACTOR, *like_the_preset("heldout"))
    _a2sf("pack", "runs/heldout", str(TESTED))
    for budget, files in by_seed().items():
        others = ",".join(map(str, [*files[1:], *([MORE] if budget == "0.2" else [])]))
        settings = ("policy=calibrated", f"policy.file={others}", f"budget.ratio={budget}")
        _a2sf("run", "-m", *settings, *like_the_preset("seeds"))
    _a2sf("pack", "runs/seeds", str(SEEDED))


def figures() -> None:
    """Tables between the table comments of docs/findings.md, and its figures."""
    by_layer = pd.read_csv(STORE / "by_layer.csv")
    labels = {"h2o": "H2O", "a2sf": "A2SF 0.1", "mean_attention": "Mean attention"}
    labels |= {"calibrated": "Calibrated (heads, slots shared)", "future": "Oracle (later queries)"}
    drawn = by_layer[by_layer["policy"] != "tova"]  # close to A2SF
    save(errors_figure(drawn, labels, over="a2sf"), FIGURES / "by_layer")
    save(closeness_figure(TESTED), FIGURES / "heldout")
    save(chosen_figure([SETTINGS_OF / f"head-shares-{b}.yaml" for b in BUDGETS]), FIGURES / "chosen")
    tables = held_out_tables(TESTED), "### Calibrated on other text", seeds_tables([TESTED, SEEDED], by_seed(), [MORE])
    replace_block(PAGE, re.sub(r"(?m)^### (?=Against|Closeness|Similarity)", "#### ", "\n\n".join(tables)))
    means = by_layer.groupby(["policy", "budget"], sort=False)["error"].mean().unstack()
    print(means.round(4).to_string())
    print(f"Written: {PAGE}, {FIGURES}")


def _a2sf(*arguments: str) -> None:
    if status := subprocess.run([sys.executable, "-m", "a2sf.cli", *arguments], check=False).returncode:
        sys.exit(status)  # the command has said why


if __name__ == "__main__":
    steps = {"calibrate": calibrate, "test": test, "figures": figures}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    steps[parser.parse_args().step]()
