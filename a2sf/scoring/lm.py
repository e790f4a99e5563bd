"""The lm-eval model: tokenised requests in, log-likelihoods or generated text under pruned attention out.

Everything but the forward pass is lm-eval's own `HFLM` (tokenisation, chat template, prefix token, truncation, rolling
windows, stop sequences). Scoring computes each common beginning once and logits only where they are scored; generating
gives transformers' `generate` a bounded cache.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from tqdm import tqdm

from a2sf.engine.kernels import check_backend
from a2sf.engine.trace import Trace
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention import (
    NonFiniteError,
    Plan,
    UnsupportedModel,
    attached,
    mixes_windows,
    running,
)
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.devices import input_device
from a2sf.hf.exactness import require_exact
from a2sf.policies.arguments import budget_of, policy_of, schedule_of
from a2sf.policies.base import Policy, Retention
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import Schedule
from a2sf.scoring.contexts import Contexts
from a2sf.scoring.generation import OneByOne
from a2sf.scoring.passes.run import Asked, Scoring
from a2sf.scoring.passes.sequences import Model, Request
from a2sf.scoring.pretrained import check_given, check_names, check_tokens, load_pretrained
from a2sf.scoring.systems import Answer, Member, document_of, request_hash

NAME = "a2sf"
PACK_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Computed tokens per forward pass where `batch_size` is auto."""
NOTHING = (
    "a request has no token of {} of its own (as lm-eval tokenises it, the continuation is what comes after the context's "
    "tokens), so that there is nothing to score; change the document, or leave it out"
)
NAMED = 5
"""Documents that a message names at most."""


