"""While tests run, memory that nobody has written is no accident's: NaN, or the largest integer, in children too."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from a2sf.engine.kernels.cpu import memory


def taken() -> list[np.ndarray]:
    """Memory as torch gives it and as the compiled kernel's blocks take it."""
    return [
        torch.empty(3).numpy(),
        torch.zeros(1).new_empty(3).numpy(),
        torch.empty_like(torch.zeros(3)).numpy(),
        memory._memory(3),
        memory._memory(3, torch.int64),
    ]


def test_what_is_not_written_shows():
    assert os.environ["A2SF_FILL_EMPTY"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        for *floats, integers in (taken(), child.submit(taken).result()):
            assert np.isnan(floats).all()
            assert (integers == np.iinfo(np.int64).max).all()
