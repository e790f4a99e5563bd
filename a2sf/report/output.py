"""Everything a sweep is shown as, written to files: what `a2sf tables` does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from a2sf import atomic
from a2sf.analysis.comparisons.against import against_frame, compare_against
from a2sf.analysis.comparisons.fidelity import fidelity_frame
from a2sf.analysis.comparisons.generated import text_frame
from a2sf.analysis.comparisons.pairs import compare_pair, comparisons_frame
from a2sf.analysis.comparisons.pooled import compare_over_models, over_models_frame
from a2sf.analysis.comparisons.ranking import rank, ranking_frame
from a2sf.analysis.comparisons.stopped import stopped_comparisons, stopped_frame
from a2sf.analysis.results.documents import texts_note
from a2sf.analysis.results.gather import gather_metrics
from a2sf.analysis.results.grid import DEFAULT_PAIR, Grid
from a2sf.analysis.results.labels import MINUS
from a2sf.analysis.results.selection import Selection
from a2sf.analysis.statistics.families import Correction
from a2sf.errors import UserError
from a2sf.report.choices import FORMATS
from a2sf.report.generated import generated_plots
from a2sf.report.lengths import length_tables, share_tables
from a2sf.report.needle import needle_plots, needle_tables
from a2sf.report.page.page import ReportContents, read_failures, write_report
from a2sf.report.plots.forest import forest_plots
from a2sf.report.plots.sweep import draw_all
from a2sf.report.tables.generated import generated_tables
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.pooled import over_models_tables
from a2sf.report.tables.summaries import (
    against_tables,
    comparison_tables,
    fidelity_tables,
    ranking_tables,
    stopped_tables,
)
from a2sf.report.tables.table import Table
from a2sf.report.tables.text import TextTable, text_latex, text_markdown
from a2sf.report.tables.write import csv_frame, latex, markdown
from a2sf.report.traced import read_traces, trace_frame, trace_pictures
from a2sf.store.archive import is_archive, place_of
from a2sf.store.notes import notes_of, rounding_note

README_BEGIN, README_END = "<!-- table:begin -->", "<!-- table:end -->"


@dataclass(frozen=True)
class TableOptions:
    """How results are laid out and where they go.

    Attributes:
        pivot: what goes across, one of `a2sf.report.choices.PIVOTS`.
        pair: policies whose difference is shown, first minus second.
        pair_given: whether the user chose them, so that a note says if one is missing.
        against: policies that every other is compared with at the same budget.
        stderr, interval: add standard errors, 95 % intervals to the numbers of Markdown, LaTeX and screen.
        margin: in the metric's unit, within which systems are tested to be of the full cache; None: they are not.
        family: which tests are corrected together, one of `FAMILIES`; None: those of a table, and for `against` of a model.
        correction: one of `CORRECTIONS`.
        out: directory of `tables/`, `plots/` and `report.html`; the first sweep's by default.
        formats: files to write in `tables/`.
        plots, report: whether to draw and to write the report.
    """

    pivot: str = "task"
    pair: tuple[str, str] = field(default=DEFAULT_PAIR)
    pair_given: bool = False
    against: tuple[str, ...] = ()
    stderr: bool = False
    interval: bool = False
    margin: float | None = None
    family: str | None = None
    correction: str = "holm"
    out: Path | None = None
    formats: tuple[str, ...] = FORMATS
    plots: bool = True
    report: bool = True

    def corrected(self, usual: str = "table") -> Correction:
        """How p-values are corrected, where the family is `usual` if none is chosen."""
        return Correction(self.family or usual, self.correction)

    def tables(self, grid: Grid) -> list[Table]:
        return build_tables(grid, self.pivot, pair=self.pair, correction=self.corrected(), margin=self.margin)


@dataclass(frozen=True)
class Shown:
    """What was made: the tables, the rankings, the files written, and notes for the reader."""

    tables: list[Table]
    rankings: list[TextTable]
    files: list[Path]
    notes: list[str]


def show(directories: Sequence[Path], selection: Selection, options: TableOptions) -> Shown:
    """Tables, comparisons, closeness, plots and report of one or more sweeps.

    If the selection names no metric, tasks that do not have the first one's are shown by their own metrics; their files are
    in folders of a metric's name, and their report is `report-METRIC.html`.

    Raises:
        UserError: if nothing can be shown.
    """
    first, *further = _in_folders(gather_metrics(directories, selection))
    if further:
        others = [f"{', '.join(grid.tasks)} ({grid.metric}, {_report(folder)})" for folder, grid in further]
        note = f"Shown by other metrics, in tables and a report of their own: {'; '.join(others)}."
        first = "", replace(first[1], notes=(*first[1].notes, note))
    each = [_show(directories, grid, options, folder) for folder, grid in (first, *further)]
    return Shown(
        [table for shown in each for table in shown.tables],
        [ranking for shown in each for ranking in shown.rankings],
        [file for shown in each for file in shown.files],
        list(dict.fromkeys(note for shown in each for note in shown.notes)),
    )


def _in_folders(grids: Iterable[Grid]) -> list[tuple[str, Grid]]:
    """Each grid with the folder of its tables and plots: none for the first, and a metric's name for the others."""
    found: dict[str, Grid] = {}
    for grid in grids:
        name = re.sub(r"[^\w.-]+", "-", grid.metric) if found else ""
        if name in found:  # the same metric of tasks in which it has another meaning
            name += "-lower" if not grid.higher_is_better else "-share" if grid.percent else "-number"
        found[name] = grid
    return list(found.items())


def _report(folder: str) -> str:
    """The file name of the report whose tables are in `folder`."""
    return f"report-{folder}.html" if folder else "report.html"


