"""The lm-eval model `a2sf`: lm-eval's Hugging Face model with a pruned cache."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from a2sf.compat.lm_eval import quiet_about_given_models
from a2sf.engine.kernels import check_backend
from a2sf.engine.trace import Trace
from a2sf.errors import ConfigError
from a2sf.hf.attention import UnsupportedModel
from a2sf.hf.devices import input_device
from a2sf.policies.arguments import budget_of, policy_of, schedule_of
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from a2sf.policies.find import find_policy
from a2sf.policies.schedule import Schedule
from a2sf.scoring.counts import Counts
from a2sf.scoring.pretrained import check_given, check_names, check_tokens, load_pretrained
from a2sf.scoring.requests import ROLLING, TEXT, EncodedRequests, Requests, document_of, value_of
from a2sf.scoring.scorer import Scorer
from a2sf.scoring.systems import Answer, System
from a2sf.tasks.turns import with_turns

NAME = "a2sf"
log = logging.getLogger("lm_eval.models.a2sf")
UNREAD = "Prompts lose their beginning, since they are too long for the model's"


@register_model(NAME)
class PrunedLM(HFLM):
    """lm-eval's Hugging Face model with a pruned cache, `lm_eval.simple_evaluate(model="a2sf", ...)`.

    Args:
        pretrained: a model, or what `ModelSpec.path` may be; then `a2sf.hf.loading` loads it, with `revision`, `dtype` and
            `device` (auto where not given), `trust_remote_code` and `add_bos_token`. Every other argument of HFLM is
            honoured or refused (`a2sf.scoring.pretrained`).
        policy: a `Policy`, a policy's name (`model_args="pretrained=...,policy=h2o,budget_ratio=0.2"`), or the class of
            your own policy, `module:Class`.
        budget: a `Budget`; or give `budget_ratio`, `budget_tokens` and `budget_base`.
        forgetting_factor: for a policy given by name, where it has one.
        schedule: when tokens are evicted, a `Schedule` or its name (`step`, `every4`, `prompt`, `prompt-step`); None: step
            by step, or after the prompt for a policy that knows no other. A request's prompt is its context: of a rolling
            window (perplexity) what lm-eval gives as such, at first the prefix token alone.
        backend: which implementation of the eviction runs, `auto` or a name in `a2sf.engine.kernels.BACKENDS`.
        batch_size: `auto`, or sequences per forward pass.
        shared_context: the field of the documents that is the context, for a schedule that cuts after it
            (`a2sf.scoring.contexts`).

        trace_documents: of so many documents, the first ones, what each layer evicts is noted in `traces`
            (`a2sf.engine.trace`), for the first request of each. It may be set later, too.

    Attributes:
        scorer: computes the answers.
        system: the policy, budget and schedule in use.
        counts: what was read since `use`.
        traces: of the documents that were scored last.
        weights_format: which kind of file the weights were read from; None: not known.

    Raises:
        ConfigError: if a setting is not allowed.
        UnsupportedModel: if the model's attention cannot be pruned exactly.
    """

    weights_format: str | None = None

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
        trace_documents: int = 0,
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
        with quiet_about_given_models():  # every other argument is honoured or refused
            super().__init__(pretrained=pretrained, batch_size=1, **kwargs)
        check_tokens(self, kwargs)
        if self.backend != "causal":
            raise UnsupportedModel("only decoder models have a cache to prune, and this one is an encoder-decoder")
        self._device = input_device(self.model)
        self.scorer = Scorer(self, backend, check_batch_size(batch_size))
        self.shared_context = shared_context
        self.trace_documents = trace_documents
        self.traces: list[Trace] = []
        self.use(policy, budget, schedule)

    def use(self, policy: Policy, budget: Budget | None, schedule: Schedule | None = None) -> None:
        """Score with another policy from now on; counts start anew.

        Args:
            budget: None: for a policy that ignores budgets.
            schedule: when tokens are evicted; None: the policy's default.

        Raises:
            ConfigError: if a setting does not fit the model, the budget is too small for the policy, or the policy does not
                know the schedule.
        """
        self.system: System = self.scorer.system(policy, budget, schedule)
        self.counts: Counts = self.scorer.answers(self.system).counts

    @property
    def policy(self) -> Policy:
        return self.system.policy

    @property
    def budget(self) -> Budget | None:
        return self.system.budget

    @property
    def schedule(self) -> Schedule:
        return self.system.schedule

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, with a pruned cache.

        Raises:
            NonFiniteError: if a score depends on NaN or infinity, with the documents.
        """
        return [a[:2] for a in self._answered("loglikelihood", requests, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's, with a pruned cache in each window."""
        return [float(a.value) for a in self._answered(ROLLING, requests, disable_tqdm)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM's, through a bounded cache; of a conversation (`a2sf.tasks.turns`) a list of texts."""
        found = self._answered(TEXT, requests, disable_tqdm)
        return [value_of(r.args, a) for r, a in zip(requests, found, strict=True)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As HFLM's; the questions of a conversation are turns of their own."""
        return with_turns(super().apply_chat_template)(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return [a[:2] for a in self._scored(EncodedRequests(self, requests), disable_tqdm)]

    def _answered(self, kind: str, instances: Sequence[Any], disable_tqdm: bool) -> list[Answer]:
        return self._scored(Requests(self, kind, instances, self.shared_context), disable_tqdm)

    def _scored(self, requests: Requests, disable_tqdm: bool) -> list[Answer]:
        answers = self.scorer.answers(self.system)
        answers.counts = self.counts
        seen, place = 0, dict(zip(requests.keys, requests.instances, strict=True))
        with tqdm(total=len(set(requests.keys)), disable=disable_tqdm, desc=requests.kind, leave=False) as bar:
            for _ in self.scorer.score(requests, [answers]):
                for key, answer in list(answers.computed.items())[seen:]:
                    if any(args := place[key].args):  # not what came as tokens alone
                        value = value_of(args, answer) if requests.kind == TEXT else answer.value
                        value = answer[:2] if requests.kind == "loglikelihood" else value
                        self.cache_hook.add_partial(requests.kind, args, value)
                bar.update(len(answers.computed) - seen)
                seen = len(answers.computed)
        if answers.error is not None:
            raise answers.error
        self.scorer.count(requests, answers)
        self.traces = self.scorer.traces(requests, answers, self.trace_documents) if self.trace_documents else []
        found = [a for key in requests.keys if (a := answers.answer(key)) is not None]
        self._warn_of_unread(requests, found)
        return found

    def _warn_of_unread(self, requests: Requests, answers: Sequence[Answer]) -> None:
        """Warn, as HFLM does, of prompts whose beginning was not read."""
        if requests.kind == ROLLING:
            return
        cut = [i for i, answer in enumerate(answers) if requests.unread(i, answer)]
        if cut:
            task, number = document_of(requests.instances[cut[0]])
            which = f", task {task}, document {number} the first" if number >= 0 else ""
            log.warning(f"{UNREAD} {self.max_length} positions: {len(cut)} of {len(requests)} requests{which}.")


def _policy(given: Policy | type[Policy] | str, forgetting_factor: Any) -> Policy:
    """The given policy; a name is made a policy with that forgetting factor.

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
