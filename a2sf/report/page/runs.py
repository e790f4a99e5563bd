"""`compare.html`: a comparison of finished runs as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from a2sf import atomic
from a2sf.analysis.runs.run import Run
from a2sf.report.page.template import HERE, template, text_view
from a2sf.report.tables.text import TextTable


def write_comparison(
    target: Path, runs: Sequence[Run], tables: Sequence[TextTable], notes: Sequence[str], figures: Sequence[Path]
) -> Path:
    """Render the page; the file is written completely or not at all.

    Args:
        runs: the reference first.
        figures: SVG files, which become part of the page.
    """
    html = template("compare.html.j2").render(
        title=f"Runs against {runs[0].label}",
        runs=[(r.label, r.source) for r in runs],
        tables=[text_view(table) for table in tables],
        notes=notes,
        figures=[_svg(file) for file in figures],
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "tables.js").read_text(encoding="utf-8"),
    )
    atomic.write(target, html)
    return target


def _svg(file: Path) -> str:
    """The picture's element, without what comes before it in a file of its own."""
    text = file.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
