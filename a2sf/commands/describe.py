"""One line about a class and each of its attributes, from its docstring: written once, shown by every help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys


def summary(cls: type) -> str:
    """The first paragraph of the class's docstring; of its module's where it has none."""
    return " ".join(_text(cls).split("\n\n")[0].split())


def attributes(cls: type, *, whole: bool = False) -> dict[str, str]:
    """Attribute -> the first sentence about it under `Attributes:`; `whole`: all that stands there."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in _section(_text(cls)):
        if (head := re.match(r"    (\w+(?:, \w+)*): (.*)", line)) is not None:
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif names:
            found |= {n: f"{found[n]} {line.strip()}" for n in names}
    return found if whole else {name: re.split(r"\.(?:\s|$)", text)[0].strip() for name, text in found.items()}


def paper(cls: type) -> str | None:
    """What follows `Paper:` or `Source:` in the class's docstring or its module's, up to the end of the sentence."""
    for text in (_text(cls), inspect.getdoc(sys.modules[cls.__module__]) or ""):
        if (
            found := re.search(r"(?:Papers?|Source): (.*?\([^)]*\d{4}\.\d{4,5}[^)]*\)|.*?\.)", text, re.DOTALL)
        ) is not None:
            return " ".join(found[1].split()).rstrip(".")
    return None


def _text(cls: type) -> str:
    own = vars(cls).get("__doc__") or ""
    if not own or (dataclasses.is_dataclass(cls) and own.startswith(f"{cls.__name__}(")):  # what @dataclass makes up
        return inspect.getdoc(sys.modules[cls.__module__]) or ""
    return inspect.cleandoc(own)


def _section(text: str) -> list[str]:
    lines = text.splitlines()
    if "Attributes:" not in lines:
        return []
    after = lines[lines.index("Attributes:") + 1 :]
    end = next((i for i, line in enumerate(after) if line and not line.startswith(" ")), len(after))
    return [line for line in after[:end] if line.strip()]
