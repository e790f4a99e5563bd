"""Which implementation of the recursion runs: `attend` chooses, and can be told."""

from __future__ import annotations

from torch import Tensor

from a2sf.errors import ConfigError
from a2sf.eviction import Attended, EvictionState, Options, Segments, reference

BACKENDS = {"reference": reference}


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
    """Attend `segments` with the best backend for the device, or a named one; arguments as in `a2sf.eviction.reference`.

    Raises:
        ConfigError: if `backend` is unknown.
    """
    if backend == "auto":
        backend = "reference"
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, f"give auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](query, key, value, segments, options, state)
