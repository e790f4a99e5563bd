"""Which implementation of the recursion runs: `attend` chooses one, or takes the one that is named."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from a2sf.engine.kernels.phases import by_phases, needs_every_step
from a2sf.engine.kernels.registry import REFERENCE, REGISTRY, TORCH, Backend, NewCache
from a2sf.engine.kernels.registry import CacheShape as CacheShape
from a2sf.engine.kernels.registry import TokenCache as TokenCache
from a2sf.engine.kernels.registry import knows as knows
from a2sf.engine.kernels.split import splitter_for
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, AttentionCall, EvictionState, Options, Segments
from a2sf.errors import ConfigError, Notice, UnsoundKernelError, UserError, nearest
from a2sf.policies.model.softmax import PLAIN, Softmax

BACKENDS = tuple(b.name for b in REGISTRY if b.selectable)
_collecting: ContextVar[tuple[set[str], ...]] = ContextVar("collecting", default=())


@contextmanager
def backends_run() -> Iterator[set[str]]:
    """Collect the names of the implementations that run inside: of `BACKENDS`, or `dense`."""
    names: set[str] = set()
    before = _collecting.get()
    try:
        _collecting.set((*before, names))
        yield names
    finally:
        _collecting.set(before)


def note_backend(name: str) -> None:
    """Add an implementation to the names of every open `backends_run`."""
    for names in _collecting.get():
        names.add(name)


def check_backend(backend: str) -> None:
    """Raise `ConfigError` unless `backend` is `auto` or a name in `BACKENDS`."""
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(
            "backend", backend, f"give auto or one of {', '.join(BACKENDS)}{nearest(str(backend), BACKENDS)}"
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: Options,
    state: EvictionState | None = None,
    *,
    backend: str = "auto",
) -> Attended:
    """Attend `segments` with the best backend for the device, or a named one; arguments as in `AttentionCall`.

    Raises:
        ConfigError: if `backend` is unknown, or cannot serve such tensors or compute such attention.
        UserError: if the policy looks at later tokens and does not see whole sequences.
    """
    check_backend(backend)
    return _attend(AttentionCall(query, key, value, segments, options, state), backend)


def _attend(call: AttentionCall, backend: str) -> Attended:
    segments, device = call.segments, call.query.device.type
    if segments.rule.precompute is not None and (call.state is not None or bool((segments.parent >= 0).any())):
        raise UserError("a policy that looks at later tokens needs each sequence as one segment, from its first token")
    # it would lower the precision of scores
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _attend(call, backend)
    named = None if backend == "auto" else next(b for b in REGISTRY if b.name == backend)
    softmax = call.options.softmax
    if named is not None and (reason := named.serves(call.query) or named.computes(softmax)) is not None:
        raise ConfigError("backend", backend, reason)

    split = splitter_for(segments)
    if split is not None and segments.rule.heads:  # which no backend does itself
        return split(lambda simpler: _attend(simpler, backend), call)
    chosen = named or _choose(call)
    if chosen.computes(softmax) is not None or chosen.supports(call) is not None:
        if split is not None:
            return split(lambda simpler: _attend(simpler, backend), call)
        chosen = TORCH
    if segments.growth is not None and chosen is not REFERENCE:
        if not needs_every_step(segments):
            return by_phases(lambda constant: _attend(constant, backend), call)
        chosen = REFERENCE
    try:
        done = chosen.attend(call)
    except UnsoundKernelError as error:
        if named is not None:
            raise
        warnings.warn(f"{error} It runs now, and is slower.", Notice, stacklevel=3)
        chosen = TORCH
        done = chosen.attend(call)
    note_backend(chosen.name)
    return done


def new_cache(
    retention: BatchRetention, like: Tensor, backend: str = "auto", softmax: Softmax = PLAIN
) -> NewCache | None:
    """What makes memory to read on in token by token, for keys like `like`; None where states are handed on instead."""
    able = (b for b in REGISTRY if b.name == backend or (backend == "auto" and b.automatic))
    made = (b.new_cache(retention, like) for b in able if b.computes(softmax) is None)
    return next((cache for cache in made if cache is not None), None)


def _choose(call: AttentionCall) -> Backend:
    for backend in REGISTRY:
        fits = backend.automatic and backend.serves(call.query) is None
        if fits and (backend.compiled or backend.supports(call) is None):
            return backend
    return TORCH
