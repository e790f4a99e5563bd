"""How prompts are made, as by lm-eval's flags: chat template, system instruction, few-shot turns, settings of generation."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from a2sf.errors import ConfigError, nearest
from a2sf.tasks.turns import with_turns

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names for the number of generated tokens; if several are given, it uses the first of this list."""
OF_LM_EVAL = ("until", *LENGTHS)
"""Settings of generation that lm-eval has in addition to those of transformers."""
EXAMPLES = {"gen_kwargs": "gen_kwargs.max_gen_toks=32", "task_args": "task_args.lengths=[1024,4096]"}
QUESTION = "(the question)"
"""Placeholder for a question, to find the text that a template adds."""
SAMPLING_SEED = 1234
"""Seed for sampling text; lm-eval's default."""


@dataclass(frozen=True)
class Prompting:
    """How prompts are made from a task's documents.

    Attributes:
        chat_template: whether the tokenizer's template is applied, or the name of one of its templates.
        system_instruction: text at the beginning of each prompt; None: none.
        fewshot_as_multiturn: whether examples are turns of the chat; None: as lm-eval, if a template is applied.
        gen_kwargs: settings that replace the task's settings of generation, as JSON; None: none.
        samples: how many answers are drawn for each document; None: as the task says, most often one.
        enable_thinking: given to the chat template, as lm-eval's; None: it is not.
        think_end_token: the token that ends a model's thinking, as lm-eval's; None: no thinking is looked for.

    Raises:
        ConfigError: if a value is not allowed.
    """

    chat_template: bool | str = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: str | None = None
    samples: int | None = None
    enable_thinking: bool | None = None
    think_end_token: str | None = None

    def __post_init__(self) -> None:
        template = False if self.chat_template is None else self.chat_template
        if not isinstance(template, bool | str) or template == "":
            raise ConfigError(
                "chat_template", repr(template), "give true, false, or the name of one of the tokenizer's templates"
            )
        object.__setattr__(self, "chat_template", template)
        object.__setattr__(self, "system_instruction", self.system_instruction or None)
        if self.samples is not None and self.samples < 1:
            raise ConfigError("samples", self.samples, "give the number of answers of each document, at least 1")
        if self.enable_thinking is not None and not self.chat_template:
            given = str(self.enable_thinking).lower()
            raise ConfigError("enable_thinking", given, "it is for the chat template; give chat_template=true as well")
        if self.enable_thinking and self.think_end_token is None:
            raise ConfigError(
                "enable_thinking", "true", "give think_end_token as well, the token that ends the model's thinking"
            )
        known = _known_settings() if self.gen_kwargs else set()
        given = json.loads(self.gen_kwargs) if self.gen_kwargs else {}
        if len(several := [k for k in LENGTHS if k in given]) > 1:
            allowed = f"it means the same as {several[0]}; give one of them"
            raise ConfigError(f"gen_kwargs.{several[1]}", given[several[1]], allowed)
        if given.get("until") is not None:
            check_stops(given["until"], "gen_kwargs.until")
        for key, value in given.items():
            if key not in known:
                allowed = "neither lm-eval nor transformers' GenerationConfig has such a setting"
                raise ConfigError(f"gen_kwargs.{key}", value, allowed + nearest(key, known))

    @property
    def name_of_template(self) -> str | None:
        return self.chat_template if isinstance(self.chat_template, str) else None

    @property
    def _named(self) -> dict[str, str]:
        """Argument of `apply_chat_template` for the template's name; empty for the default."""
        return {"chat_template": self.name_of_template} if self.name_of_template else {}

    @property
    def multiturn(self) -> bool:
        """Whether examples are turns of the chat."""
        return bool(self.chat_template) and self.fewshot_as_multiturn is not False

    def of(self, generates: bool, shots: int) -> Prompting:
        """The settings without those that cannot change a number of a task."""
        turns = False if self.chat_template and shots and not self.multiturn else None
        of_texts = ("gen_kwargs", "samples", "think_end_token")
        given: dict[str, Any] = {name: getattr(self, name) if generates else None for name in of_texts}
        return replace(self, fewshot_as_multiturn=turns, **given)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that differ from lm-eval's defaults, as plain data."""
        given = vars(self) | {"gen_kwargs": json.loads(self.gen_kwargs) if self.gen_kwargs else None}
        default = vars(Prompting())
        return {k: v for k, v in given.items() if v != default[k]}

    def arguments(self, lm: Any) -> dict[str, Any]:
        """Arguments of lm-eval's `build_all_requests`.

        lm-eval 0.4.13 accepts the name of a template but applies the tokenizer's default; here the named one is applied.
        """
        templated = copy.copy(lm)
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        templated.chat_template_args = lm.chat_template_args | self._named | thinking
        return {
            "rank": 0,
            "world_size": 1,
            "apply_chat_template": bool(self.chat_template),
            "system_instruction": self.system_instruction,
            "fewshot_as_multiturn": self.multiturn,
            "chat_template": with_turns(templated.apply_chat_template) if self.chat_template else None,
            "tokenizer_name": lm.tokenizer_name if self.chat_template else "",
        }

    def configure(self, task: Any) -> None:
        """Merge `gen_kwargs` into a task's settings of generation; a second call changes nothing.

        Raises:
            ConfigError: if a setting of generation would have no effect on this task.
        """
        if self.gen_kwargs and task.get_config("output_type") == "generate_until":
            given, of_task = json.loads(self.gen_kwargs), dict(task.config.generation_kwargs or {})
            for other in LENGTHS if any(k in given for k in LENGTHS) else ():
                of_task.pop(other, None)  # another name for the same setting
            merged = of_task | given
            if given.get("temperature") and merged.get("do_sample") is False:
                allowed = f"{task.config.task} sets do_sample: false; give gen_kwargs.do_sample=true as well"
                raise ConfigError("gen_kwargs.temperature", given["temperature"], allowed)
            task.set_config("generation_kwargs", merged)
        if task.get_config("output_type") == "generate_until":
            self.check_samples(task.config.task, task.config.generation_kwargs or {}, task.config.repeats)

    def check_samples(self, task: str, of_task: Mapping[str, Any], repeats: Any = 1) -> None:
        """Refuse a number of answers that does not fit how they are chosen.

        Args:
            of_task: the task's settings of generation.
            repeats: how many answers the task itself requests.

        Raises:
            ConfigError: naming the key.
        """
        given = json.loads(self.gen_kwargs) if self.gen_kwargs else {}
        if self.samples is None:
            if given and draws(dict(given)) and (repeats or 1) == 1:
                key = next((k for k in ("temperature", "do_sample") if given.get(k)), "do_sample")
                why = "answers are then drawn at random; give samples=k too, how many of each document (1 for one)"
                raise ConfigError(f"gen_kwargs.{key}", given[key], why)
            return
        if (repeats or 1) > 1:
            raise ConfigError(
                "samples",
                self.samples,
                f"{task} itself requests {repeats} answers for each document; leave samples out",
            )
        if self.samples > 1 and not draws({**of_task, **given}):
            why = f"{task} takes the likeliest token each time, so that all answers would be equal; give a temperature"
            raise ConfigError("samples", self.samples, f"{why} too, such as gen_kwargs.temperature=0.6")

    def tokens_around(self, tokenizer: Any, shots: int = 0) -> tuple[int, int]:
        """Number of tokens that template and system instruction add before a prompt; and after it and between turns."""
        before, after = self.system_instruction or "", ""
        if self.chat_template:
            system = [{"role": "system", "content": self.system_instruction}] if self.system_instruction else []
            turns = ("user", "assistant") * (shots if self.multiturn else 0)
            messages = [*system, *({"role": role, "content": QUESTION} for role in (*turns, "user"))]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._named)
            before, _, after = text.partition(QUESTION)
            after = after.replace(QUESTION, "")
        head, tail = (len(tokenizer.encode(text, add_special_tokens=False)) for text in (before, after))
        return head, tail

    def check(self, tokenizer: Any, model: str) -> None:
        """Refuse a template that a tokenizer does not have, or a system instruction that its template would drop.

        Args:
            model: its name, for messages.

        Raises:
            ConfigError: naming the templates that the tokenizer has.
        """
        if not self.chat_template:
            return
        templates = getattr(tokenizer, "chat_template", None)
        if not templates:
            raise ConfigError(
                "chat_template", self._as_given, f"the tokenizer of {model} has no chat template; give false"
            )
        name = self.name_of_template
        if not isinstance(templates, dict) and name:
            raise ConfigError(
                "chat_template", name, f"the tokenizer of {model} has one template without a name; give true"
            )
        if isinstance(templates, dict) and (name or "default") not in templates:
            available = ", ".join(sorted(templates))
            why = f"the tokenizer of {model} has the templates {available}{nearest(name or '', templates)}"
            raise ConfigError("chat_template", self._as_given, why)
        if self.system_instruction:
            self._check_system(tokenizer, model)

    def _check_system(self, tokenizer: Any, model: str) -> None:
        """lm-eval drops a system message if the template raises an error at it; some templates drop it themselves."""
        messages = [{"role": "system", "content": self.system_instruction}, {"role": "user", "content": "?"}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **self._named)
        except Exception:  # a template may raise any error, not only jinja's TemplateError
            text = ""
        if str(self.system_instruction).strip() not in text:
            why = f"the chat template of {model} accepts no system message, so it would be dropped; leave it out"
            raise ConfigError("system_instruction", repr(self.system_instruction), why)

    @property
    def _as_given(self) -> str:
        return str(self.chat_template).lower() if isinstance(self.chat_template, bool) else self.chat_template


