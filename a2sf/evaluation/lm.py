"""The lm-eval model: tokenised requests in, log-likelihoods or generated text under pruned attention out.

Everything but the forward pass is lm-eval's own `HFLM` (tokenisation, chat template, prefix token, truncation, rolling
windows, stop sequences). Scoring computes each common beginning once and logits only where they are scored; generating
gives transformers' `generate` a bounded cache.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from a2sf.engine.trace import Trace
from a2sf.errors import ConfigError, UserError
from a2sf.evaluation.counts import Counts
from a2sf.evaluation.packing import Pack, pack
from a2sf.evaluation.pretrained import load_pretrained
from a2sf.evaluation.untouched import item
from a2sf.hf.attention import (
    NonFiniteError,
    Plan,
    UnsupportedModel,
    attached,
    global_layers,
    mixes_windows,
    rope_switch,
    running,
)
from a2sf.hf.calls import hooks_of, logits_at
from a2sf.hf.devices import input_device
from a2sf.hf.exactness import require_exact
from a2sf.hf.generation import PrunedCache, prove_decoding
from a2sf.hf.loading import kv_heads_of
from a2sf.hf.settings import check_settings, retention_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import Schedule, schedule_for

NAME = "a2sf"
PACK_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Computed tokens per forward pass where `batch_size` is auto."""
LOGSUMEXP_ROWS = 64
NAMED = 5
"""Documents that a message names at most."""
GENERATED_ROWS = 8
"""Sequences generated at a time where `batch_size` is auto."""


@dataclass(frozen=True)
class Request:
    """One log-likelihood to compute: the tokens the model reads, and those it must predict."""

    read: tuple[int, ...]
    targets: tuple[int, ...]
    retention: tuple[Retention, ...]

    @property
    def prompt(self) -> int:
        """Tokens of the context; the last of them predicts the first target."""
        return len(self.read) + 1 - len(self.targets)


