"""Descriptions of a class and its attributes, read from its docstring, for the help of all commands."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

from a2sf.policies.base import Policy


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


PAPER = re.compile(
    r"(?:Papers?|Source): "
    # up to the arXiv number in brackets, else to any brackets of the sentence, else to its end
    r"((?:.*?\([^)]*\d{4}\.\d{4,5}[^)]*\)|(?:[^.(]|et al\.)*\([^)]*\)|.*?\.)"
    r"(?:(?:;| and) [^();:]*\([^)]*\d{4}\.\d{4,5}[^)]*\))*)",
    re.DOTALL,
)


def paper(cls: type) -> str | None:
    """The reference after `Paper:` or `Source:` in the docstring of the class or of its module; None: there is none."""
    for text in (_text(cls), inspect.getdoc(sys.modules[cls.__module__]) or ""):
        if (found := PAPER.search(text)) is not None:
            return " ".join(found[1].split()).rstrip(".")
    return None


def policy_summary(cls: type) -> str:
    """The first paragraph of a policy's file, if the file has only this policy; else that of the class."""
    module = sys.modules[cls.__module__]
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == cls.__module__]
    alone = sum(issubclass(c, Policy) for c in classes) == 1
    if not alone or not module.__doc__:
        return summary(cls)
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def idea_and_deviations(cls: type) -> tuple[str, str]:
    """What the docstrings of a policy's file and class say besides the summary, the paper and the attributes.

    Returns:
        The idea, and the text after `Deviations:`, each with paragraphs separated by empty lines; "" where there is none.
    """
    texts = [inspect.getdoc(sys.modules[cls.__module__]) or ""]
    texts += [_text(cls).partition("\nAttributes:")[0]] if (vars(cls).get("__doc__") or "").count("\n") else []
    ideas, deviations = [], []
    for paragraph in (p for text in texts for p in text.split("\n\n")[1:]):
        idea, _, deviation = PAPER.sub("", " ".join(paragraph.split())).partition("Deviations: ")
        idea = idea.strip(" .:,;").removeprefix("Idea: ")
        ideas += [f"{idea[0].upper()}{idea[1:]}."] if idea else []
        deviations += [f"{deviation[0].upper()}{deviation[1:]}"] if deviation else []
    return "\n\n".join(ideas), "\n\n".join(deviations)


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
