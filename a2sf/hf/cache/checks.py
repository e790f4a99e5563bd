"""What a `PrunedCache` refuses: lengths that were not given, and calls that do not fit what it has read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.calls.tokens import ragged_tokens
from a2sf.policies.budget import Budget
from a2sf.policies.schedule import Schedule

if TYPE_CHECKING:
    from a2sf.hf.cache.pruned import PrunedCache


def check_lengths_are_given(
    budget: Budget | None, schedule: Schedule, max_new_tokens: int | None, context_tokens: int | list[int] | None
) -> None:
    """Refuse settings of a cache that need a length which was not given.

    Raises:
        ConfigError: for a share of the whole sequence without `max_new_tokens`, or a cut before the question without
            `context_tokens`.
    """
    if max_new_tokens is None and budget is not None and budget.ratio is not None and budget.base == "total":
        raise ConfigError(
            "budget.base",
            "total",
            "a share of the whole sequence needs max_new_tokens=...; give it, or a ratio of base context",
        )
    if schedule.before_question and context_tokens is None:
        raise ConfigError(
            "context_tokens",
            None,
            "schedule.at=context cuts within a prompt, so give the length of what comes before",
        )


def check_call(
    cache: PrunedCache, model: PreTrainedModel, shape: tuple[int, int], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check a call of `model` on `shape` = (B, T) new tokens as a whole; returns where each row's new tokens are.

    Args:
        mask: [B, columns], 0 where a token is padding.

    Raises:
        UserError: if the cache does not fit the model, the batch or the mask, or a sequence gets too long.
        UnsupportedModel: as `check_length`.
    """
    if cache.model_ref() is not model:
        raise UserError(
            f"this cache was made for another model than this {type(model).__name__}; make one with "
            "PrunedCache(model, ...)"
        )
    if cache.failed:
        raise UserError("an earlier call with this cache stopped midway; call cache.reset() and start again")
    if cache.dtype not in (None, model.dtype):
        raise UserError(
            f"this cache was filled by a model in {cache.dtype}, which is now in {model.dtype}; call cache.reset() and give "
            "the text from its beginning"
        )
    if cache.seen is not None and len(cache.seen) != shape[0]:
        raise UserError(
            f"this cache holds a batch of {len(cache.seen)} sequences and the model was called with {shape[0]}; make "
            "a cache for each batch"
        )
    start, length, order = new_tokens(cache, shape, mask)
    check_prompt_is_known(cache, shape[1])
    if cache.seen is not None and mask is not None:
        earlier = mask[:, : cache.columns].long().sum(1).cpu()
        if not torch.equal(earlier, cache.seen):
            raise UserError(
                "attention_mask hides tokens that this cache has read, or shows padding that it has not; pass the "
                "mask of the earlier calls with ones for what was generated, and start anew where rows ended early"
            )
    seen = torch.zeros(shape[0], dtype=torch.int64) if cache.seen is None else cache.seen
    after = seen + length
    check_new_tokens(cache, seen, after, shape[1])
    check_length(cache, after, torch.where(seen > 0, seen, after), prompt=cache.calls == 0)
    return start, length, order


def new_tokens(cache: PrunedCache, shape: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each row's new tokens are; a later turn's may have a gap, between the last answer and the question."""
    start, length, order = ragged_tokens(shape, cache.columns, mask)
    if order is not None and (cache.seen is None or cache.trace):
        why = "a trace notes steps by their columns, so give rows of one length" if cache.seen is not None else None
        raise UserError(
            f"attention_mask has a gap inside a row's new tokens; {why or 'pad at the beginning or at the end'}"
        )
    return start, length, order


def check_prompt_is_known(cache: PrunedCache, columns: int) -> None:
    """Refuse a call of `columns` tokens where what follows from the prompt's length may be wrong.

    The first call is the prompt. It may be a part of it where it brings one token, and was one where the second brings
    several, unless `generate` began there.

    Raises:
        UserError: if it does.
    """
    share = cache.budget is not None and cache.budget.ratio is not None and not cache.budget.grows
    depends = cache.schedule.prompt or share
    unknown = (cache.calls == 1 and columns > 1) or (cache.calls == 0 and columns == 1)
    if not depends or not unknown or cache.begins_turn or cache.context_tokens is not None:
        return
    needed = "for the cut after it" if cache.schedule.prompt else "for a budget that is a share of it"
    reason = (
        "the first call brings a single token"
        if not cache.calls
        else (f"the first call brought {max(cache.prompt)} tokens and the second brings several more")
    )
    raise UserError(
        f"{reason}, so it is not known where the prompt ends, which is needed {needed}; give its length as "
        "context_tokens=..." + ("" if cache.schedule.prompt else ", or a budget of tokens")
    )


def check_new_tokens(cache: PrunedCache, seen: Tensor, after: Tensor, columns: int) -> None:
    """Refuse a generated token beyond `max_new_tokens`, where budgets are a share of the prompt and of these.

    The next turn of a conversation is no part of that text: `generate` was given the cache again, or several tokens come.

    Args:
        seen: int64 [B], tokens of each row before this call.
        after: int64 [B], and after it.

    Raises:
        ConfigError: if it is one.
    """
    share = cache.budget is not None and cache.budget.ratio is not None and cache.budget.base == "total"
    if not share or not cache.max_new_tokens or not cache.calls or columns > 1 or cache.later_turn:
        return
    most = torch.tensor(cache.prompt) + cache.max_new_tokens - 1  # the last token is never read
    if bool(((seen <= most) & (after > most)).any()):
        raise ConfigError(
            "max_new_tokens",
            cache.max_new_tokens,
            "the budget is a share of the prompt and so many new tokens, and more are generated; give PrunedCache the "
            "max_new_tokens of generate",
        )


def check_length(cache: PrunedCache, after: Tensor, earliest: Tensor, prompt: bool) -> None:
    """`earliest` [B]: the shortest length at which a cached key of the row was made."""
    longest = int(after.max()) + (max(0, cache.max_new_tokens - 1) if prompt and cache.max_new_tokens else 0)
    if longest > cache.positions:
        and_more = " with those to generate" if prompt and cache.max_new_tokens else ""
        raise UserError(
            f"the sequence has {longest} tokens{and_more} and the model {cache.positions} positions; shorten the prompt "
            "or generate less"
        )
    if int(earliest.min()) <= cache.rope_switch < longest:
        raise UnsupportedModel(
            f"the model's rotary embedding changes at {cache.rope_switch:.0f} tokens, and this batch has keys from both "
            "sides of it, which is not supported under pruning; use shorter sequences"
        )