@register_model(NAME)
class PrunedLM(OneByOne):
    """lm-eval's Hugging Face model with a pruned cache, `lm_eval.simple_evaluate(model="a2sf", ...)`.

    Args:
        pretrained: a model, or what `ModelSpec.path` may be; then `a2sf.hf.loading` loads it, with `revision`, `dtype` and
            `device` (auto where not given), `trust_remote_code` and `add_bos_token`. Every other argument of HFLM is
            honoured or refused (`a2sf.scoring.pretrained`).
        policy: a `Policy`, a policy's name (`model_args="pretrained=...,policy=h2o,budget_ratio=0.2"`), or the class of
            one of your own, `module:Class`.
        budget: a `Budget`; or give `budget_ratio`, `budget_tokens` and `budget_base`.
        forgetting_factor: for a policy given by name, where it has one.
        schedule: when tokens are evicted, a `Schedule` or its name (`step`, `every4`, `prompt`, `prompt-step`); None: step
            by step, or after the prompt for a policy that knows no other. A request's prompt is its context: of a rolling
            window (perplexity) what lm-eval gives as such, at first the prefix token alone.
        backend: which implementation of the eviction runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
        batch_size: `auto`, or sequences per forward pass.
        shared_context: the field of the documents that is the context, for a schedule that cuts after it
            (`a2sf.scoring.contexts`).

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
        policy: Policy | type[Policy] | str = "full",
        budget: Budget | int | float | None = None,
        budget_ratio: float | None = None,
        budget_tokens: int | None = None,
        budget_base: str = "total",
        forgetting_factor: Any = None,
        schedule: Schedule | str | None = None,
        backend: str = "auto",
        batch_size: int | str | None = "auto",
        shared_context: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_names(kwargs, inspect.signature(PrunedLM.__init__).parameters)
        check_backend(backend)
        policy = _policy(policy, forgetting_factor)
        budget, schedule = budget_of(budget), schedule_of(schedule)
        if budget is not None and (budget_ratio, budget_tokens, budget_base) != (None, None, "total"):
            raise ConfigError("budget", budget, "give it, or budget_ratio, budget_tokens and budget_base; not both")
        if budget is None and (budget_ratio is not None or budget_tokens is not None or policy.uses_budget):
            budget = Budget(ratio=budget_ratio, tokens=budget_tokens, base=budget_base)
        if isinstance(pretrained, str):
            loaded, kwargs = load_pretrained(pretrained, kwargs)
            pretrained, self.weights_format = loaded.model, loaded.format
            kwargs.setdefault("tokenizer", loaded.tokenizer)
        else:
            kwargs = check_given(pretrained, kwargs)
        super().__init__(pretrained=pretrained, batch_size=1, **kwargs)
        check_tokens(self, kwargs)
        if self.backend != "causal":
            raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
        self._device = input_device(self.model)
        self.engine = backend
        self.shared_context = shared_context
        self._before_cut: dict[str, int] = {}  # tokens of the shared context, by the prompt
        self._cuts: dict[str, int] = {}  # where prompts to go on from are cut, by their tokens
        self._ended: dict[str, bool] = {}  # whether texts ended, by their prompts' tokens
        self._joined: dict[tuple[str, str], bool] = {}
        self.tokens_per_pass = self.most_tokens
        self.silent = False  # no progress bars
        self._clock: float | None = None  # when the request for log-likelihoods came
        self.trace_documents = 0
        self.spent = 0.0  # seconds in which log-likelihoods were scored, of all members
        self.sequences_per_pass = check_batch_size(batch_size)
        self.use(policy, budget, schedule)

    @property
    def most_tokens(self) -> int:
        """Computed tokens per forward pass on this device, while its memory suffices."""
        return PACK_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, for all members of a group at once; what is known (by `request_hash`) is not computed again.

        Raises:
            NonFiniteError: if a score depends on NaN or infinity, with the documents.
        """
        self._begin()
        hashes = [request_hash(r.args) for r in requests]
        self._documents = {str(r.args): document_of(r) for r in requests}
        self._find_contexts(requests, self.group or [self.member])
        asking = [m for m in self.group or [self.member] if m.error is None]
        for member in asking:
            member.asked = len(set(hashes))
            member.planned = member.read = member.new = 0
        new = {h: r for h, r in zip(hashes, requests, strict=True) if any(m.answer(h) is None for m in asking)}
        for r in new.values():
            context, continuation = r.args
            if not context and not self.tok_encode(continuation, add_special_tokens=False):  # where lm-eval fails
                raise UserError(f"{self._subject([str(r.args)])}: {NOTHING.format('continuation')}")
        if new:
            self._clock = time.perf_counter()
            with self.aside():
                super().loglikelihood(list(new.values()), disable_tqdm=disable_tqdm or self.silent)
        if self.member.error is not None:
            raise self.member.error
        for r in filter(self._to_trace, requests):
            context, continuation = r.args
            alone = (
                [self.prefix_token_id],
                self.tok_encode(continuation, add_special_tokens=False),
            )  # as lm-eval reads it
            tokens = self._encode_pair(*r.args) if context else alone
            request = self._request(tokens[0], tokens[1], prompt=context)
            n = request.context
            self._trace(r.doc_id, list(request.read[:n]), list(request.read[n:]), request.retention, request.prompt)
        found = [self.member.answer(h) for h in hashes]
        for r, h, answer in zip(requests, hashes, found, strict=True):
            assert answer is not None
            self.lengths[h] = answer.context, answer.continuation
            self.unread[h] = max(0, answer.context + answer.continuation - self.max_length - 1)
            self._count(self.member, answer.context, answer.continuation, r.args[0], reused=h in self.known)
        self._warn_of_unread(requests, hashes)
        return [a[:2] for a in found if a is not None]

    def joins(self, context: str, continuation: str) -> bool:
        """Whether a token goes across the end of a context, so that lm-eval scores something else than the continuation."""
        if not context:
            return False  # the continuation is then tokenised by itself
        if (key := (context, continuation)) not in self._joined:
            read, scored = self._encode_pair(context, continuation)
            self._joined[key] = self.tok_encode(context + continuation) != [*read, *scored]
        return self._joined[key]

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

    def _trace(
        self, document: int, context: list[int], continuation: list[int], kept: tuple[Retention, ...], cut: int
    ) -> None:
        """Read one sequence by itself and note what every layer evicts, and the attention behind it, in `traces`."""
        read = context + continuation
        plan = Plan.of_rows(
            [len(read)],
            [0],
            lambda row, layer: kept[layer],
            self.layers,
            schedule=self.schedule,
            prompt=lambda row: cut,
            policy_on_sliding=not mixes_windows(self.model.config),
            backend=self.engine,
            trace=True,
        )
        with attached(self.model), torch.inference_mode(), running(plan):
            last = torch.tensor([len(read) - 1], device=self.device)
            logits_at(self.model, last, input_ids=torch.tensor([read], device=self.device), use_cache=False)
        noted = (plan.evicted_at, plan.received, plan.lost)
        arrays = (torch.cat([of_layer[i].cpu() for i in range(self.layers)]).numpy() for of_layer in noted)
        pieces = tuple(self.tokenizer.decode([t]) for t in read)
        self.traces.append(Trace(document, pieces, len(context), *arrays))

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of tokens; those that come with their strings are computed for all members, and kept by `request_hash`."""
        if not self.group:
            self.member.error = None
        hashes = [None if strings is None else request_hash(strings) for strings, _, _ in requests]
        asked = [a for j in range(len(requests)) for a in self._asked(requests, hashes, j)]
        asked = [a for a in asked if a.member.error is None]  # nothing is computed for who cannot be answered in full
        for a in (a for a in asked if hashes[a.number] is not None):
            a.member.planned += len(a.request.read)
            a.member.new += 1
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(asked), disable=disable_tqdm or self.silent, desc="log-likelihoods", leave=False)
        started = self._clock or time.perf_counter()
        self._clock = None
        if asked:  # tokenising was for everybody
            each = (time.perf_counter() - started) / len(members := {id(a.member): a.member for a in asked})
            for member in members.values():
                member.seconds += each

        def done(a: Asked, value: float, greedy: bool) -> None:
            strings, context, continuation = requests[a.number]
            if (h := hashes[a.number]) is not None:
                a.member.answers[h] = Answer(value, greedy, len(context), len(continuation))
                a.member.read += len(a.request.read)
            if a.member is self.member:
                answers[a.number] = (value, greedy)
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, (value, greedy))
            bar.update()

        def failed(member: Member, error: Exception, numbers: list[int]) -> None:
            if isinstance(error, NonFiniteError):
                member.error = error.about(self._subject(str(requests[j][0]) for j in numbers))

        require_exact(self.model)
        about = Model(self.layers, not mixes_windows(self.model.config), self.engine, self.device)
        scoring = Scoring(self.model, about, self.tokens_per_pass, self.sequences_per_pass)
        if self.due is not None:
            document = [self._documents.get(str(strings), ("", -1))[1] for strings, _, _ in requests]
            scoring.due = lambda number, due=self.due: due(document[number])
        try:
            with attached(self.model), torch.inference_mode():
                scoring.run(asked, done, failed, self.after_pass or (lambda: None))
        finally:
            self.tokens_per_pass = scoring.tokens_per_pass
            self.spent += time.perf_counter() - started
            bar.close()
        if self.member.error is not None:
            raise self.member.error
        for h, (_, context, continuation) in zip(hashes, requests, strict=True):
            if h is None:
                self._count(self.member, len(context), len(continuation))
        return [answers[j] for j in range(len(requests)) if j in answers]

    def _asked(self, requests: Sequence[Any], hashes: Sequence[str | None], j: int) -> Iterator[Asked]:
        """Request `j` as each member that lacks its answer reads it."""
        strings, context, continuation = requests[j]
        h = hashes[j]
        for member in [self.member] if h is None else self.group or [self.member]:
            if member.error is None and (h is None or member.answer(h) is None):
                try:
                    self._check_tokens([*context, *continuation], str(strings))
                    prompt = strings[0] if strings else None
                    yield Asked(member, self._request(context, continuation, member, prompt), j)
                except (UserError, ValueError) as error:
                    subject = "" if strings is None else self._subject([str(strings)])
                    member.error = type(error)(f"{subject}: {error}") if subject else error

    def _request(
        self, context: list[int], continuation: list[int], member: Member | None = None, prompt: str | None = None
    ) -> Request:
        if not context or not continuation:
            raise UserError(NOTHING.format("continuation" if context else "context"))
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context window of "
                f"{self.max_length}; choose another task or model"
            )
        member = member or self.member
        # as HFLM: too long a context loses its beginning, and the last token is only predicted
        whole = (context + continuation)[-(self.max_length + 1) :]
        cut = self._cut(member, len(whole) - len(continuation), len(context), prompt)
        kept = self.retention(len(whole) - 1, cut, member)
        return Request(tuple(whole[:-1]), tuple(continuation), kept, member.schedule, cut)

    def _count(
        self, member: Member, context: int, continuation: int, prompt: str | None = None, reused: bool = False
    ) -> None:
        """Count a request that was answered, of which only the lengths are known."""
        read = min(context + continuation, self.max_length + 1) - continuation  # as `_request`
        total, cut = read + continuation - 1, self._cut(member, read, context, prompt)
        kept = self.retention(total, cut, member)
        member.counts.count_targets(continuation, read, kept, cut)
        if reused:
            member.counts.reused += 1
        else:
            member.counts.count_read(total, cut, kept)

    def _find_contexts(self, requests: Sequence[Any], members: Sequence[Member]) -> None:
        """Note where the prompts' shared contexts end; a member that asks for it goes no further where they have none."""
        self._before_cut = {}
        cutting = [m for m in members if m.error is None and m.schedule.before_question]
        try:
            if cutting and self.shared_context is None:
                raise ConfigError("schedule.at", "context", "it needs the name of a document's field as shared_context")
            if cutting:
                contexts = Contexts(str(self.shared_context), self.tok_encode)
                self._before_cut = {r.args[0]: contexts.tokens(r.args[0], r.doc) for r in requests}
        except UserError as error:
            for member in cutting:
                member.error = error

    def _cut(self, member: Member, read: int, whole: int, prompt: str | None) -> int:
        """Tokens before the prompt schedule's cut: those of the prompt, or of the context that it begins with.

        Args:
            read: the prompt's tokens that are read, of `whole` the last ones.

        Raises:
            UserError: if nothing of the context is read, or nothing says where it ends.
        """
        if not member.schedule.before_question:
            return read
        if prompt not in self._before_cut:
            raise UserError("schedule.at=context cuts after the context of a prompt, and a request has none")
        if (cut := self._before_cut[prompt] - (whole - read)) < 1:
            raise UserError(
                f"a prompt of {whole} tokens does not fit the model's {self.max_length} positions, so that nothing is left "
                "of the context that schedule.at=context cuts after"
            )
        return cut


def _policy(given: Policy | type[Policy] | str, forgetting_factor: Any) -> Policy:
    """The policy that is given, one that is named with its forgetting factor.

    Raises:
        ConfigError: if there is none, or it has no such factor.
    """
    if forgetting_factor is None:
        return policy_of(given)
    if not isinstance(given, str):
        raise ConfigError("forgetting_factor", forgetting_factor, "it is for a policy that is given by its name")
    named = find_policy(given)
    if "forgetting_factor" not in {f.name for f in dataclasses.fields(named)}:
        raise ConfigError("forgetting_factor", forgetting_factor, f"{given} has none; leave it out")
    return named(forgetting_factor=forgetting_factor)  # type: ignore[call-arg]


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
