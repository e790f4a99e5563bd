"""Tables on the screen, in blocks that fit its width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from a2sf.analysis.results.gather import grids_of
from a2sf.analysis.results.selection import Selection
from a2sf.report.tables.cells import Markup, header, legend, reference_rows, texts
from a2sf.report.tables.layout import build_tables
from a2sf.report.tables.table import Table
from a2sf.report.tables.text import TextTable
from a2sf.store.aggregates import TaskGroup
from a2sf.store.runs import StoredCell

GAP = 2
"""Characters between two columns."""
HEAD = 12
"""Characters of a heading before it is broken into lines."""
SCREEN_COLUMNS = 12
"""With more columns of numbers a screen shows groups without their tasks."""


def screen_table(cells: Sequence[StoredCell], groups: Sequence[TaskGroup] = ()) -> Group:
    """The tables that end a sweep, for the screen: no tests, partial grids allowed (a missing cell is a dash)."""
    if not cells:
        return Group()
    grids = list(grids_of(cells, Selection(mixed=True), groups))
    notes = dict.fromkeys(escape(note) for grid in grids for note in grid.notes if groups)
    return Group(*(table for grid in grids for table in screen(build_tables(grid, tested=False))), *notes)


def screen(tables: Sequence[Table], stderr: bool = False, interval: bool = False) -> list[Blocks]:
    """Accuracy tables with a line between budgets; the first rows are the documents and the chance level of each column."""
    markup = Markup(bold=lambda text: f"[bold]{text}[/bold]", text=escape, stderr=stderr, interval=interval)
    rendered = []
    for table in map(_narrow, tables):
        rows = [*([*map(escape, row)] for row in reference_rows(table)), *(texts(table, r, markup) for r in table.rows)]
        budgets = [*("" for _ in reference_rows(table)), *(r.budget for r in table.rows)]
        ends = tuple(i for i, (a, b) in enumerate(pairwise(budgets)) if a != b)
        below = " ".join(filter(None, [legend(table), *table.notes]))
        rendered.append(Blocks(table.title, tuple(header(table)), len(table.heads), rows, below, ends))
    return rendered


def text_screen(tables: Sequence[TextTable]) -> list[Blocks]:
    """Tables of texts."""
    rendered = []
    for table in tables:
        heads = tuple(map(str, table.frame))
        lead = next((i for i, h in enumerate(heads) if h not in ("Rank", *table.words)), len(heads))
        rows = [[*map(escape, row)] for row in table.frame.to_numpy().tolist()]
        rendered.append(Blocks(table.title, heads, lead, rows, table.legend))
    return rendered


@dataclass(frozen=True)
class Blocks:
    """A table for the screen, in blocks of as many columns as the screen is wide; each repeats the leading columns.

    Attributes:
        lead: number of leading columns.
        rows: texts with rich's markup.
        ends: numbers of the rows below which there is a line.
    """

    title: str
    heads: tuple[str, ...]
    lead: int
    rows: list[list[str]]
    legend: str
    ends: tuple[int, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="table.title")  # a title of the table would be broken at the width of a narrow one
        for block in self.columns(options.max_width):
            out = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
            for i in block:
                out.add_column(escape(self.heads[i]), justify="left" if i < self.lead else "right", overflow="fold")
                out.columns[-1].max_width = self._width(i)
            for number, row in enumerate(self.rows):
                if len(block) > self.lead and not any(row[i] for i in block[self.lead :]):
                    continue  # it says nothing of this block's columns
                out.add_row(*(row[i] for i in block), end_section=number in self.ends)
            yield out
            yield Text("")
        if self.legend:
            yield Text(f"{self.legend}\n")

    def columns(self, width: int) -> list[list[int]]:
        """The columns of each block, by their numbers."""
        leading = [*range(self.lead)]
        room = width + GAP - 1 - sum(self._width(i) + GAP for i in leading)
        blocks: list[list[int]] = []
        left = 0
        for i in range(self.lead, len(self.heads)):
            if not blocks or left < self._width(i) + GAP:
                blocks.append([*leading])
                left = room
            blocks[-1].append(i)
            left -= self._width(i) + GAP
        return blocks or [leading]

    def _width(self, i: int) -> int:
        """Of a column; a long heading is broken between its words."""
        head = self.heads[i]
        longest = max(map(cell_len, head.split()), default=0)
        return max([min(cell_len(head), max(longest, HEAD)), *(Text.from_markup(row[i]).cell_len for row in self.rows)])


def _narrow(table: Table) -> Table:
    """What a screen has room for: of a large group the score without its tasks'; the only note left says so."""
    if len(table.columns) <= SCREEN_COLUMNS or not table.members:
        return replace(table, notes=())
    message = f"{len(table.members)} tasks of these groups are only in the files."
    return replace(table, columns=[c for c in table.columns if c not in table.members], notes=(message,))
