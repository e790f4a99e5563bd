"""What the pages of a sweep and of a comparison share: the templates' environment, and tables of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from a2sf.report.tables.text import TextTable

HERE = Path(__file__).parent


def template(name: str) -> Template:
    """A template of this folder; it refuses names that are not defined."""
    environment = Environment(
        loader=PackageLoader("a2sf.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def table_cell(
    text: str, kind: str = "", value: float | None = None, title: str = "", sign: str = ""
) -> dict[str, Any]:
    """A cell for the template: its text and sign, its class, the value that it is sorted by, and its tooltip."""
    return {"text": text, "kind": kind, "value": value, "title": title, "sign": sign}


def text_view(table: TextTable) -> dict[str, Any]:
    """A table of texts for the template."""
    heads = [(str(head), head in table.words) for head in table.frame]
    rows = [
        {
            "reference": False,
            "cells": [table_cell(str(v), "word" if w else "") for v, (_, w) in zip(row, heads, strict=True)],
        }
        for row in table.frame.to_numpy().tolist()
    ]
    place = {"model": table.model, "shots": "" if table.shots is None else table.shots, "title": table.title}
    return place | {"header": heads, "rows": rows, "legend": table.legend, "notes": ()}
