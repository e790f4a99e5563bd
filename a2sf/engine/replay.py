"""Replay files: what a system retained of some texts, as JSON that any engine can write (docs/replay.md).

A file holds the tokens of each text, and which positions every layer and KV head retained after each of its cuts. It is
checked completely when it is read, so that whatever computes with it need not ask again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2sf import atomic
from a2sf.engine.trace import Trace, cached_by_step
from a2sf.errors import ConfigError, UserError, first_line

FORMAT, VERSION = "kv-replay", 1
KEYS = ("format", "version", "model", "weights", "layers", "kv_heads", "system", "documents")
DOCUMENT_KEYS = ("task", "document", "prompt", "text", "cuts", "evicted_at", "loglikelihoods")
CUT_KEYS = ("step", "layer", "head", "kept")
ROUNDING = 1e-3
"""By how much another engine's log-likelihood may be above 0."""
LONGEST = 40
"""Characters of a value that a message shows."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One text, and what was evicted while it was read.

    Attributes:
        task, document: where it is from; "" and its place in the file where that is not said.
        prompt, text: the tokens of the prompt, and those that follow it, of which the last was predicted and not read.
        evicted_at: int32 [L, K, T]: the step after which each of the T tokens that are read was evicted, T if it never was.
        loglikelihoods: of each token of the text, as the other system computed it, in nats; None: not said.
    """

    task: str
    document: int
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    evicted_at: np.ndarray
    loglikelihoods: tuple[float, ...] | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that are read."""
        return (*self.prompt, *self.text[:-1])

    def cached(self) -> np.ndarray:
        """int64 [L, K, T]: the tokens cached after each step."""
        return cached_by_step(self.evicted_at)


@dataclass(frozen=True, eq=False)
class Replay:
    """The content of a replay file.

    Attributes:
        model, weights: the model's name, and what identifies its weights; None: not said.
        layers, kv_heads: of the model.
        system: what made the file, in words.
    """

    layers: int
    kv_heads: int
    documents: tuple[Recorded, ...]
    model: str | None = None
    weights: str | None = None
    system: str = ""


def of_traces(traces: Sequence[Trace], *, task: str, model: str, weights: str | None, system: str) -> Replay:
    """Our own traces as a replay file's content.

    Raises:
        UserError: if there is none, or the traces are of a version that did not store tokens.
    """
    if not traces:
        raise UserError("there is no trace; run the cell with trace=N in another runs_dir, which records N documents")
    documents = []
    for t in traces:
        if t.tokens is None:
            raise UserError(
                "these traces were recorded by an earlier version, which stored no tokens; run the cell again with trace=N"
            )
        tokens = tuple(t.tokens.tolist())
        documents.append(Recorded(task, t.document, tokens[: t.context], tokens[t.context :], t.evicted_at))
    L, K, _ = traces[0].evicted_at.shape
    return Replay(L, K, tuple(documents), model, weights, system)


def write(path: Path, replay: Replay) -> None:
    """Write a replay file; evictions are written as `evicted_at`."""
    documents = [
        {
            "task": d.task,
            "document": d.document,
            "prompt": list(d.prompt),
            "text": list(d.text),
            "evicted_at": d.evicted_at.tolist(),
            **({} if d.loglikelihoods is None else {"loglikelihoods": list(d.loglikelihoods)}),
        }
        for d in replay.documents
    ]
    about = {"model": replay.model, "weights": replay.weights}
    body = {"format": FORMAT, "version": VERSION, **{k: v for k, v in about.items() if v is not None}}
    body |= {"layers": replay.layers, "kv_heads": replay.kv_heads, "system": replay.system, "documents": documents}
    atomic.write(path, json.dumps(body))


def read(path: Path) -> Replay:
    """Read and check a replay file.

    Raises:
        ConfigError: if something in it cannot be, with the place, the value and what is allowed.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("file", path, f"it cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ConfigError("file", path, f"it is no JSON: {first_line(error)}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ConfigError("file", path, f'a replay file is a JSON object with "format": "{FORMAT}" (docs/replay.md)')
    if body.get("version") != VERSION:
        raise ConfigError("version", body.get("version"), f"this version of a2sf reads version {VERSION}")
    _known("", body, KEYS)
    layers, kv_heads = (_whole(name, body.get(name), 1) for name in ("layers", "kv_heads"))
    documents = body.get("documents")
    if not isinstance(documents, list) or not documents:
        raise ConfigError("documents", type(documents).__name__, "give a list of at least one text")
    found = tuple(_document(f"documents[{i}]", i, d, layers, kv_heads) for i, d in enumerate(documents))
    texts = {name: body.get(name) for name in ("model", "weights", "system")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise ConfigError(name, value, "give a text")
    return Replay(layers, kv_heads, found, texts["model"], texts["weights"], texts["system"] or "")


def _document(at: str, place: int, given: Any, layers: int, kv_heads: int) -> Recorded:
    if not isinstance(given, dict):
        raise ConfigError(at, type(given).__name__, "give an object for each text")
    _known(f"{at}.", given, DOCUMENT_KEYS)
    prompt, text = (_tokens(f"{at}.{name}", given.get(name)) for name in ("prompt", "text"))
    T = len(prompt) + len(text) - 1
    if ("cuts" in given) == ("evicted_at" in given):
        raise ConfigError(at, "cuts and evicted_at" if "cuts" in given else "neither", "give either cuts or evicted_at")
    if "cuts" in given:
        evicted_at = _of_cuts(f"{at}.cuts", given["cuts"], (layers, kv_heads, T))
    else:
        evicted_at = _of_steps(f"{at}.evicted_at", given["evicted_at"], (layers, kv_heads, T))
    logs = given.get("loglikelihoods")
    if logs is not None:
        if not isinstance(logs, list) or len(logs) != len(text):
            given_as = f"{len(logs)} numbers" if isinstance(logs, list) else _shortened(logs)
            raise ConfigError(
                f"{at}.loglikelihoods", given_as, f"give a number for each of the text's {len(text)} tokens"
            )
        for i, x in enumerate(logs):
            if not isinstance(x, int | float) or isinstance(x, bool) or not np.isfinite(x) or x > ROUNDING:
                why = "give the logarithm of a probability, a finite number of at most 0"
                raise ConfigError(f"{at}.loglikelihoods[{i}]", _shortened(x), why)
        logs = tuple(map(float, logs))
    document = given.get("document", place)
    return Recorded(str(given.get("task") or ""), _whole(f"{at}.document", document, 0), prompt, text, evicted_at, logs)


def _of_steps(at: str, given: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """`evicted_at` as the file has it, which may also say when the last token, which is not read, was evicted."""
    L, K, T = shape
    try:
        steps = np.array(given)
    except ValueError:
        steps = np.empty(0)
    if steps.shape not in ((L, K, T), (L, K, T + 1)) or steps.dtype.kind != "i":
        raise ConfigError(
            at,
            f"a list of shape {list(steps.shape)}",
            f"give a step for each of {L} layers, {K} KV heads and the {T} tokens that are read",
        )
    steps = steps[..., :T]
    if (early := np.argwhere(steps < np.arange(T))).size:
        layer, head, position = early[0].tolist()
        raise ConfigError(
            f"{at}[{layer}][{head}][{position}]",
            int(steps[layer, head, position]),
            f"position {position} is not cached before step {position}, so that it cannot be evicted there",
        )
    return steps.clip(max=T).astype(np.int32)


def _of_cuts(at: str, given: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """`Recorded.evicted_at` of a list of cuts."""
    L, K, T = shape
    if not isinstance(given, list):
        raise ConfigError(at, type(given).__name__, "give a list of cuts; an empty one where nothing was evicted")
    cuts = []
    for i, cut in enumerate(given):
        here = f"{at}[{i}]"
        if not isinstance(cut, dict):
            raise ConfigError(here, type(cut).__name__, "give an object for each cut")
        _known(f"{here}.", cut, CUT_KEYS)
        step = _whole(f"{here}.step", cut.get("step"), 0, T, f"the text ends with token {T}")
        kept = cut.get("kept")
        if not isinstance(kept, list) or not all(isinstance(p, int) and not isinstance(p, bool) for p in kept):
            raise ConfigError(f"{here}.kept", type(kept).__name__, "give a list of positions, whole numbers from 0")
        places = [
            range(n)
            if (x := cut.get(name)) is None
            else [_whole(f"{here}.{name}", x, 0, n - 1, f"the model of this file has {n}")]
            for name, n in (("layer", L), ("head", K))
        ]
        cuts += [(step, layer, head, here, kept) for layer in places[0] for head in places[1]]
    evicted_at = np.full((L, K, T + 1), T, np.int32)
    done: dict[tuple[int, int], int] = {}
    for step, layer, head, here, kept in sorted(cuts, key=lambda c: c[:3]):
        if done.get((layer, head), -1) == step:
            raise ConfigError(
                f"{here}.step", step, f"another cut of layer {layer}, KV head {head} has this step; give one of each"
            )
        done[layer, head] = step
        _cut(here, evicted_at[layer, head], step, np.array(kept, np.int64))
    return evicted_at[..., :T]


def _cut(at: str, evicted_at: np.ndarray, step: int, kept: np.ndarray) -> None:
    """Note in `evicted_at` [T + 1] of one head what a cut evicts."""
    T = len(evicted_at) - 1
    key = f"{at}.kept"
    cached = evicted_at[: step + 1] == T
    if (beyond := kept[(kept < 0) | (kept > T)]).size:
        raise ConfigError(key, int(beyond[0]), f"positions are from 0 to {T}, the last one of this text")
    if (later := kept[kept > step]).size:
        raise ConfigError(key, int(later[0]), f"step {step} cannot retain a later position; it has read 0 to {step}")
    if len(np.unique(kept)) < len(kept):
        twice = int(kept[np.argmax(np.bincount(kept)[kept] > 1)])
        raise ConfigError(key, twice, "each position is retained once")
    if (back := kept[~cached[kept]]).size:
        raise ConfigError(
            key,
            int(back[0]),
            f"it comes back at step {step}, after step {int(evicted_at[back[0]])} evicted it; {len(kept)} positions are "
            f"retained and {int(cached.sum())} are cached",
        )
    cached[kept] = False
    if step < T:
        evicted_at[: step + 1][cached] = step


def _known(at: str, given: dict[str, Any], keys: Sequence[str]) -> None:
    if unknown := [k for k in given if k not in keys]:
        raise ConfigError(
            f"{at}{unknown[0]}", _shortened(given[unknown[0]]), f"there are only the keys {', '.join(keys)}"
        )


def _shortened(value: Any) -> str:
    """A value for a message, of which a long one has its beginning."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _whole(key: str, value: Any, least: int, most: int | None = None, why: str = "") -> int:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        upto = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(key, value, f"give a whole number {upto}{f': {why}' if why else ''}")
    return int(value)


def _tokens(key: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(t, int) and t >= 0 for t in given):
        raise ConfigError(key, type(given).__name__, "give a list of at least one token, each by its number")
    return tuple(given)
