"""The lm-eval model: tokenised requests in, log-likelihoods under pruned attention out.

Everything but the forward pass is lm-eval's own `HFLM` (tokenisation, chat template, prefix token, truncation, rolling
windows). The forward pass computes each common beginning once and logits only where they are scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from a2sf.attention import Plan, UnsupportedModel, attached, mixes_windows, rope_switch, running
from a2sf.budget import Budget
from a2sf.errors import ConfigError, UserError
from a2sf.packing import Item, Pack, pack
from a2sf.policy import Policy, Retention, find_policies

NAME = "a2sf"
PACK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Computed tokens per forward pass where `batch_size` is auto."""


@dataclass
class Counts:
    """What was read since `PrunedLM.use`.

    Attributes:
        tokens: tokens of all requests, as if each were computed by itself.
        computed: tokens that were computed.
        kept: sum over requests and layers of the tokens cached at the end; `kept / layer_requests` is the mean.
        share: sum of the same as a share of each request's tokens.
        reused: requests answered from an earlier result.
        layer_requests: requests times layers.
    """

    tokens: int = 0
    computed: int = 0
    kept: int = 0
    share: float = 0.0
    layer_requests: int = 0
    reused: int = 0


@dataclass(frozen=True)
class Request:
    """One log-likelihood to compute: the tokens the model reads, and those it must predict."""

    read: tuple[int, ...]
    targets: tuple[int, ...]
    retention: tuple[Retention, ...]


