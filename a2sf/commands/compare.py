"""`a2sf compare A B [C ...]`: paired statistics of finished runs, of this harness, lm-eval or inspect_ai."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from a2sf.analysis.statistics.choices import add_corrections, share_of
from a2sf.commands.arguments import Parser
from a2sf.report.choices import AVERAGES

EPILOG = """\
a run is one of
  runs/SWEEP, runs/SWEEP/CELL or SWEEP.a2sf.zip        of a2sf: each system of a sweep is a run
  a directory of lm-eval, or its samples_TASK_*.jsonl  made with --output_path DIR --log_samples
  LOG.eval or LOG.json                                 of inspect_ai
The first run is what the others are compared with.

  a2sf compare results/full results/pruned --margin 1 --out compared"""


def main(arguments: Sequence[str]) -> None:
    """Read, compare, show and write."""
    parser = Parser(
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
    parser.add_argument("--models", metavar="A,A,B,B", help="model of each run: pool differences over the models")
    parser.add_argument(
        "--average", choices=AVERAGES, default="tasks", help="what counts equally in an average over tasks"
    )
    add_corrections(parser)
    parser.add_argument("--out", type=Path, help="directory for compare.md, .tex, .csv, .html and plots")
    args = parser.parse_args(arguments)

    from a2sf.analysis.comparisons.pooled import over_models_frame
    from a2sf.analysis.comparisons.runs import compare_runs, with_labels
    from a2sf.analysis.comparisons.runs_over_models import compare_runs_over_models, with_models
    from a2sf.analysis.results.labels import MINUS
    from a2sf.analysis.runs.read import cluster_notes, read_runs
    from a2sf.analysis.statistics.families import Correction
    from a2sf.errors import UserError
    from a2sf.report.tables.pooled import over_models_tables
    from a2sf.report.tables.runs import comparison_table, frame_of, screen_of
    from a2sf.report.tables.screen import text_screen
    from a2sf.report.tables.text import text_latex, text_markdown

    margin = share_of(args.margin)
    correction = Correction(args.family or "table", args.correction)
    by_documents = args.average == "documents"
    for path in args.runs:
        if sum(other.resolve() == path.resolve() for other in args.runs) > 1:
            raise UserError(f"{path} is given twice; give each run once.")
    runs = [run for path in args.runs for run in read_runs(path, args.cluster)]
    if len(runs) < 2:
        raise UserError(f"{args.runs[0]} is one run ({runs[0].label}); give another one to compare it with.")
    runs = with_labels(runs, args.labels.split(",") if args.labels else None, distinct=args.models is None)
    if args.models is not None:
        runs = with_models(runs, args.models.split(","))
    clusters = [] if args.cluster is None else cluster_notes(runs, args.cluster)
    made = compare_runs(runs, args.metric, margin, by_documents, correction)
    made.notes += clusters
    pooled, not_pooled = compare_runs_over_models(runs, args.metric, by_documents, correction)
    table = comparison_table(made)
    of_models = over_models_tables(pooled, made.percent, title=f"each run {MINUS} {runs[0].system}", head="Run")
    console = Console()
    console.print(screen_of(table))
    for note in [table.legend, *made.notes]:
        console.print(note, markup=False, highlight=False)
    for shown in [*text_screen(of_models), *not_pooled]:
        console.print(shown, markup=False, highlight=False)
    if args.out is not None:
        from a2sf.report.page.runs import write_comparison
        from a2sf.report.plots.runs import difference_plots

        args.out.mkdir(parents=True, exist_ok=True)
        tables, notes = [table, *of_models], [*made.notes, *not_pooled]
        below = "".join(f"\n{note}\n" for note in notes)
        (args.out / "compare.md").write_text(text_markdown(tables) + below, encoding="utf-8")
        (args.out / "compare.tex").write_text(text_latex(tables), encoding="utf-8")
        frame_of(made).to_csv(args.out / "compare.csv", index=False)
        written = ["compare.md", "compare.tex", "compare.csv"]
        drawn = difference_plots(made, args.out)
        if pooled:
            from a2sf.report.plots.forest import forest_plots

            over_models_frame(pooled).to_csv(args.out / "models.csv", index=False)
            drawn += forest_plots(pooled, args.out, made.percent, ", ".join(dict.fromkeys(made.metrics.values())))
            written.append("models.csv")
        pictures = [file for file in drawn if file.suffix == ".svg"]
        page = write_comparison(args.out / "compare.html", runs, tables, notes, pictures)
        written += [page.name, *(file.name for file in drawn)]
        console.print(f"Written: {args.out}/{', '.join(written)}", markup=False, highlight=False)
