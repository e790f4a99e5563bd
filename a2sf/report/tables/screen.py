"""Tables on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table as RichTable

from a2sf.analysis.results.gather import grid_of
from a2sf.analysis.results.selection import Selection
from a2sf.report.tables.cells import Markup, header, legend, texts
from a2sf.report.tables.layout import Table, build_tables
from a2sf.report.tables.text import TextTable
from a2sf.store.aggregates import Group as TaskGroup
from a2sf.store.runs import StoredCell

SCREEN_COLUMNS = 12
"""With more columns of numbers a screen shows groups without their tasks."""


def screen_table(cells: Sequence[StoredCell], groups: Sequence[TaskGroup] = ()) -> Group:
    """The tables that end a sweep, for the screen: no tests, partial grids allowed (a missing cell is a dash)."""
    if not cells:
        return Group()
    grid = grid_of(cells, Selection(mixed=True), groups)
    notes = [escape(note) for note in grid.notes if groups]
    return Group(*screen(build_tables(grid, tested=False)), *notes)


def screen(tables: Sequence[Table], stderr: bool = False) -> list[RichTable]:
    """Rich tables, budgets apart."""
    markup = Markup(bold=lambda text: f"[bold]{text}[/bold]", text=escape, stderr=stderr)
    rendered = []
    for table in map(_narrow, tables):
        out = RichTable(
            title=escape(table.title),
            title_justify="left",
            caption=" ".join(filter(None, [legend(table), *table.notes])) or None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, head in enumerate(header(table)):
            out.add_column(escape(head), justify="left" if i < len(table.heads) else "right", overflow="fold")
        for row, following in zip(table.rows, [*table.rows[1:], None], strict=True):
            out.add_row(
                *texts(table, row, markup), end_section=following is not None and following.budget != row.budget
            )
        rendered.append(out)
    return rendered


def _narrow(table: Table) -> Table:
    """What a screen has room for: of a large group the score without its tasks'; the only note left says so."""
    if len(table.columns) <= SCREEN_COLUMNS or not table.members:
        return replace(table, notes=())
    message = f"{len(table.members)} tasks of these groups are only in the files."
    return replace(table, columns=[c for c in table.columns if c not in table.members], notes=(message,))


def text_screen(tables: Sequence[TextTable]) -> list[RichTable]:
    """Rich tables."""
    rendered = []
    for table in tables:
        layout = {"title_justify": "left", "caption_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
        out = RichTable(title=escape(table.title), caption=escape(table.legend), **layout)  # type: ignore[arg-type]
        for head in map(str, table.frame):
            out.add_column(escape(head), justify="left" if head in table.words else "right", overflow="fold")
        for row in table.frame.to_numpy().tolist():
            out.add_row(*map(escape, row))
        rendered.append(out)
    return rendered
