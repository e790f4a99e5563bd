"""A task's requests as a model reads them: texts in tokens, and what identifies each request."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from a2sf.errors import ConfigError, UserError
from a2sf.scoring.contexts import Contexts
from a2sf.scoring.generation.thinking import Thinking
from a2sf.scoring.generation.turns import TurnQuestion, in_order, places
from a2sf.scoring.systems import Answer, System
from a2sf.tasks.prompting import check_stops, draws
from a2sf.tasks.turns import answers_in, most_turns, questions_of

ROLLING = "loglikelihood_rolling"
TEXT = "generate_until"
NOTHING = (
    "a request has no token of {} of its own (as lm-eval tokenises it, the continuation is what comes after the context's "
    "tokens), so that there is nothing to score; change the document, or leave it out"
)
NAMED = 5
"""Documents that a message names at most."""

Window = tuple[list[int], list[int]]
"""Tokens of a context, and of its continuation, whose log-likelihood is computed."""


class Prompt(NamedTuple):
    """A prompt as the model reads it before it generates.

    Attributes:
        tokens: those that are read: the last ones, where all are too many.
        new: how many tokens may follow: those that are generated, in a conversation also those of later questions.
        length: tokens of the prompt, also of what is not read.
        answer: how many tokens one answer has at most.
        text: the prompt as text, of a conversation up to the first answer.
        later: the questions of a conversation after the first.
    """

    tokens: list[int]
    new: int
    length: int
    answer: int
    text: str
    later: tuple[TurnQuestion, ...] = ()


class Requests:
    """Requests of one kind (`loglikelihood`, `loglikelihood_rolling` or `generate_until`).

    Args:
        lm: encodes texts as lm-eval does.
        kind: lm-eval's name of the kind.
        instances: lm-eval's requests, in their order.
        shared_context: the field of the documents that is the context which several questions share; None: there is none.
        thinking: how thinking is recognised in generated texts; None: as the model's arguments say.

    Attributes:
        keys: what identifies each request: a hash of its texts and settings.
    """

    def __init__(
        self,
        lm: HFLM,
        kind: str,
        instances: Sequence[Any],
        shared_context: str | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        self.lm, self.kind, self.shared_context = lm, kind, shared_context
        self.thinking = thinking
        if thinking is None and kind == TEXT:
            self.thinking = Thinking.of(lm.think_end_token, lm.tokenizer, lm.enable_thinking)
        self.instances = list(instances)
        self.keys = keys_of(self.instances)
        self._prompts: dict[int, Prompt] = {}
        self._rolling: dict[int, list[Window]] = {}
        self._joined: dict[tuple[str, str], bool] = {}

    def __len__(self) -> int:
        return len(self.instances)

    def of_documents(self, documents: Collection[int]) -> Requests:
        """Those of some documents, by lm-eval's numbers."""
        chosen = [i for i in self.instances if i.doc_id in documents]
        return Requests(self.lm, self.kind, chosen, self.shared_context, self.thinking)

    def subject(self, which: Iterable[int]) -> str:
        """The documents of some requests (given by their indices) as text for a message; "" if none is known."""
        known = sorted({d for i in which if (d := document_of(self.instances[i]))[1] >= 0})
        if not known:
            return ""
        first = ", ".join(str(document) for _, document in known[:NAMED])
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        return f"task {known[0][0]}, document{'s' if len(known) > 1 else ''} {first}{more}"

    def windows(self, i: int) -> list[Window]:
        """What is scored of a request: one window, or for a rolling log-likelihood several.

        Raises:
            UserError: if there is nothing to score, or the tokenizer does not belong to the model.
        """
        if self.kind == ROLLING:
            if i not in self._rolling:  # each system's answers are counted by them
                tokens = self.lm.tok_encode(self.instances[i].args[0])
                self._check_tokens(tokens)
                windows = utils.get_rolling_token_windows(
                    tokens, self.lm.prefix_token_id, self.lm.max_length, context_len=1
                )
                self._rolling[i] = [utils.make_disjoint_window(w) for w in windows]
            return self._rolling[i]
        context, continuation = self._encode(*self.instances[i].args)
        return [self._checked(context, continuation)]

    def _checked(self, context: list[int], continuation: list[int]) -> Window:
        if not context or not continuation:
            raise UserError(NOTHING.format("continuation" if context else "context"))
        self._check_tokens([*context, *continuation])
        return context, continuation

    def _encode(self, context: str, continuation: str) -> Window:
        """The tokens of a pair, as `lm_eval.api.model.TemplateLM.loglikelihood` has them."""
        if context:
            read, scored = self.lm._encode_pair(context, continuation)
            return list(read), list(scored)
        scored = list(self.lm.tok_encode(continuation, add_special_tokens=False))
        prefix = self.lm.prefix_token_id
        return (scored[:1], scored[1:]) if scored[:1] == [prefix] else ([prefix], scored)

    def joins(self, context: str, continuation: str) -> bool:
        """Whether a token crosses the end of the context, so that lm-eval does not score the continuation alone."""
        if not context:
            return False  # the continuation is then tokenised by itself
        if (key := (context, continuation)) not in self._joined:
            read, scored = self.lm._encode_pair(context, continuation)
            self._joined[key] = self.lm.tok_encode(context + continuation) != [*read, *scored]
        return self._joined[key]

    def prompt(self, i: int) -> Prompt:
        """What is read of a prompt before text is generated.

        Raises:
            UserError: if nothing can be read before so many new tokens, a stop sequence is empty, or the questions of a
                conversation are not what the task says.
        """
        if i not in self._prompts:
            context, given = self.instances[i].args
            settings = normalize_gen_kwargs(copy.deepcopy(given), self.lm.max_gen_toks)
            check_stops(settings["until"], "generation_kwargs.until")
            first, *others = questions_of(context, given)
            later = tuple(self._question(text, n) for n, text in enumerate(others, 2))
            answer, positions = settings["max_gen_toks"], self.lm.max_length
            new = answer * (1 + len(later)) + sum(len(q.tokens) for q in later)
            if new >= positions:
                questions = f", with {len(later)} later questions of a conversation" if later else ""
                raise UserError(
                    f"the task generates up to {new} tokens{questions}, which leaves no room for a prompt in the model's "
                    f"{positions} positions; choose another task or model"
                )
            # lm-eval decides about the beginning-of-sequence token by the first text of a batch, so each is one
            rows, _ = self.lm.tok_batch_encode([first])
            tokens = [int(t) for t in rows[0]]
            if not tokens:
                raise UserError("a prompt has no token, so that there is nothing to continue; change the document")
            self._check_tokens(tokens)
            self._prompts[i] = Prompt(tokens[-(positions - new) :], new, len(tokens), answer, first, later)
        return self._prompts[i]

    def _question(self, text: str, number: int) -> TurnQuestion:
        """A later question of a conversation, tokenised by itself."""
        tokens = tuple(int(t) for t in self.lm.tok_encode(text, add_special_tokens=False))
        if not tokens:
            raise UserError(f"question {number} of a conversation has no token; change the document")
        self._check_tokens(tokens)
        special = {*(getattr(self.lm.tokenizer, "all_special_ids", None) or ()), self.lm.eot_token_id}
        return TurnQuestion(text, tokens, tokens[0] in special)

    def after(self, i: int, answer: Answer) -> list[int]:
        """All tokens that followed a prompt: those that were generated, in a conversation with later questions."""
        if answer.tokens is None:
            return list(self.lm.tok_encode(answer.value, add_special_tokens=False))
        return in_order(answer.tokens, answer.turns or [len(answer.tokens)], self.prompt(i).later)

    def unread(self, i: int, answer: Answer) -> int:
        """How many tokens at a prompt's beginning were not read, since all together were too many."""
        if self.kind == TEXT:
            prompt = self.prompt(i)
            return prompt.length - len(prompt.tokens)
        return max(0, answer.context + answer.continuation - self.lm.max_length - 1)

    def later_answers(self, i: int, answer: Answer) -> list[LaterAnswer]:
        """The answers after the first; none where a request is no conversation."""
        if not answer.turns or answer.tokens is None:
            return []
        before = places(answer.tokens, answer.turns, self.prompt(i).later)
        return [LaterAnswer(*each) for each in zip(before, answer.turns, strict=True)][1:]

    def cut(self, i: int, system: System, read: int, length: int) -> int:
        """Tokens before the cut of a prompt schedule: those of the prompt, or of the context that it begins with.

        Args:
            read: how many of the prompt's `length` tokens are read, the last ones.

        Raises:
            UserError: if nothing of the context is read, or nothing says where it ends.
        """
        if not system.schedule.before_question:
            return read
        if self.kind == ROLLING or not self.instances[i].args[0]:
            raise UserError("schedule.at=context cuts after the context of a prompt, and a request has none")
        if self.shared_context is None:
            raise ConfigError("schedule.at", "context", "it needs the name of a document's field as shared_context")
        instance = self.instances[i]
        text = self.prompt(i).text if self.kind == TEXT else instance.args[0]
        if (cut := self._contexts.tokens(text, instance.doc) - (length - read)) < 1:
            raise UserError(
                f"a prompt of {length} tokens does not fit the model's {self.lm.max_length} positions, so that nothing is "
                "left of the context that schedule.at=context cuts after"
            )
        return cut

    @cached_property
    def _contexts(self) -> Contexts:
        return Contexts(str(self.shared_context), self.lm.tok_encode)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding of, which on a GPU would end the process.

        Raises:
            UserError: with the token.
        """
        known = self.lm.model.get_input_embeddings().num_embeddings
        if tokens and (token := max(tokens)) >= known:
            raise UserError(
                f"the tokenizer gives {self.lm.tokenizer.decode([token])!r} as token {token}, and the "
                f"model knows {known} tokens, the last one {known - 1}: give the tokenizer that belongs to the model"
            )


class EncodedRequests(Requests):
    """Requests that come as tokens, as lm-eval's code gives them to `_loglikelihood_tokens`."""

    def __init__(self, lm: HFLM, encoded: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        texts = [strings or ("", "") for strings, _, _ in encoded]
        super().__init__(lm, "loglikelihood", [Instance("loglikelihood", {}, t, i) for i, t in enumerate(texts)])
        self.keys = [str(i) for i in range(len(encoded))]
        self._encoded = encoded

    def windows(self, i: int) -> list[Window]:
        _, context, continuation = self._encoded[i]
        return [self._checked(list(context), list(continuation))]


def by_kind(
    lm: HFLM,
    instances: Iterable[Any],
    shared_context: str | None = None,
    thinking: Thinking | None = None,
    samples: int | None = None,
) -> list[Requests]:
    """The requests of a task, those of each kind together, each as often as lm-eval repeats it, or as `samples` says."""
    kinds: dict[str, list[Any]] = {}
    for instance in instances:
        kinds.setdefault(instance.request_type, []).extend([instance] * (samples or instance.repeats or 1))
    return [Requests(lm, kind, of_kind, shared_context, thinking) for kind, of_kind in kinds.items()]


class LaterAnswer(NamedTuple):
    """An answer after the first of a conversation.

    Attributes:
        before: how many tokens are between the first question and it.
        tokens: how many it has.
    """

    before: int
    tokens: int


def is_conversation(arguments: tuple[Any, ...]) -> bool:
    """Whether a request that generates text asks several questions, by lm-eval's arguments of it."""
    return most_turns(arguments[1]) is not None


def value_of(arguments: tuple[Any, ...], answer: Answer) -> Any:
    """What lm-eval gets as the answer to a request that generates text: a text, of a conversation a list of them."""
    return answers_in(answer.value) if is_conversation(arguments) else answer.value


def document_of(instance: Any) -> tuple[str, int]:
    """Task and document of one of lm-eval's requests; document -1 where it has none."""
    return str(instance.task_name), -1 if instance.doc_id is None else int(instance.doc_id)


def request_hash(arguments: tuple[Any, ...]) -> str:
    """Identifies a request by its texts, and the settings of its generation."""
    strings = [a if isinstance(a, str) else json.dumps(a, sort_keys=True, default=str) for a in arguments]
    return hashlib.sha256("\0".join(strings).encode()).hexdigest()[:16]


def keys_of(instances: Iterable[Any]) -> list[str]:
    """The hash of each request; if text is drawn at random, each repetition of a request has another key."""
    found: list[str] = []
    times: dict[int, int] = {}
    for instance in instances:
        key = request_hash(instance.args)
        if instance.request_type == TEXT and draws(instance.args[1]):
            times[id(instance)] = times.get(id(instance), -1) + 1  # lm-eval repeats the same object
            key = key_of_draw(key, times[id(instance)])
        found.append(key)
    return found


def key_of_draw(key: str, draw: int) -> str:
    """The key of a request's text number `draw`, counted from 0."""
    return f"{key}#{draw}" if draw else key


def keys_of_draws(arguments: tuple[Any, ...], n: int) -> list[str]:
    """The keys of the n texts of a request; of one if they are not drawn at random, and therefore equal."""
    key = request_hash(arguments)
    return [key_of_draw(key, j) for j in range(n if draws(arguments[1]) else 1)]