@register_model(NAME)
class PrunedLM(HFLM):
    """lm-eval's Hugging Face model with a pruned cache, `lm_eval.simple_evaluate(model="a2sf", ...)`.

    Args:
        pretrained: a model, or what `ModelSpec.path` may be; then `a2sf.hf.loading` loads it, with `revision`, `dtype` and
            `device` (auto where not given) and `trust_remote_code`.
        policy: a `Policy`, a policy's name (`model_args="pretrained=...,policy=h2o,budget_ratio=0.2"`), or the class of
            one of your own, `module:Class`.
        budget: a `Budget`; or give `budget_ratio`, `budget_tokens` and `budget_base`.
        forgetting_factor: for a policy given by name, where it has one.
        schedule: when tokens are evicted, a `Schedule` or its name (`step`, `every4`, `prompt`, `prompt-step`); None: step
            by step, or after the prompt for a policy that knows no other. A request's prompt is its context: of a rolling
            window (perplexity) what lm-eval gives as such, at first the prefix token alone.
        backend: which implementation of the eviction runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
        batch_size: `auto`, or sequences per forward pass.

    `trace_documents` may be set to a number: of the first so many documents, what each layer evicts is then noted in
    `traces` (`a2sf.engine.trace`), for the first request of each.

    Raises:
        ConfigError: if a setting is not allowed.
        UnsupportedModel: if the model's attention cannot be pruned exactly.
    """

    weights_format: str | None = None
    """Which kind of file the weights were read from, where it is known."""

    def __init__(
        self,
        pretrained: Any,
        policy: Policy | str = "full",
        budget: Budget | None = None,
        budget_ratio: float | None = None,
        budget_tokens: int | None = None,
        budget_base: str = "total",
        forgetting_factor: Any = None,
        schedule: Schedule | str | None = None,
        backend: str = "auto",
        batch_size: int | str | None = "auto",
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, str):
            loaded, kwargs = load_pretrained(pretrained, kwargs)
            pretrained, self.weights_format = loaded.model, loaded.format
            kwargs.setdefault("tokenizer", loaded.tokenizer)
        super().__init__(pretrained=pretrained, batch_size=1, **kwargs)
        if self.backend != "causal":
            raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
        self._device = input_device(self.model)
        self.engine = backend
        self.tokens_per_pass = self.most_tokens
        self.silent = False  # no progress bars
        self.known: dict[str, tuple[Any, bool, int, int]] = {}
        self.trace_documents = 0
        self.sequences_per_pass = check_batch_size(batch_size)
        if isinstance(policy, str):
            named = find_policy(policy)
            settings = {} if forgetting_factor is None else {"forgetting_factor": forgetting_factor}
            if settings and "forgetting_factor" not in {f.name for f in dataclasses.fields(named)}:
                raise ConfigError("forgetting_factor", forgetting_factor, f"{policy} has none; leave it out")
            policy = named(**settings)
        if budget is None and (budget_ratio is not None or budget_tokens is not None or policy.uses_budget):
            budget = Budget(ratio=budget_ratio, tokens=budget_tokens, base=budget_base)
        self.use(policy, budget, Schedule.named(schedule) if isinstance(schedule, str) else schedule)

    @property
    def most_tokens(self) -> int:
        """Computed tokens per forward pass on this device, while its memory suffices."""
        return PACK_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def kv_heads(self) -> int | None:
        """KV heads of each layer; None where the config does not tell one number."""
        return kv_heads_of(self.model.config)

    def use(self, policy: Policy, budget: Budget | None, schedule: Schedule | None = None) -> None:
        """Score with `policy` at `budget` from now on (None: for a policy that ignores budgets); counts start anew.

        Args:
            schedule: when tokens are evicted; None: as the policy does without being told.

        Raises:
            ConfigError: if a setting does not fit the model, the budget is too small for the policy, or the policy does not
                know the schedule.
        """
        check_settings(policy, budget, self.layers)
        policy.check(self.layers, self.kv_heads)
        self.policy, self.budget, self.schedule = policy, budget, schedule_for(policy, schedule)
        self.counts = Counts(self.schedule, self.kv_heads, global_layers(self.model.config))
        self.lengths: dict[str, tuple[int, int]] = {}
        self._documents: dict[str, tuple[str, int]] = {}  # task and document of each request, by its strings or tokens
        self.traces: list[Trace] = []

    def retention(self, total: int, context: int) -> tuple[Retention, ...]:
        """What each layer keeps of a request of `total` tokens read, `context` of them its context."""
        return retention_of(self.policy, self.budget, total, context, self.layers)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's, through a bounded cache; a request that `known` answers is not computed again."""
        if not self.policy.causal:
            raise ConfigError("policy", self.policy.name, "it looks at later tokens, so it cannot generate text")
        prove_decoding(self.model, self.policy, self.budget)
        # lm-eval adds to the stop sequences that it is given
        own = [dataclasses.replace(r, arguments=copy.deepcopy(r.args)) for r in requests]
        hashes = [request_hash(r.args) for r in requests]
        prompts = [self._prompt(*r.args) for r in requests]
        new = [r for r, h in zip(own, hashes, strict=True) if h not in self.known]
        self._documents = {str(tokens): document_of(r) for r, (tokens, _) in zip(requests, prompts, strict=True)}
        fewer = self.tokens_per_pass / self.most_tokens  # after memory ran out
        self.batch_size_per_gpu = max(1, int((self.sequences_per_pass or GENERATED_ROWS) * fewer))
        texts = iter(super().generate_until(new, disable_tqdm=disable_tqdm or self.silent) if new else [])
        answers = [self.known[h][0] if h in self.known else next(texts) for h in hashes]
        self.counts.reused += len(requests) - len(new)
        for request, h, text, (context, most) in zip(requests, hashes, answers, prompts, strict=True):
            continuation = self.tok_encode(text, add_special_tokens=False)
            self.lengths[h] = (len(context), len(continuation))
            kept = self.retention(len(context) + max(0, most - 1), len(context))
            self.counts.count_targets(len(continuation), len(context), kept)
            if h not in self.known:
                self.counts.count_read(len(context) + len(continuation[:-1]), len(context), kept)
            if self._to_trace(request) and continuation:
                self._trace(request.doc_id, context, continuation[:-1], kept)
        return answers

    def _prompt(self, context: str, settings: dict[str, Any]) -> tuple[list[int], int]:
        """The tokens HFLM reads before it generates, and how many it generates at most.

        Raises:
            UserError: if nothing can be read before so many.
        """
        settings = normalize_gen_kwargs(copy.deepcopy(settings), self.max_gen_toks)
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            raise UserError(
                f"the task generates up to {most} tokens, which leaves no room for a prompt in the model's "
                f"{self.max_length} positions; choose another task or model"
            )
        return self.tok_encode(context)[-(self.max_length - most) :], most

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        more = max_length - context.shape[1]
        # the whole prompt comes at once, so that one of a single token is no chunk
        prompt = settings["attention_mask"].sum(1)
        cache = PrunedCache(
            self.model,
            self.policy,
            self.budget,
            schedule=self.schedule,
            max_new_tokens=more,
            context_tokens=prompt,
            backend=self.engine,
        )
        try:
            text = super()._model_generate(context, max_length, stop, cache=cache, **settings)
        except NonFiniteError as error:
            copies = max(1, cache.batch_size // len(context))  # beams, or several texts of one prompt
            rows = dict.fromkeys(row // copies for row in error.rows)
            read = [context[i][settings["attention_mask"][i].bool()].tolist() for i in rows]
            raise error.about(self._subject(map(str, read))) from error
        if cache.seen is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} did not use the pruned cache that generate() gave it; choose another model"
            )
        self.counts.computed += int(cache.seen.sum())
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, but a request that `known` answers (by `request_hash`) is not computed again."""
        hashes = [request_hash(r.args) for r in requests]
        for h, found in zip(hashes, map(self.known.get, hashes), strict=True):
            if found is not None:
                self.lengths[h] = found[2:]
                self._count_known(*found[2:])
        new = [r for r, h in zip(requests, hashes, strict=True) if h not in self.known]
        self._documents = {str(r.args): document_of(r) for r in requests}
        answers = iter(super().loglikelihood(new, disable_tqdm=disable_tqdm or self.silent) if new else [])
        self.counts.reused += len(requests) - len(new)
        for r in filter(self._to_trace, requests):
            context, continuation = r.args
            tokens = self._encode_pair(*r.args) if context else ([self.prefix_token_id], self.tok_encode(continuation))
            request = self._request(*tokens)
            cut = request.prompt
            self._trace(r.doc_id, list(request.read[:cut]), list(request.read[cut:]), request.retention)
        return [self.known[h][:2] if h in self.known else next(answers) for h in hashes]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's, which scores one window at a time."""
        answers: list[float] = []
        self._documents = {str(r.args): document_of(r) for r in requests}
        for request in tqdm(requests, disable=disable_tqdm or self.silent, desc="rolling windows", leave=False):
            try:
                answers += super().loglikelihood_rolling([request], disable_tqdm=True)
            except NonFiniteError as error:
                raise error.about(self._subject([str(request.args)])) from error
        return answers

    def _subject(self, requests: Iterable[str]) -> str:
        """What a message calls the documents of requests, given by their strings or tokens; "" where none is known."""
        known = sorted({self._documents[r] for r in requests if r in self._documents and self._documents[r][1] >= 0})
        if not known:
            return ""
        first = ", ".join(str(document) for _, document in known[:NAMED])
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        return f"task {known[0][0]}, document{'s' if len(known) > 1 else ''} {first}{more}"

    def _to_trace(self, request: Any) -> bool:
        """Whether this is the first request of one of the first documents."""
        number = request.doc_id
        return number is not None and number < self.trace_documents and all(t.document != number for t in self.traces)

    def _trace(self, document: int, context: list[int], continuation: list[int], kept: tuple[Retention, ...]) -> None:
        """Read one sequence by itself and note what every layer evicts, and the attention behind it, in `traces`."""
        read = context + continuation
        plan = Plan.of_rows(
            [len(read)],
            [0],
            lambda row, layer: kept[layer],
            self.layers,
            schedule=self.schedule,
            prompt=lambda row: len(context),
            policy_on_sliding=not mixes_windows(self.model.config),
            backend=self.engine,
            trace=True,
        )
        with attached(self.model), torch.inference_mode(), running(plan):
            last = torch.tensor([len(read) - 1], device=self.device)
            logits_at(self.model, last, input_ids=torch.tensor([read], device=self.device), use_cache=False)
        noted = (plan.gone, plan.received, plan.lost)
        arrays = (torch.cat([of_layer[i].cpu() for i in range(self.layers)]).numpy() for of_layer in noted)
        pieces = tuple(self.tokenizer.decode([t]) for t in read)
        self.traces.append(Trace(document, pieces, len(context), *arrays))

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        todo = [self._request(r[1], r[2]) for r in requests]
        answers: list[tuple[float, bool] | None] = [None] * len(todo)
        require_exact(self.model)
        hooks_of(self.model).close(None)  # a call that was interrupted left it open
        bar = tqdm(total=len(todo), disable=disable_tqdm, desc="log-likelihoods", leave=False)
        with attached(self.model), torch.inference_mode():
            for row in self._rows(todo):
                try:
                    scores = self._score(row, todo)
                except NonFiniteError as error:  # whose rows are requests
                    raise error.about(self._subject(str(requests[i][0]) for i in error.rows)) from error
                for i, answer in zip(row.items, scores, strict=True):
                    answers[i] = answer
                    if (strings := requests[i][0]) is not None:
                        self.lengths[request_hash(strings)] = (len(requests[i][1]), len(requests[i][2]))
                        self.cache_hook.add_partial("loglikelihood", strings, answer)
                bar.update(len(row.items))
        bar.close()
        for request in todo:
            self.counts.count_read(len(request.read), request.prompt, request.retention)
            self.counts.count_targets(len(request.targets), request.prompt, request.retention)
        return [a for a in answers if a is not None]

    def _rows(self, todo: list[Request]) -> Iterator[Pack]:
        """The requests in rows; a row never mixes sequences that the model's rotary scaling treats differently.

        Nor such that a policy ranks by different rules, as one may at different budgets.
        """
        limit = rope_switch(self.model.config)
        parts: dict[Any, list[int]] = {}
        for i, r in enumerate(todo):
            parts.setdefault((len(r.read) > limit, tuple(k.rule for k in r.retention)), []).append(i)
        for part in parts.values():
            items = [item(todo[i].read, todo[i].retention, self.schedule, todo[i].prompt, i) for i in part]
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
        """(log-likelihood, is greedy) of each request of a row.

        Raises:
            NonFiniteError: if one depends on NaN or infinity; its `rows` are those requests' places in `todo`. A logit of
                -infinity counts only where it is a target's: no probability is nought, so it is an overflow. Others may
                be, as models mark entries of the vocabulary that no token uses.
        """
        plan = Plan(
            row=[0] * len(row.start),
            start=row.start,
            length=row.length,
            parent=row.parent,
            retention=lambda segment, layer: todo[row.owner[segment]].retention[layer],
            layers=self.layers,
            schedule=self.schedule,
            prompt=lambda segment: todo[row.owner[segment]].prompt,
            policy_on_sliding=not mixes_windows(self.model.config),
            backend=self.engine,
        )
        # positions of the row that some request scores, each once
        scored = [row.last(which, len(todo[i].targets)) for which, i in enumerate(row.items)]
        index, where = torch.cat([torch.from_numpy(s) for s in scored]).unique(return_inverse=True)
        try:
            with running(plan):
                (logits,) = logits_at(
                    self.model,
                    index.to(self.device),
                    input_ids=torch.tensor([row.tokens], device=self.device),
                    position_ids=torch.tensor([row.positions], device=self.device),
                    use_cache=False,
                )
        except NonFiniteError as error:  # whose rows are segments
            owners = sorted({row.owner[segment] for segment in error.rows})
            raise NonFiniteError(error.where, error.dtype, owners) from error
        self.counts.computed += len(row.tokens)
        self.counts.scored += len(index)

        targets = torch.tensor([t for i in row.items for t in todo[i].targets], device=self.device)
        where = where.to(self.device)
        # in parts, because it allocates what it is given once more
        normalizer = torch.cat([part.float().logsumexp(-1) for part in logits.split(LOGSUMEXP_ROWS)])
        chosen = logits[where, targets].float() - normalizer[where]
        greedy = logits.argmax(-1)[where] == targets
        sizes = [len(todo[i].targets) for i in row.items]
        if not bool(torch.isfinite(chosen).all()):
            pieces = zip(row.items, torch.isfinite(chosen).cpu().split(sizes), strict=True)
            raise NonFiniteError("the logits", logits.dtype, sorted(i for i, finite in pieces if not finite.all()))
        return [
            (float(c.double().sum()), bool(g.all()))
            for c, g in zip(chosen.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        ]

    def _count_known(self, context: int, continuation: int) -> None:
        """Count the targets of a request that was answered before, of which only the lengths are known."""
        prompt = min(context + continuation, self.max_length + 1) - continuation  # as `_request`
        self.counts.count_targets(continuation, prompt, self.retention(prompt + continuation - 1, prompt))


def document_of(request: Any) -> tuple[str, int]:
    """Task and document of one of lm-eval's requests; document -1 where it has none."""
    return str(request.task_name), -1 if request.doc_id is None else int(request.doc_id)


def request_hash(arguments: tuple[Any, ...]) -> str:
    """Identifies a request by its strings, and the settings of its generation."""
    strings = [a if isinstance(a, str) else json.dumps(a, sort_keys=True, default=str) for a in arguments]
    return hashlib.sha256("\0".join(strings).encode()).hexdigest()[:16]


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