def check_stops(until: Any, key: str) -> None:
    """Refuse stop sequences that lm-eval cannot use, or that end every text after its first token.

    Raises:
        ConfigError: if one is empty or not text.
    """
    for text in until if isinstance(until, list) else [until]:
        if not isinstance(text, str) or not text:
            raise ConfigError(
                key, repr(until), "give texts of at least one character; an empty one ends every text at once"
            )


def draws(settings: Mapping[str, Any]) -> bool:
    """Whether text is sampled with these settings of generation; a temperature above 0 turns sampling on in lm-eval."""
    return bool(normalize_gen_kwargs(copy.deepcopy(dict(settings)))["do_sample"])


def plain_mapping(key: str, value: Any) -> dict[str, Any]:
    """Settings that a user gives as a mapping, as JSON, or as lm-eval's `a=1,b=2`; empty for None.

    Raises:
        ConfigError: for any other value.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    allowed = f"give each by its name, such as {EXAMPLES[key]}, or all as JSON or lm-eval's a=1,b=2"
    if not isinstance(value, str):
        raise ConfigError(key, value, allowed)
    if value.lstrip().startswith("{"):
        try:
            return dict(json.loads(value))
        except ValueError as error:
            raise ConfigError(key, value, f"it is not JSON ({error}); {allowed}") from error
    if not all("=" in part for part in value.split(",") if part):
        raise ConfigError(key, value, allowed)
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(value))


def packed(settings: Mapping[str, Any]) -> str | None:
    """Settings as one text, equal for equal settings; None if there are none."""
    return json.dumps(settings, sort_keys=True) if settings else None


def _known_settings() -> set[str]:
    from transformers import GenerationConfig

    return {k for k in vars(GenerationConfig()) if not k.startswith("_")} | set(OF_LM_EVAL)
