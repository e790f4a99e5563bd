"""`a2sf tables runs/<sweep> [runs/<other> ...]`: tables, plots and the report of sweeps."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from a2sf.analysis.statistics.choices import add_corrections, share_of
from a2sf.commands.arguments import Parser
from a2sf.report.choices import AVERAGES, FORMATS, PIVOTS


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="a2sf tables", description="Tables, plots and the report of sweeps.")
    p.add_argument("runs", nargs="+", type=Path, help="sweep directories under runs/, or archives of a2sf pack")
    choose = p.add_argument_group("what to show (several values after one option; all by default)")
    choose.add_argument(
        "--metric", help="metric's name as in lm-eval (default: acc, and for tasks without it their own)"
    )
    choose.add_argument("--model", nargs="+", default=[], dest="models")
    choose.add_argument("--policy", nargs="+", default=[], dest="policies")
    choose.add_argument(
        "--budget", nargs="+", default=[], dest="budgets", help='as tables write them: 0.2, "64 tokens"'
    )
    choose.add_argument("--factor", nargs="+", default=[], dest="factors", help="forgetting factors")
    choose.add_argument(
        "--schedule", nargs="+", default=[], dest="schedules", help="step, every4, prompt, prompt-step, context"
    )
    choose.add_argument("--task", nargs="+", default=[], dest="tasks", help="tasks and groups")
    choose.add_argument("--shots", nargs="+", default=[], type=int)
    choose.add_argument(
        "--limit",
        nargs="+",
        default=[],
        dest="limits",
        help="numbers of documents, or all (default: a sweep's largest)",
    )
    choose.add_argument(
        "--allow-mixed",
        action="store_true",
        help="show runs together that differ in limit, seed, dtype, split or version",
    )
    choose.add_argument(
        "--strict", action="store_true", help="refuse results of different versions of torch or transformers"
    )
    lay = p.add_argument_group("how to show it")
    lay.add_argument("--pivot", choices=PIVOTS, default="task", help="what goes across")
    lay.add_argument(
        "--average", choices=AVERAGES, default="tasks", help="what counts equally in an average over tasks"
    )
    lay.add_argument("--pair", nargs=2, metavar="POLICY", help="difference to show: first minus second")
    lay.add_argument(
        "--against", nargs="+", default=[], metavar="POLICY", help="compare every other policy with these, by budget"
    )
    lay.add_argument("--stderr", action="store_true", help="add standard errors to the numbers")
    lay.add_argument("--interval", action="store_true", help="add 95 %% intervals to the numbers")
    test = p.add_argument_group("how to test")
    test.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="test which systems are within so many points (hundredths) of the full cache, such as 1.0",
    )
    add_corrections(test, "of a table (default; for --against of a model)")
    write = p.add_argument_group("what to write")
    write.add_argument(
        "--out", type=Path, help="directory for tables/, plots/, report.html (default: the first sweep's)"
    )
    write.add_argument("--format", nargs="*", choices=FORMATS, default=list(FORMATS), help="files in tables/")
    write.add_argument("--no-plots", action="store_true")
    write.add_argument("--no-report", action="store_true")
    write.add_argument("--open", action="store_true", help="open the report in the browser")
    write.add_argument("--figures", type=Path, help="only draw the plots into this directory")
    write.add_argument("--readme", type=Path, help="only put the table between the marks of this file")
    return p


def main(arguments: Sequence[str]) -> None:
    """Show and write what `arguments` select."""
    command = parser()
    args = command.parse_args(arguments)
    if args.open and (args.no_report or args.figures or args.readme):
        command.error("--open needs the report: leave out --no-report, --figures and --readme")

    margin = share_of(args.margin)

    # seconds of imports, which a slip in the arguments does not need
    from a2sf.analysis.results.gather import gather
    from a2sf.analysis.results.grid import DEFAULT_PAIR
    from a2sf.analysis.results.selection import Selection
    from a2sf.report.output import TableOptions, publish, show
    from a2sf.report.tables.screen import screen, text_screen

    names = ("models", "policies", "budgets", "factors", "schedules", "tasks", "shots", "limits")
    selection = Selection(
        metric=args.metric,
        mixed=args.allow_mixed,
        strict=args.strict,
        by_documents=args.average == "documents",
        **{n: tuple(getattr(args, n)) for n in names},
    )
    options = TableOptions(
        pivot=args.pivot,
        pair=tuple(args.pair or DEFAULT_PAIR),
        pair_given=args.pair is not None,
        against=tuple(args.against),
        stderr=args.stderr,
        interval=args.interval,
        margin=margin,
        family=args.family,
        correction=args.correction,
        out=args.out,
        formats=tuple(args.format),
        plots=not args.no_plots,
        report=not args.no_report,
    )
    console = Console()
    if args.figures or args.readme:
        files = publish(gather(args.runs, selection), options, args.figures, args.readme)
    else:
        shown = show(args.runs, selection, options)
        files = shown.files
        for table in [*screen(shown.tables, options.stderr, options.interval), *text_screen(shown.rankings)]:
            console.print(table)
        for note in shown.notes:
            console.print(f"Note: {note}", markup=False, highlight=False)
    console.print(
        "Written: " + ", ".join(map(str, files)) if files else "Nothing written.", markup=False, highlight=False
    )
    if args.open:
        webbrowser.open(next(f for f in files if f.suffix == ".html").resolve().as_uri())
