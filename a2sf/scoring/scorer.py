"""Computes the answers of several systems to the same requests; common tokens are computed once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from a2sf.engine.kernels import check_backend
from a2sf.engine.trace import Trace
from a2sf.errors import ConfigError, UserError
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
from a2sf.hf.calls.logits import logits_at
from a2sf.hf.devices import input_device
from a2sf.hf.exactness import require_exact
from a2sf.hf.loading import kv_heads_of
from a2sf.hf.memory import tokens_in_caches, tokens_per_pass
from a2sf.hf.projection import projections_for, projections_of
from a2sf.hf.reader import prepared_for
from a2sf.hf.rotary import rotary_for, rotary_of
from a2sf.hf.settings import check_settings
from a2sf.hf.warned import caused_by
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.prepared import Prepared
from a2sf.policies.schedule import Schedule, schedule_for
from a2sf.scoring.counts import Counts
from a2sf.scoring.passes.run import Passes, Pending
from a2sf.scoring.passes.sequences import PassSettings, ScoredSequence
from a2sf.scoring.requests import ROLLING, TEXT, Requests, Window
from a2sf.scoring.systems import Answer, Answers, System
from a2sf.scoring.texts import TextGenerator

PREPARED_AT_ONCE = 128
"""Requests whose prompts are read beforehand, where a policy does so, before their answers are computed; and prompts whose
prepared numbers are held for further requests."""


class _Missing(NamedTuple):
    """A request without an answer of some systems: its place, its windows, and the places of these systems' answers."""

    request: int
    windows: list[Window]
    systems: list[int]


