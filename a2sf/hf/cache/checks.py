"""What is refused of a call through a `PrunedCache`: gaps, a prompt of unknown length, too many tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from a2sf.errors import UserError
from a2sf.hf.attention.errors import UnsupportedModel
from a2sf.hf.calls.tokens import ragged_tokens

if TYPE_CHECKING:
    from a2sf.hf.cache.pruned import PrunedCache


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
    depends = cache.schedule.prompt or (cache.budget is not None and cache.budget.ratio is not None)
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
