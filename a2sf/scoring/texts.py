"""Generated texts: batches of prompts through transformers' `generate` and a bounded cache."""

from __future__ import annotations

import copy
import json
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from a2sf.engine.kernels import noting
from a2sf.errors import ConfigError, Notice, UserError
from a2sf.hf.attention import NonFiniteError, UnsupportedModel
from a2sf.hf.cache.pruned import PrunedCache, prove_decoding
from a2sf.scoring.generation.ends import EOS, LENGTH, STOP, Ends, Text
from a2sf.scoring.generation.thinking import Thinking
from a2sf.scoring.requests import Requests
from a2sf.scoring.systems import Answer, Answers
from a2sf.tasks.prompting import draws
from a2sf.tasks.warned import collected

if TYPE_CHECKING:
    from a2sf.scoring.scorer import Scorer

GENERATED_ROWS = 8
"""Sequences generated at a time where `batch_size` is auto."""
LEAST_TOKENS = 64
"""Tokens per pass below which a GPU's memory is taken to be too small."""


class Texts:
    """Generates texts with the model of a `Scorer`."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.lm = scorer, scorer.lm

    def generate(self, requests: Requests, answers: Answers) -> Iterator[None]:
        """Generate the texts that one system lacks; yields after each batch. If it fails, that becomes `answers.error`."""
        if answers.error is not None:
            return
        try:
            with collected(answers.warned):
                batches = self._batches(requests, answers)
                if self.scorer.seed is not None and any(draws(i.args[1]) for i in requests.instances):
                    torch.manual_seed(self.scorer.seed)
            while batches:
                batch = batches.pop(0)
                try:
                    with collected(answers.warned, again=True):
                        self._answer(requests, answers, batch)
                except torch.cuda.OutOfMemoryError as error:
                    batches = self._smaller([batch, *batches], error)
                    continue
                yield
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which would hold the cache
            answers.error = error

    def _batches(self, requests: Requests, answers: Answers) -> list[list[int]]:
        """Places of the requests that have no answer, in lm-eval's batches: of equal settings, the longest prompts first."""
        system = answers.system
        if not system.policy.causal:
            raise ConfigError("policy", system.policy.name, "it looks at later tokens, so it cannot generate text")
        prove_decoding(self.scorer.model, system.policy, system.budget)
        missing = set(answers.missing(requests.keys))
        answers.begin(len(missing), len(set(requests.keys)))
        settings: dict[str, list[int]] = {}
        for i, key in enumerate(requests.keys):
            try:
                prompt = requests.prompt(i)
                requests.cut(i, system, len(prompt.tokens), prompt.length)
            except ValueError as error:
                subject = requests.subject([i])
                raise (
                    error if isinstance(error, ConfigError) or not subject else type(error)(f"{subject}: {error}")
                ) from error
            if key in missing:
                missing.discard(key)
                of_instance = requests.instances[i].args[1]
                settings.setdefault(json.dumps(of_instance, sort_keys=True, default=str), []).append(i)
        batches = []
        for equal in settings.values():
            equal.sort(key=lambda i: (-requests.prompt(i).length, requests.instances[i].args[0]))
            batches += [equal[at : at + self._rows] for at in range(0, len(equal), self._rows)]
        return batches

    @property
    def _rows(self) -> int:
        fewer = self.scorer.tokens_per_pass / self.scorer.most_tokens  # after memory ran out
        return max(1, int((self.scorer.sequences_per_pass or GENERATED_ROWS) * fewer))

    def _smaller(self, batches: list[list[int]], error: Exception) -> list[list[int]]:
        """The same requests in batches of half the size; if that is too small, the error is raised again."""
        torch.cuda.empty_cache()
        if self._rows == 1 or self.scorer.tokens_per_pass < LEAST_TOKENS:
            self.scorer.tokens_per_pass = self.scorer.most_tokens  # the next task may be smaller
            raise error
        self.scorer.tokens_per_pass //= 2
        tokens = self.scorer.tokens_per_pass
        message = f"The GPU ran out of memory; the sweep continues with {tokens} tokens per forward pass."
        warnings.warn(message, Notice, stacklevel=2)
        return [b[at : at + self._rows] for b in batches for at in range(0, len(b), self._rows)]

    def _answer(self, requests: Requests, answers: Answers, batch: Sequence[int]) -> None:
        started = time.perf_counter()
        with noting() as ran:
            texts = self._generated(requests, answers, batch)
        answers.ran |= ran
        answers.seconds += time.perf_counter() - started
        for i, (text, tokens) in zip(batch, texts, strict=True):
            answers.computed[requests.keys[i]] = Answer(
                text.value,
                False,
                len(requests.prompt(i).tokens),
                len(self.lm.tok_encode(text.value, add_special_tokens=False)),
                text.finish in (EOS, STOP),
                text.finish,
                tokens,
                text.thinking,
                text.thinking_tokens,
            )

    def _generated(self, requests: Requests, answers: Answers, batch: Sequence[int]) -> list[tuple[Text, list[int]]]:
        """The texts of a batch, as `HFLM.generate_until` makes them, and their tokens."""
        lm, system = self.lm, answers.system
        settings = normalize_gen_kwargs(copy.deepcopy(requests.instances[batch[0]].args[1]), lm.max_gen_toks)
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(settings.pop("until", None), eos=eos)
        new = settings.pop("max_gen_toks")
        prompts = [requests.prompt(i) for i in batch]
        width = max(len(p.tokens) for p in prompts)
        pad = lm.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p.tokens)) + p.tokens for p in prompts], device=lm.device)
        mask = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in prompts], device=lm.device)
        most = settings.pop("max_length", width + new)
        cache = PrunedCache(
            self.scorer.model,
            system.policy,
            system.budget,
            schedule=system.schedule,
            max_new_tokens=most - width,
            # all of a prompt is read in one call; without its length a prompt of one token would look like a chunk
            context_tokens=[
                requests.cut(i, system, len(p.tokens), p.length) for i, p in zip(batch, prompts, strict=True)
            ],
            backend=self.scorer.backend,
        )
        try:
            made = lm._model_generate(
                context=ids, attention_mask=mask, max_length=most, stop=stop, cache=cache, **settings
            )
        except NonFiniteError as error:
            copies = max(1, cache.batch_size // len(batch))  # beams, or several texts of one prompt
            raise error.about(requests.subject({batch[row // copies] for row in error.rows})) from error
        if cache.seen is None:
            raise UnsupportedModel(
                f"{type(self.scorer.model).__name__} did not use the pruned cache that generate() gave it; "
                "choose another model"
            )
        answers.counts.computed += int(cache.seen.sum())
        if len(made) != len(batch):
            raise UserError(
                "several texts of one prompt (num_return_sequences) cannot be scored by lm-eval; leave it out"
            )
        ends = Ends(lm, stop, self._eos, Thinking.of(lm.think_end_token, lm.tokenizer, lm.enable_thinking))
        full = made.shape[1] >= most
        found = []
        for i, row in zip(batch, made[:, width:].tolist(), strict=True):
            tokens = row[: next((at + 1 for at, token in enumerate(row) if token in self._eos), len(row))]
            finish = EOS if tokens[-1] in self._eos else STOP if not full or self._stops(tokens, stop) else LENGTH
            found.append((ends.finished(requests.instances[i].args[0], tokens, finish), tokens))
        return found

    @property
    def _eos(self) -> frozenset[int]:
        eos: Any = self.scorer.model.generation_config.eos_token_id
        return frozenset({self.lm.eot_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})

    def _stops(self, tokens: list[int], stop: list[str]) -> bool:
        return any(s in self.lm.tok_decode(tokens, skip_special_tokens=False) for s in stop)
