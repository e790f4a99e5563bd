"""Descriptions of a class and its attributes, read from its docstring, for the help of all commands."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys


def summary(cls: type) -> str:
    """The first paragraph of the class's docstring; of its module's where it has none."""
    return " ".join(_text(cls).split("\n\n")[0].split())


def attributes(cls: type, *, full: bool = False) -> dict[str, str]:
    """Attribute -> its description under `Attributes:`; the first sentence only, unless `full`."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in _section(_text(cls)):
        if (head := re.match(r"    (\w+(?:, \w+)*): (.*)", line)) is not None:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif names:
            found |= {n: f"{found[n]} {line.strip()}" for n in names}
    return found if full else {name: re.split(r"\.(?:\s|$)", text)[0].strip() for name, text in found.items()}


def paper(cls: type) -> str | None:
    """The sentence after `Paper:` or `Source:` in the docstring of the class or of its module; None: there is none."""
    for text in (_text(cls), inspect.getdoc(sys.modules[cls.__module__]) or ""):
        if (
            found := re.search(r"(?:Papers?|Source): (.*?\([^)]*\d{4}\.\d{4,5}[^)]*\)|.*?\.)", text, re.DOTALL)
        ) is not None:
            return " ".join(found[1].split()).rstrip(".")
    return None


def _text(cls: type) -> str:
    text = vars(cls).get("__doc__") or ""
    made_by_dataclass = dataclasses.is_dataclass(cls) and text.startswith(f"{cls.__name__}(")
    if not text or made_by_dataclass:
        return inspect.getdoc(sys.modules[cls.__module__]) or ""
    return inspect.cleandoc(text)


def _section(text: str) -> list[str]:
    lines = text.splitlines()
    if "Attributes:" not in lines:
        return []
    after = lines[lines.index("Attributes:") + 1 :]
    end = next((i for i, line in enumerate(after) if line and not line.startswith(" ")), len(after))
    return [line for line in after[:end] if line.strip()]
