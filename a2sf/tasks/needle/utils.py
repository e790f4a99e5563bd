"""The documents of the needle tasks: random names and codes, hidden in filler text; equal for equal seeds."""

from __future__ import annotations

import random
import re
from typing import Any

from datasets import Dataset

LENGTHS = (100, 250, 500, 1000, 2000)
DEPTHS = (0, 25, 50, 75, 100)
QUESTIONS = 3
"""Of a conversation."""

SUBJECTS = (
    "the river|a merchant|the old harbour|every visitor|the council|a gardener|the northern road|the museum|a painter"
    "|the mill|the night watch|a letter|the orchard|the choir|a traveller|the bakery|the valley|the railway"
).split("|")
VERBS = (
    "passes|remembers|follows|borders|admires|supplies|crosses|describes|watches|avoids|repairs|feeds|leaves|finds"
    "|measures|greets"
).split("|")
OBJECTS = (
    "the market square|a row of lime trees|the stone bridge|an empty field|the winter road|a small library|the lighthouse"
    "|a field of barley|the town hall|an iron gate|the western shore|a quiet courtyard|the salt works|a narrow lane"
).split("|")
ENDINGS = (
    "before the first snow|in the early morning|without much noise|for most of the year|when the wind turns|on market days"
    "|as it always has|after the long rain|until the lamps are lit|with some reluctance"
).split("|")
SYLLABLES = "ba be da do fa ga ka ki la lo ma mi na no pa ra ri sa so ta ti va vo za".split()


def documents(
    seed: int | str = 0,
    per_cell: int = 10,
    lengths: Any = LENGTHS,
    depths: Any = DEPTHS,
    distractors: int = 0,
    **other: Any,
) -> dict[str, Dataset]:
    """Test documents of all lengths and depths in turn, and short documents for few-shot examples.

    Args:
        per_cell: documents per length and depth; the first `n` documents cover them as evenly as possible.
        lengths: words of filler; depths: percent of the filler before the needle.
        distractors: number of sentences of the same form about other names, at random positions.
        other: further entries of the task's metadata, which are not used.
    """
    grid = [(length, depth) for _ in range(per_cell) for length in lengths for depth in depths]
    short = [(40, depth) for depth in depths for _ in range(2)]
    return {
        "test": Dataset.from_list([_document(f"{seed}/test/{i}", *cell, distractors) for i, cell in enumerate(grid)]),
        "validation": Dataset.from_list(
            [_document(f"{seed}/validation/{i}", *cell, distractors) for i, cell in enumerate(short)]
        ),
    }


def _document(seed: str, length: int, depth: int, distractors: int) -> dict[str, Any]:
    rng = random.Random(seed)
    names: set[str] = set()
    while len(names) <= distractors:
        names.add("".join(rng.choices(SYLLABLES, k=3)).capitalize())
    key, *others = sorted(names, key=lambda _: rng.random())
    sentences = _filler(rng, length)
    value, at = _code(rng), round(depth / 100 * len(sentences))
    # from the end, so that an insertion does not move earlier positions
    places = [(rng.randint(0, len(sentences)), _needle(name, _code(rng))) for name in others]
    for place, sentence in sorted([*places, (at, _needle(key, value))], key=lambda p: -p[0]):
        sentences.insert(place, sentence)
    return {"context": " ".join(sentences), "key": key, "value": value, "length": length, "depth": depth}


def conversations(
    seed: int | str = 0, per_length: int = 10, lengths: Any = LENGTHS, questions: int = QUESTIONS, **other: Any
) -> dict[str, Dataset]:
    """Test documents of all lengths in turn: a text with as many codes as questions, which are asked one after the other.

    Args:
        per_length: documents per length.
        lengths: words of filler.
        questions: of each document; their sentences are spread evenly over the text, and asked for in any order.
        other: further entries of the task's metadata, which are not used.
    """
    made = [_conversation(f"{seed}/turns/{i}/{n}", n, questions) for i in range(per_length) for n in lengths]
    return {"test": Dataset.from_list(made)}


def process_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """The share of a conversation's answers whose first number is the right one; and of the first and the last answer."""
    numbers = [re.search(r"\d+", answer) for answer in results[0]]
    right = [float(n is not None and n.group() == value) for n, value in zip(numbers, doc["values"], strict=True)]
    return {"right": sum(right) / len(right), "right_first": right[0], "right_last": right[-1]}


def _conversation(seed: str, length: int, questions: int) -> dict[str, Any]:
    rng = random.Random(seed)
    codes: dict[str, str] = {}
    while len(codes) < questions:
        codes.setdefault("".join(rng.choices(SYLLABLES, k=3)).capitalize(), _code(rng))
    sentences = _filler(rng, length)
    at = [round((i + 0.5) / questions * len(sentences)) for i in range(questions)]
    for place, name in sorted(zip(at, codes, strict=True), reverse=True):
        sentences.insert(place, _needle(name, codes[name]))
    keys = rng.sample(list(codes), questions)
    asked = [f"Question: What is the access code of {k}?\nAnswer: The access code of {k} is" for k in keys]
    return {
        "context": " ".join(sentences),
        "questions": [asked[0], *(f"\n{question}" for question in asked[1:])],  # after the line of an answer
        "keys": keys,
        "values": [codes[k] for k in keys],
        "length": length,
    }


def _filler(rng: random.Random, length: int) -> list[str]:
    """Sentences of at least `length` words together."""
    sentences: list[str] = []
    while sum(s.count(" ") + 1 for s in sentences) < length:
        parts = (rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ENDINGS))
        sentences.append(" ".join(parts).capitalize() + ".")
    return sentences


def _needle(name: str, code: str) -> str:
    return f"The access code of {name} is {code}."


def _code(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))
