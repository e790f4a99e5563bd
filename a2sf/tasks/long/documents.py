"""The documents of the long-context tasks: texts of given lengths in a model's tokens, with questions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from datasets import Dataset

from a2sf.errors import ConfigError
from a2sf.tasks.long.families import Count, Question, Scene, scene_of

Row = dict[str, Any]
SEARCHES = 12


def documents(
    family: str,
    lengths: Any,
    answer_tokens: int,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    contexts: int = 10,
    room: int = 0,
    seed: int = 0,
    written: bool = False,
    **other: Any,
) -> dict[str, Dataset]:
    """Documents of all lengths in turn, four questions about each context; equal arguments give equal documents.

    Args:
        family: one of `a2sf.tasks.long.families.FAMILIES`.
        lengths: largest number of tokens of a prompt with its answer.
        answer_tokens: largest number of tokens of an answer.
        tokenizer: folder of the model's tokenizer; or `pretrained`, a model as `ModelSpec.path`.
        contexts: number of texts of each length.
        room: tokens to leave free for a chat template or a system instruction.
        seed: of the random texts.
        written: whether answers are generated; then a context may have fewer questions.
        other: further arguments of lm-eval, which are not used.

    Raises:
        ConfigError: if a value is not allowed, or a length is too short for the facts in the text.
    """
    numbers = lengths if isinstance(lengths, list | tuple) else [lengths]
    for key, value, least in (("lengths", lengths, 1), ("contexts", contexts, 1), ("room", room, 0), ("seed", seed, 0)):
        for number in numbers if key == "lengths" else [value]:
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                what = "a list of whole numbers of tokens" if key == "lengths" else "a whole number"
                raise ConfigError(f"task_args.{key}", value, f"give {what}, at least {least}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError("task_args.lengths", lengths, "give a list of lengths in tokens, each once")
    folder = tokenizer or (_folder(pretrained) if pretrained else None)
    if folder is None:
        raise ConfigError(
            "task_args.tokenizer", None, "lengths are in a model's tokens; give its tokenizer, or pretrained"
        )
    return {
        "test": Dataset.from_list(_rows(family, tuple(numbers), answer_tokens, room, folder, contexts, seed, written))
    }


@lru_cache(maxsize=32)
def _rows(
    family: str,
    lengths: tuple[int, ...],
    answer_tokens: int,
    room: int,
    folder: str,
    contexts: int,
    seed: int,
    written: bool,
) -> list[Row]:
    count = _counter(folder)
    of_length: list[list[Row]] = []
    for length in lengths:
        rows = []
        for c in range(contexts):
            scene = scene_of(family, f"{seed}/{family}/{length}/{c}", count)
            text = _text(scene, family, length, answer_tokens, room, count)
            for q in scene.written if written else scene.questions:
                about = {"context": text, "question": q.text, "prefix": q.prefix, "length": length}
                answer = {"answers": list(q.answers), "target": q.choices[q.gold]}
                rows.append(about | answer | {"choices": list(q.choices), "gold": q.gold})
        of_length.append(rows)
    return [row for rows in zip(*of_length, strict=True) for row in rows]


def _text(scene: Scene, family: str, length: int, answer_tokens: int, room: int, count: Count) -> str:
    """The longest text that has at most `length - room` tokens with any of its questions and answers."""
    most = length - room - max(answer_tokens, *(count(f" {c}") for q in scene.questions for c in q.choices))
    least = scene.write(0)
    base = max(count(_prompt(least, q)) for q in scene.questions)
    if base > most:
        need = base + length - most
        raise ConfigError("task_args.lengths", length, f"a text of long_{family} has at least {need} tokens")
    question_tokens = base - count(least)
    sizes = {0: base}

    def size(n: int) -> int:
        if n not in sizes:
            sizes[n] = count(scene.write(n)) + question_tokens
        return sizes[n]

    n = max(1, (most - base) // 10)
    for _ in range(SEARCHES):
        rate = max(0.2, (size(n) - base) / n)
        step = int((most - size(n)) // rate)
        if step == 0 or n + step in sizes:
            break
        n = max(1, n + step)
    while size(n + 1) <= most:
        n += 1
    while n and max(count(_prompt(scene.write(n), q)) for q in scene.questions) > most:
        n -= 1
    return scene.write(n)


def _prompt(text: str, q: Question) -> str:
    return f"{text}\n\nQuestion: {q.text}\nAnswer: {q.prefix}"


def _folder(pretrained: str) -> str:
    from a2sf.hf.loading import ModelSpec, tokenizer_folder

    return str(tokenizer_folder(ModelSpec(pretrained)))


@lru_cache(maxsize=1)
def _counter(folder: str) -> Count:
    """A function that counts the tokens of a text, including special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda text: len(tokenizer(text, verbose=False).input_ids)