def _show(directories: Sequence[Path], grid: Grid, options: TableOptions, folder: str) -> Shown:
    """What `show` gives, of one metric; `folder` as in `_in_folders`."""
    tables = options.tables(grid)
    comparisons, not_compared = compare_pair(grid, options.pair, options.corrected())
    if not options.pair_given and options.pair[0] not in set(grid.frame["policy"]):
        not_compared = []
    fidelity, no_fidelity = fidelity_frame(grid)
    ranked, not_ranked = rank(grid, options.pair, options.corrected(), options.margin)
    against, not_paired = compare_against(grid, options.against, options.corrected("model"))
    stopped, not_tested = stopped_comparisons(grid, options.corrected())
    shared = texts_note(grid.cells_shown)
    of_pair, of_full, not_pooled = compare_over_models(grid, options.pair, options.corrected())
    effects, text_rows = text_frame(grid)
    rankings = [*ranking_tables(grid, ranked, options.pair), *against_tables(against, grid.percent, shared)]
    rankings += over_models_tables(of_pair, grid.percent, shared)
    text_tables = [
        *rankings,
        *over_models_tables(of_full, grid.percent, shared, f"each policy {MINUS} full cache"),
        *needle_tables(grid),
        *stopped_tables(stopped, grid.percent),
        *comparison_tables(comparisons, grid.percent, shared),
        *fidelity_tables(grid, fidelity),
        *length_tables(grid),
        *share_tables(grid),
        *generated_tables(grid, effects),
    ]
    traced = read_traces(grid)
    traces = trace_frame(traced, options.pair)
    first = directories[0]
    out = options.out or (place_of(first) if is_archive(first) else first)
    written = {
        "tables.md": markdown(tables, options.stderr, options.interval) + "\n" + text_markdown(text_tables),
        "tables.tex": latex(tables, options.stderr, options.interval) + "\n" + text_latex(text_tables),
        "tables.csv": csv_frame(tables).to_csv(index=False),
        "ranking.csv": _csv(ranking_frame(ranked)),
        "comparisons.csv": _csv(comparisons_frame(comparisons)),
        "against.csv": _csv(against_frame(against)),
        "models.csv": _csv(over_models_frame([*of_pair, *of_full])),
        "stopped.csv": _csv(stopped_frame(stopped)),
        "fidelity.csv": _csv(fidelity),
        "traces.csv": _csv(traces),
        "texts.csv": _csv(effects),
        "texts_documents.csv": _csv(text_rows),
    }
    files = []
    for name, text in written.items():
        if text and name.rsplit(".", 1)[1] in options.formats:
            (out / "tables" / folder).mkdir(parents=True, exist_ok=True)
            atomic.write(out / "tables" / folder / name, text)
            files.append(out / "tables" / folder / name)
    if options.plots:
        plots = out / "plots" / folder
        files += [*needle_plots(grid, plots), *draw_all(grid, plots, options.pair)]
        files += forest_plots(of_pair, plots, grid.percent, grid.metric)
        files += [*trace_pictures(traced, plots), *generated_plots(effects, text_rows, plots, grid.policies)]
    left_out = [*not_compared, *no_fidelity, *not_ranked, *not_paired, *not_pooled, *not_tested]
    of_tables = [note for table in tables for note in table.notes]
    rounding = filter(None, [rounding_note(grid.cells.values())])
    notes = list(dict.fromkeys([*left_out, *of_tables, *notes_of(grid.cells.values()), *rounding]))
    if options.report:
        contents = ReportContents(
            grid=grid,
            tables=tables,
            comparisons=comparisons,
            text_tables=text_tables,
            fidelity=fidelity,
            traces=traces,
            groups=traced,
            texts=text_rows,
            failures=read_failures(directories),
            notes=notes,
            pair=options.pair,
        )
        files.append(write_report(out / _report(folder), contents))
    return Shown(tables, rankings, files, list(dict.fromkeys([*grid.notes, *notes])))


def _csv(frame: pd.DataFrame) -> str:
    """A frame as CSV; "" for one without rows."""
    return frame.to_csv(index=False) if len(frame) else ""


def pictures(directory: Path) -> dict[str, Path]:
    """Draw the plots of one sweep into its `plots/`; each one's name -> its PNG.

    Raises:
        UserError: if nothing can be shown.
    """
    found: dict[str, Path] = {}
    for folder, grid in _in_folders(gather_metrics([directory])):
        drawn = [*needle_plots(grid, directory / "plots" / folder), *draw_all(grid, directory / "plots" / folder)]
        found |= {f"{grid.metric}-{f.stem}" if folder else f.stem: f for f in drawn if f.suffix == ".png"}
    return found


def publish(grid: Grid, options: TableOptions, figures: Path | None, readme: Path | None) -> list[Path]:
    """Figures and the README's table from committed results; nothing else is written.

    Raises:
        UserError: if the README has no comments that mark the table's place.
    """
    files: list[Path] = []
    if readme is not None:
        replace_block(readme, markdown(options.tables(grid), options.stderr, options.interval))
        files.append(readme)
    if figures is not None:
        files += [*needle_plots(grid, figures), *draw_all(grid, figures, options.pair)]
    return files


def replace_block(readme: Path, text: str) -> None:
    """Put `text` between the table comments of a Markdown file.

    Raises:
        UserError: if the file or its comments are missing.
    """
    old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = old.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not begin or not end:
        raise UserError(f"{readme} has no {README_BEGIN} … {README_END} to put the table between.")
    atomic.write(readme, f"{before}{begin}\n{text.strip()}\n{end}{after}")
