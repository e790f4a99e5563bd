"""`a2sf compare A B [C ...]`: paired statistics of finished runs, of this harness, lm-eval or inspect_ai."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from a2sf.analysis.statistics.choices import MARGIN_ALLOWED

EPILOG = """\
a run is one of
  runs/SWEEP, runs/SWEEP/CELL or SWEEP.a2sf.zip        of a2sf: each system of a sweep is a run
  a directory of lm-eval, or its samples_TASK_*.jsonl  made with --output_path DIR --log_samples
  LOG.eval or LOG.json                                 of inspect_ai
The first run is what the others are compared with.

  a2sf compare results/full results/pruned --margin 1 --out compared"""


def main(arguments: Sequence[str]) -> None:
    """Read, compare, show and write."""
    parser = argparse.ArgumentParser(
        prog="a2sf compare",
        description="Paired statistics of finished runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="what to compare, the reference first")
    parser.add_argument("--metric", help="of each document (default: acc, exact_match, or the only one)")
    parser.add_argument("--margin", type=float, help="test equivalence within so many points (hundredths), such as 1.0")
    parser.add_argument("--cluster", metavar="FIELD", help="field that dependent documents share, such as a passage")
    parser.add_argument("--labels", metavar="A,B", help="names of the runs in tables, separated by commas")
    parser.add_argument("--out", type=Path, help="directory for compare.md, .tex and .csv")
    args = parser.parse_args(arguments)

    from a2sf.analysis.comparisons.runs import compare_runs, labels
    from a2sf.analysis.runs.read import read_runs
    from a2sf.errors import ConfigError, UserError
    from a2sf.report.tables.runs import comparison_table, frame_of, screen_of
    from a2sf.report.tables.text import text_latex, text_markdown

    if args.margin is not None and not 0 < args.margin <= 100:
        raise ConfigError("--margin", args.margin, MARGIN_ALLOWED)
    runs = [run for path in args.runs for run in read_runs(path, args.cluster)]
    if len(runs) < 2:
        raise UserError(f"{args.runs[0]} is one run ({runs[0].label}); give another one to compare it with.")
    runs = labels(runs, args.labels.split(",") if args.labels else None)
    made = compare_runs(runs, args.metric, None if args.margin is None else args.margin / 100)
    table = comparison_table(made)
    console = Console()
    console.print(screen_of(table))
    for note in [table.legend, *made.notes]:
        console.print(note, markup=False, highlight=False)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        notes = "".join(f"\n{note}\n" for note in made.notes)
        (args.out / "compare.md").write_text(text_markdown([table]) + notes, encoding="utf-8")
        (args.out / "compare.tex").write_text(text_latex([table]), encoding="utf-8")
        frame_of(made).to_csv(args.out / "compare.csv", index=False)
        console.print(f"Written: {args.out}/compare.md, compare.tex, compare.csv", markup=False, highlight=False)
