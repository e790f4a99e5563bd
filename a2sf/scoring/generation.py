"""Answers that the members of a group do not share: generated texts, and log-likelihoods of rolling windows.

They are computed for one member after the other, some at a time, and each is kept in the member before the next is begun.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from a2sf.engine.kernels import noting
from a2sf.errors import ConfigError, UserError
from a2sf.hf.attention import NonFiniteError, UnsupportedModel
from a2sf.hf.cache.pruned import PrunedCache, prove_decoding
from a2sf.scoring.systems import Answer, Members, document_of, request_hash
from a2sf.tasks.prompting import check_stops, draws

log = logging.getLogger("lm_eval.models.a2sf")
UNREAD = "Prompts lose their beginning, since they are too long for the model's"
GENERATED_ROWS = 8
"""Sequences generated at a time where `batch_size` is auto."""

Prompt = tuple[list[int], int, int]
"""The tokens HFLM reads before it generates, how many it generates at most, and the tokens of the whole prompt."""


class OneByOne(Members, HFLM):
    """lm-eval's Hugging Face model, generating and rolling through a pruned cache."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's, through a bounded cache; a request that the member has an answer to is not computed again."""
        if not self.policy.causal:
            raise ConfigError("policy", self.policy.name, "it looks at later tokens, so it cannot generate text")
        prove_decoding(self.model, self.policy, self.budget)
        self._begin()
        hashes = [request_hash(r.args) for r in requests]
        prompts = [self._prompt(*r.args) for r in requests]
        self._find_contexts(requests, [self.member])
        if self.member.error is not None:
            raise self.member.error
        cuts = [self._cut(self.member, len(t), n, r.args[0]) for r, (t, _, n) in zip(requests, prompts, strict=True)]
        self._cuts = {str(tokens): cut for (tokens, _, _), cut in zip(prompts, cuts, strict=True)}
        self._documents = {str(tokens): document_of(r) for r, (tokens, _, _) in zip(requests, prompts, strict=True)}
        for tokens, _, _ in prompts:
            self._check_tokens(tokens, str(tokens))
        self.member.asked = len(set(hashes))
        answers = self._answers(requests, hashes, prompts, disable_tqdm)
        for request, h, answer, (context, most, whole), cut in zip(
            requests, hashes, answers, prompts, cuts, strict=True
        ):
            self.lengths[h] = (len(context), answer.continuation)
            self.unread[h], self.ended[h] = whole - len(context), answer.ended
            kept = self.retention(len(context) + max(0, most - 1), cut)
            self.counts.count_targets(answer.continuation, len(context), kept, cut)
            if h in self.known:
                self.counts.reused += 1
            else:
                self.counts.count_read(len(context) + max(0, answer.continuation - 1), cut, kept)
            if self._to_trace(request) and answer.continuation:
                continuation = self.tok_encode(answer.value, add_special_tokens=False)
                self._trace(request.doc_id, context, continuation[:-1], kept, cut)
        self._warn_of_unread(requests, hashes)
        return [a.value for a in answers]

    def _answers(
        self, requests: Sequence[Any], hashes: Sequence[str], prompts: Sequence[Prompt], disable_tqdm: bool
    ) -> list[Answer]:
        """The texts, in the batches that HFLM would make: of equal settings, the longest prompts first."""
        answers: dict[int, Answer] = {}
        new: dict[str, list[int]] = {}
        for i, (request, h) in enumerate(zip(requests, hashes, strict=True)):
            if (answer := self.member.answer(h)) is not None:
                answers[i] = answer
            else:
                new.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        fewer = self.tokens_per_pass / self.most_tokens  # after memory ran out
        rows = self.batch_size_per_gpu = max(1, int((self.sequences_per_pass or GENERATED_ROWS) * fewer))
        total, silent = sum(map(len, new.values())), disable_tqdm or self.silent
        with tqdm(total=total, disable=silent, desc="texts", leave=False) as bar:
            for alike in new.values():
                alike.sort(key=lambda i: (-prompts[i][2], requests[i].args[0]))
                kept = not draws(requests[alike[0]].args[1])  # what is drawn at random is drawn anew each time
                for first in range(0, len(alike), rows):
                    batch = alike[first : first + rows]
                    for i, text in zip(batch, self._batch([requests[i] for i in batch]), strict=True):
                        length = len(self.tok_encode(text, add_special_tokens=False))
                        tokens = prompts[i][0]
                        answers[i] = Answer(text, False, len(tokens), length, self._ended.get(str(tokens)))
                    self.member.answers |= {hashes[i]: answers[i] for i in batch if kept}
                    bar.update(len(batch))
                    if self.after_pass is not None:
                        self.after_pass()
        return [answers[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Any]) -> list[str]:
        started = time.perf_counter()
        # lm-eval adds to the stop sequences that it is given
        own = [dataclasses.replace(r, arguments=copy.deepcopy(r.args)) for r in requests]
        with noting() as ran:
            texts: list[str] = super().generate_until(own, disable_tqdm=True)
        self.member.ran |= ran
        seconds = time.perf_counter() - started
        self.member.seconds += seconds
        self.spent += seconds
        return texts

    def _prompt(self, context: str, settings: dict[str, Any]) -> Prompt:
        """What is read of a prompt.

        Raises:
            UserError: if nothing can be read before so many new tokens, or a stop sequence is empty.
        """
        settings = normalize_gen_kwargs(copy.deepcopy(settings), self.max_gen_toks)
        check_stops(settings["until"], "generation_kwargs.until")
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            raise UserError(
                f"the task generates up to {most} tokens, which leaves no room for a prompt in the model's "
                f"{self.max_length} positions; choose another task or model"
            )
        whole = self._read(context)
        if not whole:
            raise UserError("a prompt has no token, so that there is nothing to go on from; change the document")
        return whole[-(self.max_length - most) :], most, len(whole)

    def _read(self, context: str) -> list[int]:
        """The tokens of a prompt; of a batch, lm-eval leaves the beginning-of-sequence token as the first text has it."""
        tokens, _ = super().tok_batch_encode([context])
        return list(tokens[0].tolist())

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As HFLM's for each text by itself, padded on the left: so that no text depends on its company."""
        rows = [self._read(s)[-(left_truncate_len or 0) :] for s in strings]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        more = max_length - context.shape[1]
        # the whole prompt comes at once, so that one of a single token is no chunk
        read = [row[mask.bool()].tolist() for row, mask in zip(context, settings["attention_mask"], strict=True)]
        prompt = [self._cuts[str(tokens)] if self.schedule.before_question else len(tokens) for tokens in read]
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
            raise error.about(self._subject(str(read[i]) for i in rows)) from error
        if cache.seen is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} did not use the pruned cache that generate() gave it; choose another model"
            )
        self.counts.computed += int(cache.seen.sum())
        if len(text) == len(read):
            whole = text.shape[1] >= max_length
            ends = [not whole or self._ends(row[context.shape[1] :].tolist(), stop) for row in text]
            self._ended = {str(tokens): end for tokens, end in zip(read, ends, strict=True)}
        return text

    def _ends(self, tokens: list[int], stop: list[str]) -> bool:
        """Whether a text holds a stop sequence or the token that ends it."""
        eos = self.model.generation_config.eos_token_id
        return bool(
            {self.eot_token_id, *(eos if isinstance(eos, list) else [eos])} & set(tokens)
            or any(s in self.tok_decode(tokens, skip_special_tokens=False) for s in stop)
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As HFLM's, which scores one window at a time; what the member has an answer to is not computed again."""
        self._begin()
        hashes = [request_hash(r.args) for r in requests]
        self._documents = {str(r.args): document_of(r) for r in requests}
        for r in requests:
            self._check_tokens(self.tok_encode(r.args[0]), str(r.args))
        self.member.asked = len(set(hashes))
        bar = tqdm(requests, disable=disable_tqdm or self.silent, desc="rolling windows", leave=False)
        return [self._rolled(request, h) for request, h in zip(bar, hashes, strict=True)]

    def _rolled(self, request: Any, h: str) -> float:
        if (answer := self.member.answer(h)) is not None:
            for context, continuation in self._windows(request.args[0]):
                self._count(self.member, len(context), len(continuation), reused=h in self.known)
            return float(answer.value)
        try:
            (value,) = super().loglikelihood_rolling([request], disable_tqdm=True)
        except NonFiniteError as error:
            raise error.about(self._subject([str(request.args)])) from error
        self.member.answers[h] = Answer(value, False, 0, 0)
        return float(value)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """HFLM's windows of a text: context and continuation of each."""
        tokens = self.tok_encode(text)
        windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return [utils.make_disjoint_window(w) for w in windows]

    def _warn_of_unread(self, requests: Sequence[Any], hashes: Sequence[str]) -> None:
        """Warn, as HFLM does, of prompts whose beginning was not read; a sweep says it with the cell instead."""
        cut = [r for r, h in zip(requests, hashes, strict=True) if self.unread[h]]
        if cut:
            task, number = document_of(cut[0])
            which = f", task {task}, document {number} the first" if number >= 0 else ""
            log.warning(f"{UNREAD} {self.max_length} positions: {len(cut)} of {len(requests)} requests{which}.")

    def _check_tokens(self, tokens: Sequence[int], request: str) -> None:
        """Refuse tokens that the model has no embedding of, which on a GPU would end the process.

        Args:
            request: whose they are, as a key of `_documents`.

        Raises:
            UserError: with the token and the document.
        """
        known = self.model.get_input_embeddings().num_embeddings
        if tokens and (token := max(tokens)) >= known:
            where = self._subject([request])
            raise UserError(
                f"{where}{where and ': '}the tokenizer gives {self.tokenizer.decode([token])!r} as token {token}, and the "
                f"model knows {known} tokens, the last one {known - 1}: give the tokenizer that belongs to the model"
            )

    def _begin(self) -> None:
        """A member by itself has no answers but those of this call."""
        if not self.group:
            self.member.answers, self.member.error = {}, None
