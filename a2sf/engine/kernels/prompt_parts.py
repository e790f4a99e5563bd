"""Segments split where prompts end, and what else of a call under the prompt schedule follows from its segments alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import EvictionState, Segments, once
from a2sf.policies.rule import Rule


@dataclass(frozen=True)
class Node:
    """A segment, split where its sequence's prompt ends.

    Attributes:
        up: the nearest segment above that has tokens, -1 for none.
        root: which of the parentless segments it is below, in their order.
        first: position of its first token.
        before: how many of its tokens belong to the prompt.
        after: how many do not.
        ends: whether the prompt's last token is one of them.
        row, begin: where its first token is in the packed input.
    """

    up: int
    root: int
    first: int
    before: int
    after: int
    ends: bool
    row: int
    begin: int


class LastQueries(NamedTuple):
    """The last queries of a prompt, as far as they are in one segment: tokens `[begin, end)` of the packed `row`.

    Attributes:
        now: int64 [W, 1], the tokens' positions.
        forgotten: [W, 1, 1], what the attention of each is multiplied by at the end.
        power: [], what earlier scores are multiplied by.
    """

    row: int
    begin: int
    end: int
    now: Tensor
    forgotten: Tensor
    power: Tensor


@dataclass(frozen=True)
class PromptSplit:
    """Segments split where prompts end: their prompt tokens, and those after.

    Attributes:
        nodes: one for each segment.
        reading, later: which segments have tokens in the first part, and in the second.
        ending: places in `reading` of the segments that a prompt ends in.
        prompts, rest: the two parts as segments with parents among themselves; None where there is nothing to read.
        cut: the segments `ending`.
        tables: numbers that are the same for all layers, made once (`a2sf.engine.state.once`).
    """

    nodes: list[Node]
    reading: list[int]
    later: list[int]
    ending: list[int]
    prompts: Segments | None
    rest: Segments | None
    cut: Segments
    tables: dict[Hashable, Any] = field(default_factory=dict)

    @staticmethod
    def of(segments: Segments, state: EvictionState | None) -> PromptSplit:
        """`segments` split, once for all layers whose states have read as many tokens."""
        seen = None if state is None else tuple(state.seen.tolist())
        return segments.once(("split at prompts", seen), lambda: PromptSplit._of(segments, seen))

    @staticmethod
    def _of(segments: Segments, seen: Sequence[int] | None) -> PromptSplit:
        rule, nodes = segments.rule, _nodes(segments, seen or ())
        reading = [i for i, n in enumerate(nodes) if n.before]
        later = [i for i, n in enumerate(nodes) if n.after]
        ending = [at for at, i in enumerate(reading) if nodes[i].ends]
        read, rest, skipped = (
            torch.tensor(x, dtype=torch.int64)
            for x in (
                [nodes[i].before for i in reading],
                [nodes[i].after for i in later],
                [nodes[i].before for i in later],
            )
        )
        prompts, after = (_pick(segments, nodes, ids) for ids in (reading, later))
        # a rule with a `cut` is scored once the whole prompt has been read (`_PromptCall._scores_at_end`)
        prompts = prompts.unlimited(
            Rule(scored=rule.scored and rule.cut is None, count_above_uniform=rule.count_above_uniform)
        )
        prompts = replace(prompts, length=read)
        after = replace(after.after_prompt(), start=after.start + skipped, length=rest)
        cut = segments.select(torch.tensor([reading[at] for at in ending], dtype=torch.int64))
        return PromptSplit(nodes, reading, later, ending, prompts if reading else None, after if later else None, cut)

    def retention(self, heads: int, dtype: torch.dtype, device: torch.device) -> BatchRetention:
        """What prompts that end are cut to, `per_head`."""
        key = ("cut", heads, dtype, device)
        return once(self.tables, key, lambda: self.cut.per_head(heads, dtype).to(device))

    def last_queries(self, segments: Segments, dtype: torch.dtype, device: torch.device) -> list[LastQueries | None]:
        """What each segment of `reading` has of its prompt's last queries; None: nothing."""
        return once(self.tables, ("looks", dtype, device), lambda: self._last_queries(segments, dtype, device))

    def _last_queries(self, segments: Segments, dtype: torch.dtype, device: torch.device) -> list[LastQueries | None]:
        assert segments.prompt is not None
        window = (segments.prompt - segments.recent).tolist()
        factors = segments.forgetting_factor.to(device, dtype)
        last_queries: list[LastQueries | None] = []
        for i in self.reading:
            node, factor = self.nodes[i], factors[i]
            skip = max(0, window[i] - node.first)
            W = node.before - skip
            if W <= 0:
                last_queries.append(None)
                continue
            now = torch.arange(node.first + skip, node.first + node.before, device=device)[:, None]
            forgotten = factor ** torch.arange(W - 1, -1, -1, device=device)
            begin, end = node.begin + skip, node.begin + node.before
            last_queries.append(LastQueries(node.row, begin, end, now, forgotten[:, None, None], factor**W))
        return last_queries

    def query_places(self, W: int, device: torch.device) -> Tensor:
        """int64 [4, S, W]: where the queries of the last `W` tokens of each segment of `reading` are, the newest last.

        The four numbers are row and column in the packed input, then row and place in `queries` of the given state. Place
        is -1 for a token of the packed input, column is -1 for one that was read before.
        """
        return once(self.tables, ("newest", W, device), lambda: self._query_places(W).to(device))

    def _query_places(self, W: int) -> Tensor:
        found = []
        for i in self.reading:
            node = self.nodes[i]
            places: list[tuple[int, int, int, int]] = []
            while len(places) < W:
                tokens = node.before
                take = min(W - len(places), tokens)
                places += [(node.row, node.begin + tokens - 1 - n, 0, -1) for n in range(take)]
                if node.up < 0:
                    break
                node = self.nodes[node.up]
            back = len(places)
            places += [(0, -1, node.root, W - 1 - n) for n in range(W - back)]
            found.append(places[::-1])
        return torch.tensor(found).permute(2, 0, 1)


def _nodes(segments: Segments, seen: Sequence[int]) -> list[Node]:
    """The node of each segment; `seen`: tokens read before each segment without a parent, 0 if not given."""
    assert segments.prompt is not None
    left = iter(seen)
    nodes: list[Node] = []
    roots = 0
    columns = (segments.length, segments.parent, segments.prompt, segments.row, segments.start)
    for n, p, prompt, row, begin in zip(*(x.tolist() for x in columns), strict=True):
        if p >= 0:
            above = nodes[p]
            tokens = above.before + above.after
            up, root, first = p if tokens else above.up, above.root, above.first + tokens
        else:
            up, root, first = -1, roots, next(left, 0)
            roots += 1
        before = min(max(prompt - first, 0), n)
        nodes.append(Node(up, root, first, before, n - before, before > 0 and first + before == prompt, row, begin))
    return nodes


def _pick(segments: Segments, nodes: list[Node], ids: list[int]) -> Segments:
    """Some of the segments, each below the nearest one above that is among them."""
    place = {i: at for at, i in enumerate(ids)}
    parent = torch.tensor([place.get(nodes[i].up, -1) for i in ids], dtype=torch.int64)
    return replace(segments.select(torch.tensor(ids, dtype=torch.int64)), parent=parent)
