"""Generates the missing texts of several systems; an error of one system does not stop the others."""

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

from a2sf.errors import ConfigError, Notice, UserError
from a2sf.hf.attention import NonFiniteError, rope_switch
from a2sf.hf.cache.checks import check_length
from a2sf.hf.cache.decoding import prove_decoding
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.memory import tokens_in_caches
from a2sf.hf.warned import caused_by
from a2sf.scoring.generation.calls import by_generate
from a2sf.scoring.generation.ends import EOS, STOP, Ends
from a2sf.scoring.generation.row import Row
from a2sf.scoring.generation.rows import RowGenerator
from a2sf.scoring.generation.sampling import Choice
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.scoring.requests import Requests, is_conversation
from a2sf.scoring.systems import Answer, Answers
from a2sf.tasks.turns import KEY, joined
from a2sf.tasks.warned import collected

if TYPE_CHECKING:
    from a2sf.scoring.scorer import Scorer

MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Texts that are generated together where `batch_size` is auto, if there is memory for their caches."""
LEAST_TOKENS = 64
"""Tokens per pass below which a GPU's memory is taken to be too small."""


class TextGenerator:
    """Generates texts with the model of a `Scorer`.

    Args:
        requests: of texts.
    """

    def __init__(self, scorer: Scorer, requests: Requests) -> None:
        self.scorer, self.lm, self.requests = scorer, scorer.lm, requests
        self._settings: dict[str, tuple[dict[str, Any], Choice, Ends]] = {}
        self._empty_caches: dict[tuple[int, int], PrunedCache] = {}  # of a system and a limit, to check lengths with

    def generate(self, answers: Sequence[Answers]) -> Iterator[None]:
        """Generate the texts that systems lack; yields whenever some are finished.

        If a system fails, that is its `error`, and the others continue.
        """
        groups: dict[tuple[str, bool], list[Row]] = {}
        switch = rope_switch(self.scorer.model.config)
        for one in answers:
            if one.error is not None:
                continue
            try:
                with collected(one.warned):
                    made = self._missing(one)
            except Exception as error:
                one.error = error
                continue
            for name, row in made:
                # a call must not mix rows that a rotary embedding treats differently
                groups.setdefault((name, len(row.sequence.read) > switch), []).append(row)
        for (name, _), rows in groups.items():
            # the longest prompts first, as lm-eval has them; all systems' texts of a document follow each other
            rows.sort(key=lambda r: (-len(r.sequence.read), r.request))
            choice = self._settings[name][1]
            yield from self._generate_rows(rows, choice) if choice.plain else self._generate_batches(name, rows)

    def _missing(self, answers: Answers) -> list[tuple[str, Row]]:
        """The texts that a system lacks, each with the name of its settings."""
        system, requests = answers.system, self.requests
        if not system.policy.causal:
            raise ConfigError("policy", system.policy.name, "it looks at later tokens, so it cannot generate text")
        prove_decoding(self.scorer.model, system.policy, system.budget)
        missing = set(answers.missing(requests.keys))
        answers.begin(len(missing), len(set(requests.keys)))
        found = []
        for i, key in enumerate(requests.keys):
            try:
                name, row = self._row(answers, i)
            except ValueError as error:
                subject = requests.subject([i])
                plain = isinstance(error, ConfigError) or not subject
                raise (error if plain else type(error)(f"{subject}: {error}")) from error
            if key in missing:
                missing.discard(key)
                found.append((name, row))
        return found

    def _row(self, answers: Answers, i: int) -> tuple[str, Row]:
        """Request `i` as a system's row, with the name of its settings; checks that the text fits the model."""
        requests, system = self.requests, answers.system
        prompt, given = requests.prompt(i), requests.instances[i].args[1]
        name = json.dumps(given, sort_keys=True, default=str)
        if name not in self._settings:
            self._settings[name] = self._parsed(given)
        settings, choice, ends = self._settings[name]
        follow = settings.get("max_length", len(prompt.tokens) + prompt.new) - len(prompt.tokens)
        limit = follow
        if is_conversation(requests.instances[i].args):
            _check_conversation(settings, choice)
            limit = prompt.answer
        if limit < 1:
            raise UserError(
                f"max_length={settings['max_length']} leaves no room for text after a prompt of {len(prompt.tokens)} tokens"
            )
        cut = requests.cut(i, system, len(prompt.tokens), prompt.length)
        # the last token is never read
        sequence = ScoredSequence.of(system, self.scorer.layers, tuple(prompt.tokens), (0,), cut, follow - 1)
        draw = (requests.keys[i], self._seed) if choice.draws else None
        row = Row(answers, i, sequence, limit, ends, prompt.text, draw, prompt.later)
        if (known := (id(answers), row.follow)) not in self._empty_caches:
            self._empty_caches[known] = self._cache([row])
        length = torch.tensor([len(prompt.tokens)])
        check_length(self._empty_caches[known], length, length, prompt=True)
        return name, row

    @property
    def _seed(self) -> int:
        return torch.initial_seed() if self.scorer.seed is None else self.scorer.seed

    def _parsed(self, given: dict[str, Any]) -> tuple[dict[str, Any], Choice, Ends]:
        """What lm-eval's settings of a request mean: settings for `generate`, how tokens are chosen, what ends a text."""
        lm, model = self.lm, self.scorer.model
        given = {k: v for k, v in given.items() if k != KEY}
        settings = dict(normalize_gen_kwargs(copy.deepcopy(given), lm.max_gen_toks))
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(settings.pop("until", None), eos=eos)
        settings.pop("max_gen_toks")
        of_model = {k: v for k, v in settings.items() if k != "max_length"}
        if not of_model["do_sample"] and not of_model.get("temperature"):
            of_model.pop("temperature", None)  # as lm-eval: 0 stands for greedy search
        choice = Choice(model, of_model)
        return settings, choice, Ends(lm, stop, choice.eos | {lm.eot_token_id}, self.requests.thinking)

    def _cache(self, rows: Sequence[Row]) -> PrunedCache:
        """An empty cache for rows of one system, or of systems with one rule and schedule."""
        system = rows[0].answers.system
        return PrunedCache(
            self.scorer.model,
            system.policy,
            system.budget,
            schedule=system.schedule,
            max_new_tokens=rows[0].follow,
            # without its length a prompt of one token would look like a part of one
            context_tokens=[r.sequence.prompt for r in rows],
            backend=self.scorer.backend,
        )

    def _prepare(self, row: Row) -> bool:
        """Read the row's prompt for its policy if that comes first (`Scorer.reads_prompt_first`).

        False: it failed, which is its system's `error`.
        """
        one, sequence = row.answers, row.sequence
        if one.error is not None:
            return False
        if sequence.undecided is None or not self.scorer.reads_prompt_first(one.system.policy, len(sequence.read)):
            return True
        clock = time.perf_counter()
        try:
            with caused_by(one.warned):
                row.sequence = self.scorer.decided(sequence)
        except Exception as error:
            one.error = error
            return False
        one.progress.seconds += time.perf_counter() - clock
        return True

    def _generate_rows(self, waiting: list[Row], choice: Choice) -> Iterator[None]:
        """Generate texts token by token, rows of all systems together (`RowGenerator`); yields when some are finished."""
        scorer = self.scorer
        settings = scorer.pass_settings(row.sequence for row in waiting)
        limits = self._max_rows, tokens_in_caches(scorer.model), scorer.tokens_per_pass
        rows = RowGenerator(scorer.model, settings, choice, self._cache, self._prepare, *limits)
        while waiting or rows.live:
            try:
                for finished in rows.run(waiting):
                    self._keep(finished)
                    yield
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # which would hold the caches
                begun = rows.abandon()
                again = dict.fromkeys([*begun, *waiting])
                self._failed(rows, list(again), error)
                waiting[:] = [r for r in again if r.answers.error is None]
                if rows.alone:  # system after system, each in its order
                    order = {id(r.answers): i for i, r in reversed(list(enumerate(waiting)))}
                    waiting.sort(key=lambda r: order[id(r.answers)])
                for row in waiting:
                    row.restart()

    def _failed(self, rows: RowGenerator, begun: Sequence[Row], error: Exception) -> None:
        """Set an error on the systems it is about; else generate fewer rows at a time, or one system after the other."""
        systems = {id(r.answers): r.answers for r in begun[: rows.most]}
        if isinstance(error, NonFiniteError):
            for one in {id(r.answers): r.answers for r in rows.culprits}.values():
                one.error = error.about(self.requests.subject([r.request for r in rows.culprits if r.answers is one]))
            return
        if isinstance(error, torch.cuda.OutOfMemoryError) and rows.most > 1 and rows.tokens_per_pass >= LEAST_TOKENS:
            torch.cuda.empty_cache()
            rows.most, rows.room, rows.tokens_per_pass = rows.most // 2, rows.room // 2, rows.tokens_per_pass // 2
            message = f"The GPU ran out of memory; the sweep continues with {rows.most} texts at a time."
            warnings.warn(message, Notice, stacklevel=2)
        elif len(systems) > 1 and not rows.alone:
            rows.alone = True
        else:
            begun[0].answers.error = error

    def _generate_batches(self, name: str, rows: Sequence[Row]) -> Iterator[None]:
        """Generate texts with transformers' `generate`, system after system (`by_generate`)."""
        settings, choice, _ = self._settings[name]
        for one in {id(r.answers): r.answers for r in rows}.values():
            mine = [r for r in rows if r.answers is one]
            if any(k.rule.threshold is not None for k in mine[0].sequence.retention):
                why = "how many tokens its threshold leaves is counted where texts are searched greedily or drawn alone"
                one.error = ConfigError("policy", one.system.policy.name, f"{why}; give other gen_kwargs")
                continue
            of_model = {k: v for k, v in settings.items() if k != "max_length"}
            if choice.draws_at_all:
                torch.manual_seed(self._seed)
            clock = time.perf_counter()
            try:
                for finished in by_generate(self.lm, mine, of_model, self._cache, self.scorer.sequences_per_pass):
                    one.progress.seconds += time.perf_counter() - clock
                    self._keep(finished)
                    yield
                    clock = time.perf_counter()
            except NonFiniteError as error:
                one.error = error.about(self.requests.subject([mine[r].request for r in error.rows]))
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                one.error = error

    def _keep(self, finished: Sequence[Row]) -> None:
        """Store finished texts."""
        for row in finished:
            assert row.finish is not None
            prompts = [row.prompt, *(q.text for q in row.later)]
            turns = [*row.done, (row.tokens, row.finish)]
            texts = [row.ends.finished(q, *turn) for q, turn in zip(prompts, turns, strict=True)]
            finish = next((t.finish for t in texts if t.finish not in (EOS, STOP)), texts[-1].finish)
            several = is_conversation(self.requests.instances[row.request].args)
            row.answers.computed[self.requests.keys[row.request]] = Answer(
                joined([t.value for t in texts]) if several else texts[0].value,
                False,
                len(row.sequence.read),
                sum(len(self.lm.tok_encode(t.value, add_special_tokens=False)) for t in texts),
                finish in (EOS, STOP),
                finish,
                [token for tokens, _ in turns for token in tokens],
                joined([t.thinking for t in texts]) if any(t.thinking for t in texts) else "",
                sum(t.thinking_tokens for t in texts),
                None if row.cached is None else [row.cached],
                [len(tokens) for tokens, _ in turns] if several else None,
            )

    @property
    def _max_rows(self) -> int:
        return self.scorer.sequences_per_pass or MOST_ROWS["cpu" if self.scorer.device.type == "cpu" else "cuda"]


def _check_conversation(settings: dict[str, Any], choice: Choice) -> None:
    """Refuse settings of generation that a conversation cannot have.

    Raises:
        ConfigError: with the setting.
    """
    if "max_length" in settings:
        why = "it counts the prompt, and a conversation has several; give max_gen_toks, the most tokens of one answer"
        raise ConfigError("generation_kwargs.max_length", settings["max_length"], why)
    if not choice.plain:
        given = ", ".join(sorted(settings))
        why = (
            "a conversation is generated token by token; leave out beams, and what else needs more than the next logits"
        )
        raise ConfigError("generation_kwargs", given, why)
