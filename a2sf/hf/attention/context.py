"""Values that are set in a context (of a thread or an asyncio task) while a `with` block is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Block(Generic[T]):
    value: T
    ended: bool = False


class ContextStack(Generic[T]):
    """The values of the blocks that are open in this context.

    When a block ends, it ends in every context that has it: a generator may be closed by another thread than the one that
    entered the block.
    """

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[_Block[T], ...]] = ContextVar(name, default=())

    def innermost_first(self) -> list[T]:
        """The values, that of the innermost block first."""
        return [b.value for b in reversed(self._blocks.get()) if not b.ended]

    @contextmanager
    def entered(self, value: T) -> Iterator[None]:
        """`value` is set inside, however the block ends."""
        block = _Block(value)
        try:
            self._blocks.set((*self._open(), block))
            yield
        finally:
            block.ended = True
            self._blocks.set(self._open())

    def _open(self) -> tuple[_Block[T], ...]:
        return tuple(b for b in self._blocks.get() if not b.ended)
