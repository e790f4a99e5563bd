"""Which implementation of the recursion runs: `attend` chooses, and can be told."""

from __future__ import annotations

import torch
from torch import Tensor

from a2sf.engine.eviction import Attended, EvictionState, Options, Segments, reference
from a2sf.engine.kernels.dense import attend_dense, serves
from a2sf.errors import ConfigError

BACKENDS = ("reference", "numba", "triton")


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
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError("backend", backend, f"give auto or one of {', '.join(BACKENDS)}")
    kind = f"{query.dtype} tensors on {query.device.type}"
    if backend == "auto":
        if query.device.type != "cpu" and serves(segments, options, state):
            return attend_dense(query, key, value, segments, options)
        backend = _choose(query)
    elif backend != "reference" and query.dtype == torch.float64:
        raise ConfigError("backend", backend, f"it computes in float32, and these are {kind}; give auto or reference")
    elif backend == "numba" and query.device.type != "cpu":
        raise ConfigError("backend", backend, f"numba serves tensors on the CPU, and these are {kind}; give auto")

    # imported when first used, because numba and Triton take a second to load
    if backend == "numba":
        from a2sf.engine.kernels.cpu import attend_cpu

        return attend_cpu(query, key, value, segments, options, state)
    if backend == "triton":
        from a2sf.engine.kernels.triton_kernel import attend_triton

        return attend_triton(query, key, value, segments, options, state)
    return reference(query, key, value, segments, options, state)


def _choose(query: Tensor) -> str:
    if query.dtype == torch.float64:
        return "reference"
    if query.device.type == "cpu":
        return "numba"
    from a2sf.engine.kernels.triton_kernel import available

    return "triton" if query.is_cuda and available(query.device) else "reference"
