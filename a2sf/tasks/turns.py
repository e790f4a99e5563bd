"""Conversations: tasks whose documents are several questions, each answered before the next one is read.

lm-eval 0.4.13 has no such format. Here the prompt holds all questions, with `NEXT` between two of them: each stands where
the model answers. `generation_kwargs: {turns: 3}` marks such a task, and says how many questions a document has at most.
Other models of lm-eval refuse this setting instead of reading the marks as text. The answers go to the task's own
`process_results`, as one list of texts per document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from a2sf.errors import ConfigError, UserError

NEXT = "<|next turn|>"
"""Stands between two questions of a prompt, and between two stored answers."""
KEY = "turns"
FILTERS = ("take_first",)
"""Filters of lm-eval that leave a list of texts as it is."""


class TurnAnswers(list[str]):
    """The answers of a conversation, in the order of its questions."""

    def __init__(self, answers: Sequence[str] = ()) -> None:
        if isinstance(answers, str):  # lm-eval's own metrics make the target one of these
            raise UserError(
                "a conversation's answers are a list of texts, which lm-eval's metrics do not compare with a target; give "
                "the task process_results"
            )
        super().__init__(answers)


def most_turns(settings: Mapping[str, Any] | None) -> int | None:
    """How many questions a document has at most; None: the task is no conversation.

    Args:
        settings: of generation, as a task has them.

    Raises:
        ConfigError: if the number of turns is none.
    """
    given = (settings or {}).get(KEY)
    if given is None:
        return None
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(
            f"generation_kwargs.{KEY}", repr(given), "give how many questions a conversation has at most, at least 1"
        )
    return given


def questions_of(prompt: str, settings: Mapping[str, Any]) -> list[str]:
    """The questions of a prompt, the first one with all that comes before it; of a task without turns the prompt itself.

    Raises:
        UserError: if a prompt is a conversation and its task is none, has more questions than it says, or an empty one.
    """
    most, found = most_turns(settings), prompt.split(NEXT)
    if most is None:
        if len(found) > 1:
            raise UserError(
                f"a prompt holds {NEXT}, which stands between the questions of a conversation; give the task "
                f"generation_kwargs.{KEY}, how many questions it has at most"
            )
        return found
    if len(found) > most:
        raise UserError(f"a conversation has {len(found)} questions, and generation_kwargs.{KEY} allows {most}")
    if "" in found:
        raise UserError(f"question {found.index('') + 1} of a conversation is empty; change the document")
    return found


def joined(answers: Sequence[str]) -> str:
    """The answers of a conversation as one text, as they are stored."""
    return NEXT.join(a.replace(NEXT, "") for a in answers)


def answers_in(text: str) -> TurnAnswers:
    """The answers in a stored text."""
    return TurnAnswers(text.split(NEXT))


def with_turns(template: Callable[..., Any]) -> Callable[..., str]:
    """A chat template in which the questions of a conversation are turns of their own, with `NEXT` where answers go.

    Args:
        template: makes a text of a chat, and may take more arguments.

    Raises:
        UserError: if it leaves earlier answers out, or writes them twice.
    """

    def apply(history: Sequence[Mapping[str, str]], *arguments: Any, **settings: Any) -> str:
        chat = as_chat(history)
        text = str(template(chat, *arguments, **settings))
        expected, found = sum(m["content"].count(NEXT) for m in chat), text.count(NEXT)
        if expected != found:
            raise UserError(
                f"the chat template writes {found} of the {expected} answers before a conversation's last question, so that "
                "its turns are not known; leave chat_template out"
            )
        return text

    return apply


def as_chat(history: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A chat whose user messages hold one question each, with `NEXT` as the answers between them."""
    found: list[dict[str, str]] = []
    for message in history:
        first, *later = message["content"].split(NEXT) if message["role"] == "user" else [message["content"]]
        found.append({**message, "content": first})
        for question in later:
            found += [{"role": "assistant", "content": NEXT}, {**message, "content": question}]
    return found


def check_task(name: str, config: Mapping[str, Any], shots: int = 0) -> None:
    """Refuse a conversation task that would be scored wrongly; other tasks pass.

    Args:
        config: the task's definition.

    Raises:
        ConfigError: naming the key.
    """
    settings = config.get("generation_kwargs")
    if most_turns(settings if isinstance(settings, Mapping) else None) is None:
        return
    if config.get("output_type") != "generate_until":
        raise ConfigError(f"generation_kwargs.{KEY}", config.get("output_type"), f"{name} generates no text")
    if not config.get("process_results") and not config.get("class"):
        why = f"{name} is a conversation, whose answers are a list of texts; give a function that scores it"
        raise ConfigError("process_results", "none", why)
    if shots:
        why = f"{name} is a conversation, in which an example would be another turn; give 0"
        raise ConfigError("shots", shots, why)
    if config.get("gen_prefix"):
        raise ConfigError("gen_prefix", config["gen_prefix"], f"{name} is a conversation; write it into each question")
    for chain in config.get("filter_list") or []:
        for step in chain.get("filter") or []:
            if step.get("function") not in FILTERS:
                why = f"{name} is a conversation, whose answers are a list of texts; use process_results alone"
                raise ConfigError("filter_list", step.get("function"), why)