@register_model(NAME)
class PrunedLM(HFLM):
    """lm-eval's Hugging Face model with a pruned cache, `lm_eval.simple_evaluate(model="a2sf", ...)`.

    Args:
        pretrained: as for `HFLM`: a model, a hub id or a path.
        policy: a `Policy`, or a policy's name (`model_args="pretrained=...,policy=h2o,budget_ratio=0.2"`).
        budget: a `Budget`; or give `budget_ratio`, `budget_tokens` and `budget_base`.
        forgetting_factor: for a policy given by name, where it has one.
        backend: which implementation of the eviction runs, `auto` or a name in `a2sf.kernels.BACKENDS`.
        batch_size: `auto`, or sequences per forward pass.

    Raises:
        ConfigError: if a setting is not allowed.
        UnsupportedModel: if the model's attention cannot be pruned exactly.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: Policy | str = "full",
        budget: Budget | None = None,
        budget_ratio: float | None = None,
        budget_tokens: int | None = None,
        budget_base: str = "total",
        forgetting_factor: Any = None,
        backend: str = "auto",
        batch_size: int | str | None = "auto",
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, str):
            kwargs.setdefault("use_safetensors", True)
        super().__init__(pretrained=pretrained, batch_size=1, **kwargs)
        if self.backend != "causal":
            raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
        self.engine = backend
        self.tokens_per_pass = PACK_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]
        self.silent = False  # no progress bars
        self.known: dict[str, tuple[float, bool, int, int]] = {}
        self.sequences_per_pass = check_batch_size(batch_size)
        if isinstance(policy, str):
            policies = find_policies()
            if policy not in policies:
                raise ConfigError("policy", policy, f"give one of {', '.join(sorted(policies))}")
            settings = {} if forgetting_factor is None else {"forgetting_factor": forgetting_factor}
            policy = policies[policy](**settings)
        if budget is None and (budget_ratio is not None or budget_tokens is not None or policy.uses_budget):
            budget = Budget(ratio=budget_ratio, tokens=budget_tokens, base=budget_base)
        self.use(policy, budget)

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    def use(self, policy: Policy, budget: Budget | None) -> None:
        """Score with `policy` at `budget` from now on (None: for a policy that ignores budgets); counts start anew.

        Raises:
            ConfigError: if a per-layer list does not fit the model, or the budget is too small for the policy.
        """
        policy.check(self.layers)
        if budget is not None:
            budget.check(self.layers)
        elif policy.uses_budget:
            raise ConfigError("budget", None, f"the policy {policy.name} needs budget.ratio or budget.tokens")
        self.policy, self.budget = policy, budget
        self.counts = Counts()
        self.lengths: dict[tuple[str, ...], tuple[int, int]] = {}

    def retention(self, total: int, context: int) -> tuple[Retention, ...]:
        """What each layer keeps of a request of `total` tokens read, `context` of them its context."""
        budget = self.budget
        slots = [budget.slots(total=total, context=context, layer=i) if budget else 1 for i in range(self.layers)]
        return tuple(self.policy.retention(c, i) for i, c in enumerate(slots))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        names = sorted({r.task_name for r in requests if r.task_name}) or ["this task"]
        raise UserError(f"{', '.join(names)} generates text, and generation under pruning is not available yet")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, but a request that `known` answers (by `request_hash`) is not computed again."""
        hashes = [request_hash(r.args) for r in requests]
        for request, found in zip(requests, map(self.known.get, hashes), strict=True):
            if found is not None:
                self.lengths[request.args] = found[2:]
        new = [r for r, h in zip(requests, hashes, strict=True) if h not in self.known]
        answers = iter(super().loglikelihood(new, disable_tqdm=disable_tqdm or self.silent) if new else [])
        self.counts.reused += len(requests) - len(new)
        return [self.known[h][:2] if h in self.known else next(answers) for h in hashes]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        todo = [self._request(r[1], r[2]) for r in requests]
        answers: list[tuple[float, bool] | None] = [None] * len(todo)
        bar = tqdm(total=len(todo), disable=disable_tqdm, desc="log-likelihoods", leave=False)
        with attached(self.model), torch.inference_mode():
            for row in self._rows(todo):
                for i, answer in zip(row.items, self._score(row, todo), strict=True):
                    answers[i] = answer
                    if (strings := requests[i][0]) is not None:
                        self.lengths[strings] = (len(requests[i][1]), len(requests[i][2]))
                        self.cache_hook.add_partial("loglikelihood", strings, answer)
                bar.update(len(row.items))
        bar.close()
        self._count(todo)
        return [a for a in answers if a is not None]

    def _rows(self, todo: list[Request]) -> Iterator[Pack]:
        """The requests in rows; a row never mixes sequences that the model's rotary scaling treats differently."""
        limit = rope_switch(self.model.config)
        for beyond in (False, True):
            part = [i for i, r in enumerate(todo) if (len(r.read) > limit) == beyond]
            items = [Item(r.read, r.retention, min(k.budget for k in r.retention)) for r in map(todo.__getitem__, part)]
            for row in pack(items, max_tokens=self.tokens_per_pass, max_items=self.sequences_per_pass):
                row.items = [part[i] for i in row.items]
                row.owner = [part[i] for i in row.owner]
                yield row

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        if not context or not continuation:
            raise ValueError("a request needs at least one token of context and one of continuation")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context window of "
                f"{self.max_length}; choose another task or model"
            )
        # as HFLM: too long a context loses its beginning, and the last token is only predicted
        whole = (context + continuation)[-(self.max_length + 1) :]
        read = tuple(whole[:-1])
        return Request(read, tuple(continuation), self.retention(len(read), len(whole) - len(continuation)))

    def _score(self, row: Pack, todo: list[Request]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each request of a row."""
        plan = Plan(
            row=[0] * len(row.start),
            start=row.start,
            length=row.length,
            parent=row.parent,
            retention=lambda segment, layer: todo[row.owner[segment]].retention[layer],
            layers=self.layers,
            policy_on_sliding=not mixes_windows(self.model.config),
            backend=self.engine,
        )
        # positions of the row that some request scores, each once
        scored = [row.last(which, len(todo[i].targets)) for which, i in enumerate(row.items)]
        index, where = torch.cat([torch.from_numpy(s) for s in scored]).unique(return_inverse=True)
        with running(plan):
            logits = self.model(
                input_ids=torch.tensor([row.tokens], device=self.device),
                position_ids=torch.tensor([row.positions], device=self.device),
                use_cache=False,
                logits_to_keep=index.to(self.device),
            ).logits[0]
        self.counts.computed += len(row.tokens)

        targets = torch.tensor([t for i in row.items for t in todo[i].targets], device=self.device)
        where = where.to(self.device)
        normalizer = logits.float().logsumexp(-1)
        chosen = logits[where, targets].float() - normalizer[where]
        greedy = logits.argmax(-1)[where] == targets
        sizes = [len(todo[i].targets) for i in row.items]
        return [
            (float(c.double().sum()), bool(g.all()))
            for c, g in zip(chosen.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        ]

    def _count(self, todo: list[Request]) -> None:
        for request in todo:
            total = len(request.read)
            kept = sum(min(r.budget, total) for r in request.retention)
            self.counts.tokens += total
            self.counts.kept += kept
            self.counts.share += kept / total
            self.counts.layer_requests += len(request.retention)


def request_hash(arguments: tuple[str, ...]) -> str:
    """Identifies a request by its strings."""
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:16]


def check_batch_size(value: Any) -> int | None:
    """`batch_size` as sequences per forward pass; None for `auto`.

    Raises:
        ConfigError: unless it is auto or a whole number of at least 1.
    """
    if value in ("auto", None):
        return None
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError("batch_size", value, "give auto, or a whole number of sequences per forward pass, at least 1")
    return number
