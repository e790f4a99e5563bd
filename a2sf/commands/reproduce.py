"""`a2sf reproduce`: run the A2SF paper's experiments on this machine, and give a verdict on every published claim.

It runs or resumes the sweep `paper` for the models that are on this machine. If there are none, it runs a sweep of a
small model, the same with the authors' present algorithm, and one over forgetting factors. `--no-run` only compares
results in runs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from a2sf.analysis.claims.reproduce import Places, compare, counts, published_figures, run_sweep, write_claims
from a2sf.analysis.claims.verdicts import MARGIN, Claim
from a2sf.analysis.statistics.choices import share_of
from a2sf.shipped import shipped

PRESET = "paper"
"""The preset of the published models; its sweep has that name."""
SMALL_SWEEPS = {"paper_small": "paper_small", "paper_authors": "paper_small", "forgetting": "forgetting"}
"""Presets of the small model -> the sweep. The authors' present algorithm adds rows without verdicts."""
REFERENCE_SWEEPS = {"paper_small": "smollm2-135m.a2sf.zip", "forgetting": "smollm2-135m-forgetting.a2sf.zip"}
"""Our archives of the sweeps over budgets and over forgetting factors, in that order."""


def main(arguments: Sequence[str]) -> None:
    """Run, compare, show and write."""
    parser = argparse.ArgumentParser(
        prog="a2sf reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-run", action="store_true", help="compare existing results; run nothing")
    parser.add_argument("--download", action="store_true", help="download models that are not on this machine")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the sweeps")
    parser.add_argument(
        "--reference", type=Path, default=shipped("runs/reference"), help="directory of published numbers"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=100 * MARGIN,
        help="two systems that are shown to differ by fewer points are called equal (default: 1)",
    )
    parser.add_argument("--out", type=Path, help="where claims.csv and claims.md go (default: <runs>/claims)")
    args = parser.parse_args(arguments)
    share_of(args.margin)

    console = Console()
    models = list(published_figures(args.reference)["model"].unique())
    why_not = dict.fromkeys(models, "nothing was run, as requested, and there is no such cell")
    if not args.no_run:
        reasons = {m: run_sweep(PRESET, [f"model={m}", f"sweep_name={PRESET}"], args.download) for m in models}
        why_not = {m: why for m, why in reasons.items() if why}
        for preset, sweep in SMALL_SWEEPS.items() if all(reasons.values()) else ():
            if why := run_sweep(preset, [f"sweep_name={sweep}"]):
                console.print(f"The sweep {preset} did not finish: {why}", markup=False)
    small, factors = ((args.runs / sweep, args.reference / archive) for sweep, archive in REFERENCE_SWEEPS.items())
    findings = compare(Places(args.reference, args.runs / PRESET, small, factors), why_not, margin=args.margin / 100)

    show(console, "Headline claims", findings.headlines)
    show(console, "Over several models", findings.over_models)
    console.print("Published figures: " + "; ".join(f"{n} {v}" for v, n in counts(findings.figures).items()))
    for note in findings.notes:
        console.print(f"Note: {note}", markup=False)
    show(console, "Shape on the small model", findings.shape)
    files = write_claims(args.out or args.runs / "claims", findings)
    console.print("Every verdict: " + ", ".join(map(str, files)), markup=False)


def show(console: Console, title: str, claims: list[Claim]) -> None:
    """Print claims as a table."""
    if not claims:
        return
    table = Table(title=title, title_justify="left")
    for head in ("Claim", "Verdict", "Why"):
        table.add_column(head, overflow="fold")
    for c in claims:
        table.add_row(escape(c.claim), c.verdict.value, escape(c.why))
    console.print(table)
