"""Triton, where it is installed: how functions are compiled, and numbers that compiled functions read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

NEVER = 2**31 - 1
"""The step at which a token went that is cached still."""


def jit(*numbers: str) -> Callable[[Any], Any]:
    """Compile a function once for all values of the arguments `numbers`.

    By default Triton compiles one for 1, one for multiples of 16, one for others: seconds each, and the self-check
    (`a2sf.engine.kernels.gpu.self_check`) could run another one than the call.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(numbers))


def constant(x: float) -> Any:
    """A number that a compiled function may read from its module."""
    return x if triton is None else tl.constexpr(x)
