"""The documents of the needle task: random names and codes, hidden in filler text; equal for equal seeds."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

LENGTHS = (100, 250, 500, 1000, 2000)
DEPTHS = (0, 25, 50, 75, 100)

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
    sentences: list[str] = []
    while sum(s.count(" ") + 1 for s in sentences) < length:
        parts = (rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ENDINGS))
        sentences.append(" ".join(parts).capitalize() + ".")
    value, at = _code(rng), round(depth / 100 * len(sentences))
    # from the end, so that an insertion does not move earlier positions
    places = [(rng.randint(0, len(sentences)), _needle(name, _code(rng))) for name in others]
    for place, sentence in sorted([*places, (at, _needle(key, value))], key=lambda p: -p[0]):
        sentences.insert(place, sentence)
    return {"context": " ".join(sentences), "key": key, "value": value, "length": length, "depth": depth}


def _needle(name: str, code: str) -> str:
    return f"The access code of {name} is {code}."


def _code(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))
