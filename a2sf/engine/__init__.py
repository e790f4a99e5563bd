"""The eviction recursion and its fast versions. Knows policies, not transformers."""

import os

if os.environ.get("A2SF_FILL_EMPTY"):  # for tests: memory that nobody has written holds NaN or the largest integer
    import torch

    torch.set_deterministic_debug_mode("warn")