class Scorer:
    """Scores requests with a model.

    Args:
        lm: the model and its tokenizer, as lm-eval's HFLM holds them.
        backend: which implementation of the eviction runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
        sequences_per_pass: sequences per forward pass; None: as many as `tokens_per_pass` allows.
        seed: of texts that are drawn at random; None: that of torch (`torch.manual_seed`).

    Attributes:
        most_tokens: computed tokens per forward pass that there is memory for, now that the model is loaded.
        tokens_per_pass: those that are taken: as many, or fewer once a GPU's memory did not suffice, which halves them.

    Raises:
        ConfigError: if there is no such backend.
        UnsupportedModel: if the model is no decoder.
    """

    def __init__(
        self, lm: HFLM, backend: str = "auto", sequences_per_pass: int | None = None, seed: int | None = None
    ) -> None:
        check_backend(backend)
        if lm.backend != "causal":
            raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
        self.lm, self.model, self.backend = lm, lm.model, backend
        self.sequences_per_pass, self.seed = sequences_per_pass, seed
        self.device = input_device(self.model)
        self.most_tokens = tokens_per_pass(self.model)
        self.tokens_per_pass = self.most_tokens
        self.layers: int = self.model.config.get_text_config().num_hidden_layers
        self.kv_heads = kv_heads_of(self.model.config)
        self._cache_tokens = tokens_in_caches(self.model) // self.layers
        self._prepared_prompts: dict[tuple[Policy, tuple[int, ...]], Prepared] = {}

    def system(self, policy: Policy, budget: Budget | None, schedule: Schedule | None = None) -> System:
        """A system: a way of pruning this model's cache.

        Args:
            schedule: when tokens are evicted; None: the policy's default.

        Raises:
            ConfigError: if a setting does not fit the model, the budget is too small for the policy, or the policy does not
                know the schedule.
            UnsupportedModel: if the policy sees keys before the rotary embedding or the projection after the attention, and
                the model's is not known.
        """
        check_settings(policy, budget, self.layers, schedule=schedule, kv_heads=self.kv_heads)
        rotary_for(self.model, policy)
        projections_for(self.model, policy)
        return System(policy, budget, schedule_for(policy, schedule), global_layers(self.model.config))

    def answers(self, system: System) -> Answers:
        """An empty `Answers` for a system, which `score` fills."""
        return Answers(system, Counts(system.schedule, self.kv_heads, global_layers(self.model.config)))

    def score(self, requests: Requests, answers: Sequence[Answers]) -> Iterator[None]:
        """Compute the answers that are missing, and put them into `answers`; yields after each forward pass.

        If one system fails, that is its `error`, and the others continue.
        """
        if requests.kind == TEXT:
            yield from TextGenerator(self, requests).generate(answers)
            return
        answers = [a for a in answers if a.error is None]
        for portion in self._portions(self._missing(requests, answers), answers):
            pending = self._pending(requests, answers, portion)
            yield from self._run([p for p in pending if p.answers.error is None], requests)

    def _portions(self, missing: Sequence[_Missing], answers: Sequence[Answers]) -> Iterator[Sequence[_Missing]]:
        """Requests that are prepared and computed together: all, or a few where prompts are read beforehand.

        So an interruption loses what was prepared for one portion, not for all prompts.
        """
        longest = max((len(c) + len(t) for m in missing for c, t in m.windows), default=0)
        beforehand = any(self.reads_prompt_first(a.system.policy, longest) for a in answers)
        size = PREPARED_AT_ONCE if beforehand else max(1, len(missing))
        for at in range(0, len(missing), size):
            yield missing[at : at + size]

    def _missing(self, requests: Requests, answers: Sequence[Answers]) -> list[_Missing]:
        """The requests that some system lacks an answer to, each once, as tokens."""
        clock = time.perf_counter()
        missing = [set(a.missing(requests.keys)) for a in answers]
        wanted = set().union(*missing)
        first = {key: i for i, key in reversed(list(enumerate(requests.keys))) if key in wanted}
        found: list[_Missing] = []
        tokens = [0] * len(answers)
        for key in dict.fromkeys(k for k in requests.keys if k in wanted):
            i = first[key]
            without = [n for n, a in enumerate(answers) if key in missing[n] and a.error is None]
            try:
                windows = requests.windows(i)
            except (UserError, ValueError) as error:
                for n in without:
                    answers[n].error = _naming_documents(requests, i, error)
                continue
            if not windows:  # an empty text, whose log-likelihood is 0
                for n in without:
                    answers[n].computed[key] = Answer(0.0, False, 0, 0)
                continue
            found.append(_Missing(i, windows, without))
            for n in without:
                tokens[n] += sum(min(len(c) + len(t), self.lm.max_length + 1) - 1 for c, t in windows)
        able = [n for n, a in enumerate(answers) if a.error is None]
        for n in able:
            answers[n].begin(len(missing[n]), len(set(requests.keys)), tokens[n])
            answers[n].progress.seconds += (time.perf_counter() - clock) / len(able)  # tokenising serves all of them
        return found

    def _pending(self, requests: Requests, answers: Sequence[Answers], missing: Sequence[_Missing]) -> list[Pending]:
        """Windows of `missing`, as each system that lacks them reads them; a system that cannot gets its `error`."""
        pending: list[Pending] = []
        for i, windows, without in missing:
            for n in without:
                one = answers[n]
                if one.error is not None:
                    continue
                began = time.perf_counter()
                try:
                    with caused_by(one.warned):
                        made = [self.sequence(requests, i, w, one.system) for w in windows]
                except (UserError, ValueError) as error:
                    one.error = _naming_documents(requests, i, error)
                    continue
                if one.system.policy.prepares:
                    one.progress.seconds += time.perf_counter() - began
                pending += [
                    Pending(one, s, i, which, (len(w[0]), len(w[1])))
                    for which, (s, w) in enumerate(zip(made, windows, strict=True))
                ]
        return pending

    def passes(self, pending: Sequence[Pending]) -> Passes:
        """The passes that compute these windows."""
        settings = self.pass_settings(p.sequence for p in pending)
        return Passes(self.model, settings, self.tokens_per_pass, self.sequences_per_pass, self._cache_tokens)

    def _run(self, pending: Sequence[Pending], requests: Requests) -> Iterator[None]:
        """Compute windows; a request has its answer once all its windows have theirs."""
        if not pending:
            return
        require_exact(self.model)
        passes = self.passes(pending)
        windows = Counter((id(p.answers), p.request) for p in pending)
        values: dict[tuple[int, int], dict[int, tuple[float, float | None]]] = {}
        try:
            for done in passes.run(pending):
                for p, value, greedy, cached in done.scores:
                    place = (id(p.answers), p.request)
                    found = values.setdefault(place, {})
                    found[p.window] = value, self._cached_at_end(p.sequence, cached)
                    p.answers.progress.read += len(p.sequence.read)
                    if len(found) < windows[place]:
                        continue
                    if requests.kind == ROLLING:
                        answer = Answer(sum(found[w][0] for w in sorted(found)), False, 0, 0)
                    else:
                        answer = Answer(value, greedy, *p.lengths)
                    held = [n for w in sorted(found) if (n := found[w][1]) is not None]
                    if held:
                        answer = answer._replace(cached=held)
                    p.answers.computed[requests.keys[p.request]] = answer
                for one, error, blamed in done.failures:
                    if isinstance(error, NonFiniteError):
                        one.error = error.about(requests.subject(blamed))
                yield
        finally:
            self.tokens_per_pass = passes.tokens_per_pass

    @staticmethod
    def _cached_at_end(sequence: ScoredSequence, cached: float | None) -> float | None:
        """Tokens cached at the end, where a threshold decides it: `cached`, or all if it was read with the full cache."""
        if all(k.rule.threshold is None for k in sequence.retention):
            return None
        return float(len(sequence.read)) if cached is None else cached

    def sequence(self, requests: Requests, i: int, window: Window, system: System) -> ScoredSequence:
        """A window of request `i` as `system` reads it.

        Raises:
            UserError: if it does not fit the model, or the budget does not fit the policy.
        """
        context, continuation = window
        if len(continuation) > self.lm.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context window of "
                f"{self.lm.max_length}; choose another task or model"
            )
        # as HFLM: too long a context loses its beginning, and the last token is only predicted
        tokens = (context + continuation)[-(self.lm.max_length + 1) :]
        cut = requests.cut(i, system, len(tokens) - len(continuation), len(context))
        made = ScoredSequence.of(system, self.layers, tuple(tokens[:-1]), tuple(continuation), cut)
        return self.decided(made) if self.reads_prompt_first(system.policy, len(made.read)) else made

    def decided(self, sequence: ScoredSequence) -> ScoredSequence:
        """The sequence with its final retention: its prompt is read for its policy if that is not known yet."""
        system = sequence.undecided
        if system is None:
            return sequence
        return sequence.decided(self._prepared(system, sequence.read[: sequence.prompt]))

    def reads_prompt_first(self, policy: Policy, tokens: int) -> bool:
        """Whether a policy's prompts are read in a pass of their own, before the pass of `tokens` tokens that scores them.

        Else the policy looks at that pass, which needs the policy's method `look`, memory for the caches of all layers, and
        the same rotary embedding for the prompt as for the whole.
        """
        if not policy.prepares:
            return False
        return not policy.looks or tokens > min(rope_switch(self.model.config), self._cache_tokens)

    def text_sequence(self, requests: Requests, i: int, text: Sequence[int], system: System) -> ScoredSequence:
        """A text that follows the prompt of request `i`, as `system` reads it with the budgets of generating."""
        prompt = requests.prompt(i)
        cut = requests.cut(i, system, len(prompt.tokens), prompt.length)
        read, total = (*prompt.tokens, *text[:-1]), len(prompt.tokens) + max(0, prompt.new - 1)
        return self.decided(ScoredSequence.of(system, self.layers, read, tuple(text), cut, total - len(read)))

    def _prepared(self, system: System, prompt: tuple[int, ...]) -> Prepared:
        """What a system's policy prepares for a prompt; it is read once for all requests and budgets."""
        key = system.policy, prompt
        if key not in self._prepared_prompts:
            if len(self._prepared_prompts) >= PREPARED_AT_ONCE:
                del self._prepared_prompts[next(iter(self._prepared_prompts))]  # the oldest
            self._prepared_prompts[key] = prepared_for(self.model, system.policy, prompt)
        return self._prepared_prompts[key]

    def pass_settings(self, sequences: Iterable[ScoredSequence]) -> PassSettings:
        """What a pass must know of the model, with the rotary embeddings and projections if a policy needs them."""
        rules = {s.retention[0].rule for s in sequences if s.retention}
        rotary = rotary_of(self.model) if any(r.unrotated for r in rules) else None
        weights = projections_of(self.model) if any(r.projected for r in rules) else None
        return PassSettings(
            self.layers, not mixes_windows(self.model.config), self.backend, self.device, rotary, weights
        )

    def count(self, requests: Requests, answers: Answers) -> None:
        """Add what the requests took to read and to cache to `answers.counts`; each has an answer."""
        counts, system = answers.counts, answers.system
        for i, key in enumerate(requests.keys):
            answer = answers.answer(key)
            assert answer is not None
            for window, (context, targets, new) in enumerate(self._lengths(requests, i, answer)):
                most = targets if new is None else new
                read = min(context, self.lm.max_length + (1 if new is None else 0) - most)
                cut = requests.cut(i, system, read, context)
                retention = system.retention(read + max(0, most - 1), cut, self.layers)
                later = requests.later_answers(i, answer)
                counts.count_targets(targets, read, retention, cut, later)
                if key in answers.known:
                    counts.reused += 1
                else:
                    after = later[-1].before + later[-1].tokens if later else targets
                    counts.count_read(read + max(0, after - 1), cut, retention)
                if answer.cached is not None:
                    last = targets if answer.tokens is None else len(requests.after(i, answer))
                    counts.count_cached(answer.cached[window], read + max(0, last - 1), cut, retention)

    def _lengths(self, requests: Requests, i: int, answer: Answer) -> list[tuple[int, int, int | None]]:
        """Of each window of a request: tokens of the context, of what is scored or was generated, and the limit of these."""
        if requests.kind == TEXT:
            prompt = requests.prompt(i)
            first = answer.turns[0] if answer.turns else answer.thinking_tokens + answer.continuation
            return [(prompt.length, first, prompt.new)]
        if requests.kind == ROLLING:
            return [(len(context), len(continuation), None) for context, continuation in requests.windows(i)]
        return [(answer.context, answer.continuation, None)]

    def traces(self, requests: Requests, answers: Answers, documents: int) -> list[Trace]:
        """What every layer evicts from the first request of each of the first `documents` documents, read once more."""
        chosen: dict[int, int] = {}
        for i, instance in enumerate(requests.instances):
            if requests.kind != ROLLING and instance.doc_id is not None and instance.doc_id < documents:
                chosen.setdefault(instance.doc_id, i)
        made = []
        for document, i in chosen.items():
            answer = answers.answer(requests.keys[i])
            assert answer is not None
            if requests.kind == TEXT:
                if not answer.thinking_tokens + answer.continuation:
                    continue
                sequence = self.text_sequence(requests, i, requests.after(i, answer), answers.system)
            else:
                sequence = self.decided(self.sequence(requests, i, requests.windows(i)[0], answers.system))
            made.append(self._trace(document, sequence))
        return made

    def _trace(self, document: int, sequence: ScoredSequence) -> Trace:
        plan = Plan.of_one(
            len(sequence.read),
            sequence.retention,
            self.model.config,
            schedule=sequence.schedule,
            prompt=lambda row: sequence.prompt,
            backend=self.backend,
            rotary=rotary_of(self.model) if sequence.retention[0].rule.unrotated else None,
            projections=projections_of(self.model) if sequence.retention[0].rule.projected else None,
            trace=True,
        )
        tokens = torch.tensor([sequence.read], device=self.device)
        with attached(self.model), torch.inference_mode(), running(plan):
            logits_at(
                self.model,
                torch.tensor([len(sequence.read) - 1], device=self.device),
                input_ids=tokens,
                use_cache=False,
            )
        noted = (plan.evicted_at, plan.received, plan.lost)
        at, received, lost = (torch.cat([of_layer[i].cpu() for i in range(self.layers)]).numpy() for of_layer in noted)
        pieces = tuple(self.lm.tokenizer.decode([t]) for t in sequence.read)
        every = np.array([*sequence.read, sequence.targets[-1]])
        return Trace(document, pieces, sequence.context, at, received, lost, every)


def _naming_documents(requests: Requests, i: int, error: Exception) -> Exception:
    """The same error with the task and document of request `i` in its message; a `ConfigError` as it is."""
    subject = requests.subject([i])
    return type(error)(f"{subject}: {error}") if subject and not isinstance(error, ConfigError) else error
