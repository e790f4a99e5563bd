"""`compare.html`: a comparison of finished runs as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from a2sf import atomic
from a2sf.analysis.runs.run import Run
from a2sf.report.tables.text import TextTable

HERE = Path(__file__).parent


def write_comparison(
    target: Path, runs: Sequence[Run], tables: Sequence[TextTable], notes: Sequence[str], figures: Sequence[Path]
) -> Path:
    """Render the page; the file is written completely or not at all.

    Args:
        runs: the reference first.
        figures: SVG files, which become part of the page.
    """
    environment = Environment(
        loader=PackageLoader("a2sf.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("compare.html.j2").render(
        title=f"Runs against {runs[0].label}",
        runs=[(r.label, r.source) for r in runs],
        tables=[_view(table) for table in tables],
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


def _view(table: TextTable) -> dict[str, Any]:
    """A table for the template."""
    words = [head in table.words for head in table.frame]
    rows = [
        {"reference": False, "cells": [_cell(str(v), w) for v, w in zip(row, words, strict=True)]}
        for row in table.frame.to_numpy().tolist()
    ]
    heads = [(str(head), word) for head, word in zip(table.frame, words, strict=True)]
    return {
        "model": "",
        "shots": "",
        "title": table.title,
        "header": heads,
        "rows": rows,
        "legend": table.legend,
        "notes": (),
    }


def _cell(text: str, word: bool) -> dict[str, Any]:
    return {"text": text, "kind": "word" if word else "", "value": None, "title": "", "sign": ""}
