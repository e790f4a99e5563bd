"""The site's page of each policy, from its docstring, its fields and the tables of results in docs/.

`scripts/docs_hooks.py` adds these pages when mkdocs builds the site; they are not files of the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

import baselines  # noqa: F401  # now, while sys.path begins with this clone
from a2sf.commands.policy.describe import attributes, idea_and_deviations, paper, policy_summary
from a2sf.policies.base import WHEN, Policy
from a2sf.policies.find import built_in, defaults

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLDER = "policies"
"""Of the pages, in the site."""
PAGES = (
    "methods.md",
    "methods-tables.md",
    "reference-results.md",
    "long.md",
    "generation.md",
    "lm_eval.md",
    "findings.md",
)
"""Pages in docs/ whose tables have results of policies."""
INFORMATIVE = ("Documents (n)", "Chance level", "Full cache")
"""Rows that are shown with those of a policy."""
ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{4,5})")
BORDER, ESCAPED = re.compile(r"(?<!\\)\|"), r"\\|"
"""A border between two cells of a table; a character that is none."""
NOTHING = "No reference result yet."


@dataclass(frozen=True)
class Table:
    """A Markdown table of a page.

    Attributes:
        page: the page's file in docs/.
        titles: the page's title, and the nearest heading above the table; one where they are the same.
        columns: cells of the header.
        alignment: the line under the header.
        rows: cells of each row.
    """

    page: str
    titles: tuple[str, ...]
    columns: list[str]
    alignment: str
    rows: list[list[str]]


def names() -> list[str]:
    """Of all policies, in the order of their labels."""
    return sorted(built_in(), key=lambda name: built_in()[name].label.lower())


def policy_page(name: str) -> str:
    """A policy's page, in Markdown."""
    cls = built_in()[name]
    idea, deviations = idea_and_deviations(cls)
    reference = paper(cls)
    facts = {
        "name": f"`policy={name}`",
        "paper": "none; this package defines it" if reference in (None, "none") else _linked(str(reference)),
        "schedules": _schedules(cls),
        "causal": "yes" if cls.causal else "no: it uses later tokens, so that it is an oracle (an upper bound)",
        "code": f"`{cls.__module__.replace('.', '/')}.py`",
    }
    parts = [
        f"# {cls.label}",
        f"<!-- made by scripts/policy_pages.py from {cls.__module__} -->",
        _summary(cls),
        _markdown([["", ""], ["---", "---"], *([key, value] for key, value in facts.items())]),
        *(["## Idea", _linked(idea)] if idea else []),
        *(["## Deviations from the paper", _linked(deviations)] if deviations else []),
        "## Settings",
        _settings(cls),
        "## Run it",
        f"```console\n$ {command(cls)}\n```",
        "## Reference results",
        _results(cls),
        *(["## Compared with other code", other] if (other := _parity(name)) else []),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(cls: type[Policy]) -> str:
    text = policy_summary(cls).removeprefix(f"{cls.label}: ")
    return f"{text[0].upper()}{text[1:]}"


def command(cls: type[Policy]) -> str:
    """A command that runs the policy, beside the full cache where it can; in capitals what only the user knows."""
    own = "".join(f" policy.{key}={key.upper()}" for key in required(cls))
    budget = " budget.ratio=0.2" if cls.uses_budget else ""
    context = " budget.base=context" if cls.schedules == ("prompt",) else ""
    policies = cls.name if cls.name == "full" else f"full,{cls.name}"
    if own:  # another policy has no such setting
        policies = cls.name
    grid = "-m " if "," in policies else ""
    return f"a2sf run {grid}policy={policies}{own}{budget}{context} tasks=[piqa] data=bundle limit=100"


def required(cls: type[Policy]) -> list[str]:
    """The settings that the user must give, which conf/policy leaves empty."""
    file = ROOT / "conf" / "policy" / f"{cls.name}.yaml"
    return [str(key) for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items() if value is None]


def _schedules(cls: type[Policy]) -> str:
    known = ", ".join(f"`{when}`" for when in cls.schedules)
    return f"all: {known}" if set(cls.schedules) == set(WHEN) else f"only {known}"


def _settings(cls: type[Policy]) -> str:
    known = defaults(cls)
    if not known:
        return "It has no settings of its own."
    needed = required(cls)
    rows = []
    for name, value in known.items():
        default = "required" if name in needed else "" if value in ("", None) else f"`{value}`"
        rows.append([f"`policy.{name}`", default, meaning(cls, name)])
    return _markdown([["key", "default", "meaning"], ["---", "---", "---"], *rows])


def meaning(cls: type[Policy], setting: str) -> str:
    """What a setting means; "as for ..." is replaced by the text of the policy that it is inherited from."""
    texts = [attributes(c, full=True).get(setting, "") for c in cls.__mro__ if issubclass(c, Policy)]
    return next((t for t in texts if t and not t.startswith("as for ")), "")


def _results(cls: type[Policy]) -> str:
    found = [
        (table, own) for table in tables() if (own := [row for row in table.rows if _is_of(row, table, cls.label)])
    ]
    if not found:
        return NOTHING
    parts = ["Rows of the tables on other pages; marks (bold, ↓) and corrections are those of the complete table."]
    before: tuple[str, ...] = ()
    for table, own in found:
        shown = [row for row in table.rows if row[table.columns.index("Policy")] in INFORMATIVE and row not in own]
        rows = _markdown([table.columns, *shown, *own], table.alignment)
        if table.titles != before:
            parts += [f"### {': '.join(table.titles)}", f"[complete table](../{table.page})"]
        parts += [rows]
        before = table.titles
    return "\n\n".join(parts)


def _is_of(row: list[str], table: Table, label: str) -> bool:
    """Whether a row is of a policy: its label, perhaps followed by a schedule, a factor or the name of settings."""
    cell = row[table.columns.index("Policy")]
    return re.fullmatch(rf"{re.escape(label)}(,? \d[\d.]*)?(, .*| \(.*\))?", cell) is not None


def _parity(name: str) -> str:
    """The rows about a policy on the page that compares policies with other code."""
    parts = []
    for table in _tables_of("parity.md"):
        if "ours" in table.columns:
            at = table.columns.index("ours")
            rows = [row for row in table.rows if name in re.findall(r"`(\w+)`", row[at])]
            parts += [_markdown([table.columns, *rows], table.alignment)] if rows else []
    return "\n\n".join([*parts, "How this was compared: [parity](../parity.md)."]) if parts else ""


@cache
def tables() -> list[Table]:
    """Tables of results with a row for each system, without rankings and tests against other policies."""
    found = [table for page in PAGES for table in _tables_of(page)]
    return [t for t in found if "Policy" in t.columns and not {"Rank", "Against"} & set(t.columns)]


def _tables_of(page: str) -> Iterator[Table]:
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    title = heading = ""
    for i, line in enumerate(lines):
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
            title = title or heading
        elif re.fullmatch(r"\|[-:| ]+\|", line) and i and lines[i - 1].startswith("|"):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("|")), len(lines))
            rows = [_cells(row) for row in lines[i + 1 : end]]
            yield Table(page, tuple(dict.fromkeys((title, heading))), _cells(lines[i - 1]), line, rows)


def _cells(line: str) -> list[str]:
    r"""The cells of a table's line; `\|` is no border."""
    return [cell.strip() for cell in BORDER.split(line.strip().removeprefix("|").removesuffix("|"))]


def _markdown(rows: list[list[str]], alignment: str = "") -> str:
    head, *rest = [f"| {' | '.join(BORDER.sub(ESCAPED, cell) for cell in row)} |" for row in rows]
    return "\n".join([head, *([alignment] if alignment else []), *rest])


def _linked(text: str) -> str:
    """The text with links to arXiv."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
