"""Overrides on the command line: values that are text, keys of the previous version, and messages about errors.

In Hydra's grammar 1.10 is the number 1.1 for any key, and a backslash in quotes is a backslash. Here the value of a key that
holds text is exactly the text that was written, and text in double quotes is read as in JSON and YAML: `"\\n"` is a line
break. In single quotes, and without quotes, a backslash is a backslash, as in YAML.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException

from a2sf.compat.hydra import OverrideLexer, OverrideParser, in_single_quotes, syntax_tree
from a2sf.errors import ConfigError
from a2sf.policies.renamed import notice
from a2sf.sweep.config import schema

PLAIN = re.compile(r"[\w.+/\\%*@?|-]+", re.ASCII)
"""A value that needs no quotes in Hydra."""
KEY = re.compile(r"^([+~]*)([\w.]+)")

NUMBERS = (OverrideLexer.INT, OverrideLexer.FLOAT)
NOT_TEXT = (*NUMBERS, OverrideLexer.BOOL)
ONE_NAME = ("model", "policy", "schedule", "data")
"""Groups of which one file is chosen, so that a list is not allowed."""
EMPTY = re.compile(r"(^|[,\[])\s*,|,\s*($|\])")
UNCHANGED = {"choice", "shuffle"}
"""Functions of the grammar that do not change their arguments."""


@cache
def as_written(override: str) -> str:
    """The override in this version's keys, with text quoted: `model.revision=1.10` becomes `model.revision='1.10'`.

    An override that cannot be parsed is returned unchanged, so that Hydra refuses it.

    Raises:
        ConfigError: for text in double quotes with an escape that JSON does not have.
    """
    override = KEY.sub(_current, override, count=1)
    try:
        tree = syntax_tree(override)
    except HydraException:
        return override
    if tree.key() is None or tree.value() is None:
        return override
    key = tree.key().getText()
    if key.startswith("hydra"):
        return override
    # quote each token in its place, the last one first, so that the positions of the others are still valid
    for token in reversed(list(_tokens(tree.value()))):
        text = token.text
        if token.type == OverrideLexer.QUOTED_VALUE and text.startswith('"') and "\\" in text:
            text = _unescaped(key, text)
        elif token.type not in (NOT_TEXT if schema.holds_text(key) else NUMBERS if schema.holds_names(key) else ()):
            continue
        # in single quotes, so that a second call changes nothing
        override = override[: token.start] + in_single_quotes(text) + override[token.stop + 1 :]
    return override


def _current(key: re.Match[str]) -> str:
    new = schema.renamed(key[2])
    if new != key[2]:
        notice(key[2], new)
    return key[1] + new


def _tokens(node: Any, inside: str | None = None) -> Any:
    """The tokens under a node that are a value by themselves and that no function changes."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        tokens = [t.symbol for t in node.getChildren() if t.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and (inside is None or tokens[0].type == OverrideLexer.QUOTED_VALUE):
            yield tokens[0]
        return
    if isinstance(node, OverrideParser.FunctionContext) and (name := node.ID().getText()) not in UNCHANGED:
        inside = name
    for child in node.getChildren() if hasattr(node, "getChildren") else ():
        yield from _tokens(child, inside)


def _unescaped(key: str, quoted_text: str) -> str:
    try:
        return str(json.loads(quoted_text, strict=False))
    except json.JSONDecodeError as error:
        escape = quoted_text[error.pos : error.pos + 2] if error.msg.startswith("Invalid \\") else "its end"
        allowed = (
            f"in double quotes {escape} is not an escape of JSON; write two backslashes for one, or use single quotes"
        )
        raise ConfigError(key, quoted_text, allowed) from error


def explain_override(error: HydraException) -> str | None:
    """One sentence for an override that cannot be read or has several meanings; None for any other error."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    ambiguous = re.search(r"Ambiguous value for argument '(.*)'", str(error))
    if isinstance(error, ConfigCompositionException) and ambiguous:
        key, value = _parts(ambiguous[1])
        each = f"-m to run each value: a2sf run -m {shlex.quote(f'{key}={value}')}"
        if not schema.may_be_list(key) or key in ONE_NAME:
            text = f"{quoted(key, value)} for one value with a comma in it, or " if schema.holds_text(key) else ""
            return f"{key}={value} is several values: give {text}{each}."
        return (
            f"{key}={value} has three possible meanings: give {shlex.quote(f'{key}=[{value}]')} for a list, "
            f"{quoted(key, value)} for one value with a comma in it, or -m to run each value."
        )
    return None


def check_trackers(override: str) -> None:
    """Refuse `tracker=[...]` that names one file twice, which Hydra would accept as one.

    Raises:
        ConfigError: naming it.
    """
    key, value = _parts(override)
    names = [n.strip() for n in value.strip("[]").split(",")] if value.startswith("[") else []
    if key.lstrip("+") == "tracker" and (twice := next((n for n in names if names.count(n) > 1), None)):
        raise ConfigError("tracker", value, f"it names {twice} twice; give one of each kind")


def quoted(key: str, value: str) -> str:
    """`key=value` quoted for a shell and for Hydra; the items of a list are quoted one by one."""
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip() for item in value[1:-1].split(",")]
        return shlex.quote(f"{key}=[{','.join(item if PLAIN.fullmatch(item) else _json(item) for item in items)}]")
    return shlex.quote(f"{key}={_json(value)}")


def quote(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar, where a backslash is an escape only before a quote."""
    escaped = re.sub(r'(\\*)"', lambda m: 2 * m[1] + r"\"", text)
    ending = re.search(r"\\*$", escaped)
    return f'"{escaped}{ending[0] if ending else ""}"'


def _unreadable(override: str) -> str:
    key, value = _parts(override)
    if not key or "=" not in override:
        return f"{override} is not an override: give key=value, such as limit=100."
    if EMPTY.search(value) and not re.search("['\"]", value):
        return f"{override} cannot be read: there is an empty value beside a comma; leave the comma out."
    if re.search(r"[\s,][\w.]+=", value):
        return f"{override} cannot be read: give each key=value as a separate argument, with a space between them."
    if value[:1] in ("[", "{") and value.count(value[0]) != value.count("]" if value[0] == "[" else "}"):
        return f"{override} cannot be read: a bracket is not closed (or the shell took part of it, then quote it all)."
    return (
        f"{override} cannot be read: brackets, =, comma, colon, space and letters outside ASCII have a meaning in Hydra or "
        f"are not allowed, so quote the value: {quoted(key, value)}."
    )


def _parts(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.strip().removeprefix("++"), value.strip()


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
