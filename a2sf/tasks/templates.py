"""Which fields of a document the templates of a task use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables

KEYS = ("doc_to_text", "doc_to_choice", "doc_to_target")


def fields_used(config: Mapping[str, Any]) -> set[str]:
    """The names that a task's templates use; empty if a function of the task changes its documents."""
    if config.get("process_docs") is not None:
        return set()
    names: set[str] = set()
    for tree in _trees(config.get(key) for key in KEYS):
        names |= find_undeclared_variables(tree)
    return names


def null_fields(templates: Iterable[Any], document: Any) -> list[str]:
    """The fields of a document that are null and that templates print, as `None`.

    Args:
        templates: values of `doc_to_text` and the like: a template, or the name of a field; others are ignored.
        document: a mapping; the result is empty for any other kind of document.
    """
    if not isinstance(document, Mapping):
        return []
    names = [name for t in templates if isinstance(t, str) for name in ((t,) if t in document else _printed(t))]
    return [name for name in dict.fromkeys(names) if name in document and document[name] is None]


def _trees(templates: Iterable[Any]) -> list[nodes.Template]:
    return [tree for t in templates if isinstance(t, str) and (tree := _tree(t)) is not None]


@cache
def _tree(template: str) -> nodes.Template | None:
    try:
        return Environment().parse(template)
    except TemplateError:
        return None


@cache
def _printed(template: str) -> tuple[str, ...]:
    """Names that are printed in every document, as in `{{question}}`; not those of conditions, loops and filters."""
    tree = _tree(template)
    outputs = [node for node in tree.body if isinstance(node, nodes.Output)] if tree is not None else []
    return tuple(n.name for output in outputs for n in output.nodes if isinstance(n, nodes.Name))
