"""What to say of an override that Hydra's grammar does not read: one sentence that shows it as it must be written."""

from __future__ import annotations

import re
import shlex

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException

from a2sf.errors import ConfigError

PLAIN = re.compile(r"[\w.+/\\%*@?|-]+", re.ASCII)
"""A value that Hydra reads without quotes."""


def explain_override(error: HydraException) -> str | None:
    """One sentence for an override that cannot be read or has several meanings; None for any other error."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    ambiguous = re.search(r"Ambiguous value for argument '(.*)'", str(error))
    if isinstance(error, ConfigCompositionException) and ambiguous:
        key, value = _parts(ambiguous[1])
        return (
            f"{key}={value} can mean three things: give {_shell(f'{key}=[{value}]')} for a list, {quoted(key, value)} "
            "for one value with a comma in it, or -m to run each value."
        )
    return None


def check_trackers(override: str) -> None:
    """Refuse `tracker=[...]` that names one file twice, which Hydra would take for one.

    Raises:
        ConfigError: naming it.
    """
    key, value = _parts(override)
    names = [n.strip() for n in value.strip("[]").split(",")] if value.startswith("[") else []
    if key.lstrip("+") == "tracker" and (twice := next((n for n in names if names.count(n) > 1), None)):
        raise ConfigError("tracker", value, f"it names {twice} twice; give one of each kind")


def quoted(key: str, value: str) -> str:
    """`key=value` as a shell and Hydra both take it for this very text; the items of a list are quoted one by one."""
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip() for item in value[1:-1].split(",")]
        return _shell(f"{key}=[{','.join(item if PLAIN.fullmatch(item) else quote(item) for item in items)}]")
    return _shell(f"{key}={quote(value)}")


def quote(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar, where a backslash only counts before a quote."""
    escaped = re.sub(r'(\\*)"', lambda m: 2 * m[1] + r"\"", text)
    ending = re.search(r"\\*$", escaped)
    return f'"{escaped}{ending[0] if ending else ""}"'


def _unreadable(override: str) -> str:
    key, value = _parts(override)
    if not key or "=" not in override:
        return f"{override} is not an override: give key=value, such as limit=100."
    if re.search(r"[\s,][\w.]+=", value):
        return f"{override} cannot be read: give each key=value as an argument of its own, with a space between them."
    if value[:1] in ("[", "{") and value.count(value[0]) != value.count("]" if value[0] == "[" else "}"):
        return f"{override} cannot be read: a bracket is not closed (or the shell took part of it, then quote it all)."
    return (
        f"{override} cannot be read: brackets, =, comma, colon, space and letters outside ASCII mean something to Hydra or "
        f"are not allowed, so quote the value: {quoted(key, value)}."
    )


def _parts(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.strip().removeprefix("++"), value.strip()


def _shell(text: str) -> str:
    return shlex.quote(text)
