"""Attention where no score decides what is retained: a full cache, or the newest tokens only. Plain torch, any device.

Both are masked attention: token `i` sees token `j` of its own path if `j` is not later and at most `budget` tokens back.
On the CPU the compiled kernel is faster even here; on other devices this spares one step per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a2sf.engine.state import Attended, Options, Segments, accumulation_dtype
from a2sf.policies.schedule import STEP

CHUNK = 1024
"""Queries attended at a time: the mask of a tree is never larger than this times the tree's tokens."""

CHUNK_OF_LOGITS = 128
"""The same where logits and probabilities are made in memory: for a softmax that torch's own attention does not know."""


def unsupported(segments: Segments, options: Options, state: object) -> str | None:
    """Why `attend_dense` cannot replace the recursion for such a call; None: it can."""
    if state is not None or options.return_state or options.trace:
        return "it has neither states nor traces"
    rule = segments.rule
    if segments.schedule != STEP or rule.full_heads or rule.heads or rule.recording or rule.threshold is not None:
        return "it knows one number for all heads, step by step"
    if segments.growth is not None or segments.once("budgets differ", lambda: _changes_after_evicting(segments)):
        return "it knows one budget for a sequence"
    unscored = segments.once("retained without scores", lambda: _retained_without_scores(segments))
    return None if unscored else "scores decide what is retained"


def _changes_after_evicting(segments: Segments) -> bool:
    """Whether a segment continues one that evicts with another budget."""
    parent = segments.parent.clamp(min=0)
    differs = (segments.parent >= 0) & (segments.budget != segments.budget[parent])
    return bool((differs & (torch.tensor(segments.ends()) > segments.budget)[parent]).any())


def _retained_without_scores(segments: Segments) -> bool:
    """Whether each segment retains all of its tokens, or the newest."""
    newest = (segments.recent == segments.budget) & (segments.sinks == 0)
    newest &= segments.rule.merge_fn is None
    return bool(((torch.tensor(segments.ends()) <= segments.budget) | newest).all())


def attend_dense(query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options) -> Attended:
    """Masked attention in float32 or better; arguments as in `reference`, for calls without a reason `unsupported`."""
    B, H, T, _ = query.shape
    dtype, device = accumulation_dtype(query.dtype), query.device
    output = query.new_zeros(B, T, H, value.shape[-1]).transpose(1, 2)
    end = torch.tensor(segments.ends())
    for tree in _trees(segments.parent):
        # for every token of the tree: the segment it is in, where it is packed, and how many tokens its path has before
        length = segments.length[tree]
        owner = torch.repeat_interleave(torch.arange(len(tree)), length)
        offset = torch.arange(len(owner)) - (length.cumsum(0) - length)[owner]
        token = (segments.start[tree][owner] + offset).to(device)
        depth = ((end[tree] - length)[owner] + offset).to(device)
        above = _ancestors(segments.parent, tree).to(device)
        budget, owner = segments.budget[tree][owner].to(device), owner.to(device)
        row = int(segments.row[tree[0]])
        q, k, v = (x[row : row + 1, :, token].to(dtype) for x in (query, key, value))
        chunk = CHUNK if options.softmax.plain else CHUNK_OF_LOGITS
        for i in range(0, len(owner), chunk):
            here = slice(i, i + chunk)
            back = depth[here, None] - depth
            mask = above[owner[here]][:, owner] & (back >= 0) & (back <= budget[here, None])
            out = masked_attention(q[:, :, here], k, v, mask, options)
            output[row][:, token[here]] = out[0].to(query.dtype)
    return Attended(output)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: Options) -> Tensor:
    """Attention [B, H, Q, V] of queries [B, H, Q, D] to keys [B, K, N, D] that are True in `mask`, bool [Q, N].

    Each query sees at least one key.
    """
    K = key.shape[1]
    if options.softmax.plain:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=options.scale, enable_gqa=query.shape[1] > K
        )
    logits = query.unflatten(1, (K, -1)) @ key[:, :, None].transpose(-1, -2) * options.scale
    return (options.softmax(logits, ~mask) @ value[:, :, None]).flatten(1, 2)


def _trees(parent: Tensor) -> list[list[int]]:
    """The segments of each tree, parents first."""
    trees: dict[int, list[int]] = {}
    root: list[int] = []
    for i, p in enumerate(parent.tolist()):
        root.append(i if p < 0 else root[p])
        trees.setdefault(root[i], []).append(i)
    return list(trees.values())


def _ancestors(parent: Tensor, tree: list[int]) -> Tensor:
    """bool [n, n]: whether segment `tree[j]` is `tree[i]` or above it."""
    place = {segment: i for i, segment in enumerate(tree)}
    above = torch.eye(len(tree), dtype=torch.bool)
    for i, segment in enumerate(tree):
        p = int(parent[segment])
        if p >= 0:
            above[i] |= above[place[p]]
    return above
