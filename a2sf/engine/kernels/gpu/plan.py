"""Which tokens of a row are computed together on a GPU, and how many are cached after them.

Both follow from the numbers of the row. Nothing that is computed enters, so that the CPU plans a call before the GPU has
begun. The other rows of the batch do not enter, so that the order of a row's sums does not depend on them.
"""

from __future__ import annotations

from typing import NamedTuple

from a2sf.engine.retention import BatchRetention

COLUMNS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""How many columns (cached tokens and new ones) a chunk may have; the scan is compiled for each."""
ROOM = 64
"""The fewest new tokens of a chunk, where a row needs several: fewer would be cheaper to scan, but cost a launch each."""
ELEMENTS = 2**17
"""The most columns times query heads of a program; more could not be held in registers and the cache next to them."""
SCRATCH = 2**28
"""Bytes for the shares of attention of one launch; what they are divided by is the row's own, see `most_tokens`."""


class Chunk(NamedTuple):
    """Some tokens of a row: how many came before, how many slots are held when they begin, how many they are."""

    done: int
    held: int
    tokens: int


def after(held: int, tokens: int, budget: int, spare: int) -> int:
    """How many tokens a head holds after `tokens` more: at `budget + spare + 1` it is cut to its budget."""
    if tokens == 0 or held + tokens <= budget + spare:
        return held + tokens
    first = max(1, budget + spare + 1 - held)  # the token after which it is cut
    return budget + (tokens - first) % (spare + 1)


def evicts(held: int, length: int, budget: int, spare: int) -> bool:
    """Whether anything goes in a row whose fullest head holds `held` tokens."""
    return length > 0 and held + length > budget + spare


def columns(held: int, length: int, budget: int, spare: int) -> int | None:
    """The columns of the chunks of a row that evicts; None: more than there are."""
    most = max(held, min(budget + spare, held + length))
    return next((N for N in COLUMNS if held + length <= N or most + min(N // 2, max(ROOM, N // 8)) <= N), None)


def most_tokens(N: int, heads: int) -> int:
    """The most tokens of a chunk of `N` columns, with `heads` query heads."""
    return max(16, SCRATCH // (N * heads * 4))


def chunks(held: list[int], length: int, budget: int, spare: int, N: int, most: int) -> tuple[list[Chunk], list[int]]:
    """A row's chunks of `N` columns and at most `most` tokens, and what each head holds at the end (`held`: before)."""
    found, done = [], 0
    while done < length:
        tokens = min(N - max(held), length - done, most)
        found.append(Chunk(done, max(held), tokens))
        held = [after(h, tokens, budget, spare) for h in held]
        done += tokens
    return found, held


def too_wide(retention: BatchRetention, held: int, tokens: list[int], heads: int) -> str | None:
    """Why the scan cannot hold what rows retain that hold at most `held` tokens and read `tokens`; None: it can.

    `heads`: query heads of a program.
    """
    spare = retention.schedule.spare
    for budget, n in zip(retention.budget.tolist(), tokens, strict=True):
        if evicts(held, n, budget, spare):
            N = columns(held, n, budget, spare)
            if N is None or N * heads > ELEMENTS:
                return f"{max(held, min(budget + spare, n)):,} tokens are more than it can retain step by step"
    return None
