"""numba's extension interface and llvmlite, of which vectors are made; and compiling with a cache on disk.

Tried with numba 0.68.1 and llvmlite 0.50.0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding as binding
from llvmlite import ir as ir
from numba import njit
from numba import types as types
from numba.core import cgutils as cgutils
from numba.core.extending import intrinsic as _intrinsic
from numba.core.extending import models as models
from numba.core.extending import register_model as register_model

intrinsic: Any = _intrinsic  # its type would hide the functions' own arguments

# without wrappers for Python, reference counts and checks: they are most of the code that LLVM would have to compile
_OPTIONS = {"no_cfunc_wrapper": True, "error_model": "numpy", "_nrt": False}

inner = njit(no_cpython_wrapper=True, **_OPTIONS)
"""Compile a function that only compiled functions call."""
leaf = njit(no_cpython_wrapper=True, forceinline=True, **_OPTIONS)
"""The same, as a part of each caller."""


def cached(function: Any) -> Any:
    """`function` compiled when first called, without the GIL; the code is cached on disk if a directory can be written."""
    try:
        return njit(nogil=True, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # none can
        return njit(nogil=True, **_OPTIONS)(function)
