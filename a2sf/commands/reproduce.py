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
from a2sf.commands.arguments import Parser
from a2sf.shipped import shipped

REFERENCE_SWEEPS = ("smollm2-135m.a2sf.zip", "smollm2-135m-forgetting.a2sf.zip")
"""Archives of our sweeps over budgets and over forgetting factors."""


def main(arguments: Sequence[str]) -> None:
    """Run, compare, show and write."""
    parser = Parser(prog="a2sf reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-run", action="store_true", help="compare existing results; run nothing")
    parser.add_argument("--download", action="store_true", help="download models that are not on this machine")
    parser.add_argument("--preset", default="paper", help="sweep preset of the published models")
    parser.add_argument(
        "--small-preset", default="paper_small", help="sweep preset if none of those models is on this machine"
    )
    parser.add_argument(
        "--factor-preset",
        default="forgetting",
        help="sweep preset over forgetting factors, which runs in the same case",
    )
    parser.add_argument(
        "--authors-preset",
        default="paper_authors",
        help="sweep preset of the authors' present repository: more rows in the small preset's sweep, without verdicts",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the sweeps")
    parser.add_argument(
        "--small", type=Path, help="the small model's sweep (default: the small preset's, then runs/reference)"
    )
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
        reasons = {
            m: run_sweep(args.preset, [f"model={m}", f"sweep_name={args.preset}"], args.download) for m in models
        }
        why_not = {m: why for m, why in reasons.items() if why}
        small_sweeps = {
            args.small_preset: args.small_preset,
            args.authors_preset: args.small_preset,
            args.factor_preset: args.factor_preset,
        }
        for preset, sweep in small_sweeps.items() if all(reasons.values()) else ():
            if why := run_sweep(preset, [f"sweep_name={sweep}"]):
                console.print(f"The sweep {preset} did not finish: {why}", markup=False)
    small = (args.small,) if args.small else (args.runs / args.small_preset, args.reference / REFERENCE_SWEEPS[0])
    factors = (args.runs / args.factor_preset, args.reference / REFERENCE_SWEEPS[1])
    findings = compare(
        Places(args.reference, args.runs / args.preset, small, factors), why_not, margin=args.margin / 100
    )

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
