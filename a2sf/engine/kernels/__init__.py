"""Which implementation of the recursion runs: `attend` chooses, and can be told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from a2sf.engine.eviction import reference
from a2sf.engine.kernels.dense import attend_dense, serves
from a2sf.engine.parts import by_heads, by_numbers, by_prompt
from a2sf.engine.state import Attended, EvictionState, Options, Segments
from a2sf.engine.stepwise import attend_torch
from a2sf.errors import ConfigError, Notice, UnsoundKernelError, UserError, nearest
from a2sf.policies.rule import Rule

BACKENDS = ("reference", "numba", "triton", "torch")
_listening: ContextVar[tuple[set[str], ...]] = ContextVar("listening", default=())


@contextmanager
def noting() -> Iterator[set[str]]:
    """The names of what runs inside: of `BACKENDS`, or `dense`."""
    names: set[str] = set()
    before = _listening.get()
    try:
        _listening.set((*before, names))
        yield names
    finally:
        _listening.set(before)


def note(name: str) -> None:
    """Say that an implementation runs."""
    for names in _listening.get():
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
    """Attend `segments` with the best backend for the device, or a named one; arguments as in `reference`.

    Raises:
        ConfigError: if `backend` is unknown or cannot serve this call.
        UserError: if the policy looks at later tokens and does not see whole sequences.
    """
    check_backend(backend)
    if segments.rule.precompute is not None and (state is not None or bool((segments.parent >= 0).any())):
        raise UserError("a policy that looks at later tokens needs each sequence as one segment, from its first token")
    device = query.device.type
    # it would lower the precision of scores
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return attend(query, key, value, segments, options, state, backend=backend)
    kind, asked = f"{query.dtype} tensors on {device}", backend
    if backend == "auto":
        if device != "cpu" and serves(segments, options, state):
            note("dense")
            return attend_dense(query, key, value, segments, options)
        backend = _choose(query)
    elif backend in ("numba", "triton") and query.dtype == torch.float64:
        raise ConfigError(
            "backend", backend, f"it computes in float32, and these are {kind}; give auto, torch or reference"
        )
    elif backend == "numba" and device != "cpu":
        raise ConfigError("backend", backend, f"numba serves tensors on the CPU, and these are {kind}; give auto")

    if segments.rule.heads:
        return by_numbers(partial(attend, backend=asked), query, key, value, segments, options, state)
    compiled = backend in ("numba", "triton") and segments.rule.priority_fn is None
    if compiled and segments.rule.full_heads:
        return by_heads(partial(attend, backend=asked), query, key, value, segments, options, state)
    if compiled and segments.schedule.prompt and compiled_after(segments):
        return by_prompt(partial(attend, backend=asked), query, key, value, segments, options, state)
    if backend != "reference" and not (compiled and knows(segments.rule) and not segments.schedule.prompt):
        backend = "torch"
    try:
        done = _of(backend)(query, key, value, segments, options, state)
    except UnsoundKernelError as error:
        if asked != "auto":
            raise
        warnings.warn(f"{error} It runs now, and is slower.", Notice, stacklevel=2)
        backend = "torch"
        done = attend_torch(query, key, value, segments, options, state)
    note(backend)
    return done


def _of(backend: str) -> Callable[..., Attended]:
    # imported when first used, because numba and Triton take a second to load
    if backend == "numba":
        from a2sf.engine.kernels.cpu import attend_cpu

        return attend_cpu
    if backend == "triton":
        from a2sf.engine.kernels.triton_kernel import attend_triton

        return attend_triton
    return reference if backend == "reference" else attend_torch


def compiled_after(segments: Segments) -> bool:
    """Whether a compiled kernel runs what comes after a prompt's cut: all but shares of the heads' own, step by step."""
    across_heads = segments.rule.cut is not None and segments.rule.cut.floor is not None
    return segments.schedule.then == "keep" or not across_heads


def knows(rule: Rule) -> bool:
    """Whether the compiled kernels, of the CPU and of GPUs, run a rule token by token."""
    return rule.priority_fn is None and rule.cut is None and not rule.full_heads and not rule.heads


def _choose(query: Tensor) -> str:
    if query.dtype == torch.float64:
        return "torch"
    if query.device.type == "cpu":
        return "numba"
    from a2sf.engine.kernels.triton_kernel import available

    return "triton" if query.is_cuda and available(query.device) else "torch"
