"""How many tokens were read, computed, cached and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.schedule import Schedule
from a2sf.policies.slots import leaves_choice
from a2sf.scoring.passes.full_cache_prefix import cached_tokens, full_cache_prefix, pruned_scores


@dataclass
class Counts:
    """Counts of one system's requests.

    Attributes:
        schedule: when tokens are evicted.
        kv_heads: of each layer; None: not known.
        acts: of each layer, whether the policy acts on it.
        tokens: tokens of all requests, as if each were computed by itself.
        computed: tokens that were computed; of those that served several systems, an equal share.
        needed: the same, without dividing those that served several systems.
        together: how many of these served several systems.
        scored: positions whose logits were computed, shared as `computed`.
        cached: sum over requests and layers of the tokens cached at the end, mean over KV heads; the mean is
            `cached / layer_requests`.
        share: sum of the same as a share of each request's tokens.
        reused: requests answered from an earlier result.
        layer_requests: requests times layers.
        targets: tokens that were scored or generated, also those of reused requests.
        pruned: how many of them were predicted by a token that saw a pruned cache in some layer.
        prompts, budgets: of each request, tokens of its prompt, and slots of a layer (at its end, if they grow), mean over
            layers that have a budget; where a threshold decides, tokens cached at the end.
        shares: of each request where a threshold decides, the share of its tokens that was cached at the end.
        unranked, with_sinks: requests of which tokens were evicted and every slot is for the newest or the first tokens, so
            that no ranking decides; and how many of them have slots for the first.
        stayed, could_leave: summed over these, tokens that stayed though the threshold could have evicted them, and tokens
            that it could have evicted.
    """

    schedule: Schedule
    kv_heads: int | None
    acts: Sequence[bool]
    tokens: int = 0
    computed: float = 0
    needed: int = 0
    together: int = 0
    scored: float = 0
    cached: float = 0.0
    share: float = 0.0
    layer_requests: int = 0
    reused: int = 0
    targets: int = 0
    pruned: int = 0
    prompts: list[int] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    unranked: int = 0
    with_sinks: int = 0
    stayed: float = 0.0
    could_leave: float = 0.0

    @property
    def lengths(self) -> dict[str, Any]:
        """Quantiles of the lengths of prompts and of the budgets, in tokens; None for a policy without a budget."""
        return {"prompt": quantiles(self.prompts), "budget": quantiles(self.budgets)}

    def count_read(self, total: int, prompt: int, retention: Sequence[Retention]) -> None:
        """Count a request of `total` tokens that was computed, and of which each layer has its `retention`."""
        cached = sum(cached_tokens(r, self.schedule, total, prompt, self.kv_heads) for r in retention)
        self.tokens += total
        self.cached += cached
        self.share += cached / total
        self.layer_requests += len(retention)

    def count_cached(self, cached: float, total: int, prompt: int, retention: Sequence[Retention]) -> None:
        """Count the tokens `cached` at the end of a request where a threshold decides it, mean over layers and heads."""
        least = fmean(cached_tokens(r, self.schedule, total, prompt) for r in retention if r.rule.threshold is not None)
        self.budgets.append(cached)
        self.shares.append(cached / total)
        self.stayed += cached - least
        self.could_leave += total - least

    @property
    def doubt(self) -> str | None:
        """What is to be said of a threshold that makes no difference between tokens."""
        if not self.could_leave:
            return "no request has more tokens than its window" if self.shares else None
        if self.stayed < 1e-6:
            return "it keeps no token of any request beyond its window"
        return "it keeps every token of all requests" if self.could_leave - self.stayed < 1e-6 else None

    @property
    def kept_tokens(self) -> float:
        """Tokens cached at the end of a request, mean over requests, layers and heads."""
        return fmean(self.budgets) if self.shares else self.cached / max(1, self.layer_requests)

    @property
    def cache_share(self) -> float:
        """The same as a share of the request's tokens."""
        return fmean(self.shares) if self.shares else self.share / max(1, self.layer_requests)

    def count_targets(
        self,
        targets: int,
        prompt: int,
        retention: Sequence[Retention],
        cut: int | None = None,
        later: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Count what a prompt's last token and those after it predict.

        Args:
            cut: where the prompt schedule cuts, if earlier.
            later: of each further answer of a conversation, how many tokens are between the prompt and it, and its own.
        """
        acted = [r for r, acts in zip(retention, self.acts, strict=True) if acts]
        self.prompts.append(prompt)
        answers = ((0, targets), *later)
        read = max(1, prompt + sum(answers[-1]) - 1)
        limited = [r.after(read).budget for r in retention if r.budget < UNLIMITED and r.rule.threshold is None]
        self.budgets += [fmean(limited)] if limited else []
        self._count_unranked(acted, (cut or prompt) if self.schedule.prompt and self.schedule.then == "keep" else read)
        full = full_cache_prefix(acted, self.schedule, cut or prompt, self.kv_heads, total=read)
        for before, predicted in answers:
            self.targets += predicted
            self.pruned += pruned_scores(predicted, full, prompt + before)

    def _count_unranked(self, acted: Sequence[Retention], tokens: int) -> None:
        """Count a request of which tokens are evicted after `tokens` at the latest, if no layer has a choice among them."""
        evicting = [k for r in acted if (k := r.after(tokens)).budget < tokens and k.rule.threshold is None]
        if evicting and not any(map(leaves_choice, evicting)):
            self.unranked += 1
            self.with_sinks += any(k.sinks > 0 or any(h.sinks for h in k.rule.heads) for k in evicting)

    @property
    def unranked_note(self) -> str | None:
        """What is to be said of a budget that leaves a policy no choice; None: it had one in every request."""
        if not self.unranked:
            return None
        retained = "only the first and the newest tokens are" if self.with_sinks else "only the newest tokens are"
        return (
            f"in {self.unranked} of {len(self.prompts)} requests the budget is not larger than the number of protected "
            f"tokens, so that nothing is ranked: {retained} retained"
        )


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Minimum, quartiles and maximum; None if there are no numbers."""
    names = ("min", "p25", "median", "p75", "max")
    return dict(zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True)) if values else None
