"""Facts in a long text and questions about them: the task families of RULER (arXiv 2404.06654).

A family is a function from a seed to a `Scene`: how its text is made at any size, and several questions about it, so that
one text is read for all of them. Each question has a written answer and four choices, one of them right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from a2sf.tasks.long.text import Pool, code, coded_word, name, rarer_thing, sentences, thing

QUESTIONS = 4
"""Questions about one text."""
CHOICES = 4
INTRODUCTION = "Read the text and remember what it says.\n\n"
LIST_INTRODUCTION = "Read the list and remember which entries come again and again.\n\n"
OTHER_KEYS = 12
"""Facts of the same form without a question."""
VALUES, QUERIES, HOPS = 3, 2, 4
NUMBERS = {3: "three", 4: "four"}
COMMON_TIMES, RARE_TIMES = 20, 2
"""How often a common and an uncommon entry of a list occur."""
PLAIN_THINGS = 3000
"""Uncommon entries of two words; those that a longer list needs have three."""
ZIPF, ZETA = 1.5, 2.612
"""The coded word of rank `k` is a share of `k ** -ZIPF / ZETA` of all."""
RARE_RANK = 9
"""The first rank whose words are wrong choices; the right ones are the `QUESTIONS` most frequent."""

Count = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """One question about a text.

    Attributes:
        text: the question.
        prefix: how the answer begins.
        answers: what has to be named.
        choices: ends of the answer, the right one among them.
        gold: its place.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Scene:
    """A text that can be made at any size, and the questions about it.

    Attributes:
        write: number of units of filler (sentences, kinds of entries, words) -> the text; more units, longer text.
        questions: to choose the answer of.
        written: to write the answer to.
    """

    write: Callable[[int], str]
    questions: tuple[Question, ...]
    written: tuple[Question, ...]


def single(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """One fact of each kind hidden in prose, at depths all over it; the wrong choices are nowhere in the text."""
    kinds = ("access code", "ticket number", "phone number", "account number")
    names, codes = pool.take(name, QUESTIONS), pool.take(code, QUESTIONS * CHOICES)
    facts, questions = [], []
    for i, (kind, who) in enumerate(zip(kinds, names, strict=True)):
        right, *wrong = codes[CHOICES * i : CHOICES * (i + 1)]
        facts.append((_depth(rng, i, QUESTIONS), f"The {kind} of {who} is {right}."))
        question = f"What is the {kind} of {who}?"
        questions.append(_question(rng, question, f"The {kind} of {who} is", [right], wrong))
    return Scene(_prose(seed, facts), tuple(questions), tuple(questions))


def multikey(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """One of many facts of the same form; the wrong choices are other keys' values."""
    n = QUESTIONS + OTHER_KEYS
    names, codes = pool.take(name, n), pool.take(code, n)
    depths = [_depth(rng, i, QUESTIONS) for i in range(QUESTIONS)] + [rng.random() for _ in range(OTHER_KEYS)]
    facts = [(d, f"The access code of {k} is {v}.") for d, k, v in zip(depths, names, codes, strict=True)]
    questions = []
    for who, right in zip(names[:QUESTIONS], codes[:QUESTIONS], strict=True):
        wrong = rng.sample([c for c in codes if c != right], CHOICES - 1)
        question = f"What is the access code of {who}?"
        questions.append(_question(rng, question, f"The access code of {who} is", [right], wrong))
    return Scene(_prose(seed, facts), tuple(questions), tuple(questions))


def multivalue(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """Several values of one key, far apart; in each wrong choice one of them is another key's."""
    names, codes = pool.take(name, QUESTIONS), pool.take(code, QUESTIONS * VALUES)
    of = [codes[VALUES * i : VALUES * (i + 1)] for i in range(QUESTIONS)]
    facts, questions = [], []
    for i, (who, values) in enumerate(zip(names, of, strict=True)):
        depths = sorted(rng.random() for _ in values)
        facts += [(d, f"One of the access codes of {who} is {v}.") for d, v in zip(depths, values, strict=True)]
        others = [v for j, other in enumerate(of) if j != i for v in other]
        wrong = [_listed(_instead(values, place, v)) for place, v in enumerate(rng.sample(others, VALUES))]
        question = f"What are the {NUMBERS[VALUES]} access codes of {who}, in the order of the text?"
        questions.append(_question(rng, question, f"The access codes of {who} are", values, wrong))
    return Scene(_prose(seed, facts), tuple(questions), tuple(questions))


def multiquery(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """The values of several keys at once; wrong choices hold another key's, or the right ones in the wrong order."""
    n = QUESTIONS * QUERIES
    names, codes = pool.take(name, n), pool.take(code, n)
    facts = [(_depth(rng, i, n), f"The access code of {k} is {codes[i]}.") for i, k in enumerate(names)]
    order = rng.sample(range(n), n)  # the facts of one question are anywhere in the text
    questions = []
    for q in range(QUESTIONS):
        chosen = order[QUERIES * q : QUERIES * (q + 1)]
        keys, values = [names[i] for i in chosen], [codes[i] for i in chosen]
        others = rng.sample([c for c in codes if c not in values], QUERIES)
        wrong = [_listed(_instead(values, place, v)) for place, v in enumerate(others)] + [_listed(values[::-1])]
        question = f"What are the access codes of {_listed(keys)}?"
        questions.append(_question(rng, question, f"The access codes of {_listed(keys)} are", values, wrong))
    return Scene(_prose(seed, facts), tuple(questions), tuple(questions))


def variables(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """Chains of assignments: which names hold a value? In each wrong choice one name is of another chain."""
    names, codes = pool.take(name, QUESTIONS * HOPS), pool.take(code, QUESTIONS)
    chains = [names[HOPS * i : HOPS * (i + 1)] for i in range(QUESTIONS)]
    facts, questions = [], []
    for i, (holders, value) in enumerate(zip(chains, codes, strict=True)):
        depths = sorted(rng.random() for _ in holders)
        given = [value, *holders[:-1]]
        facts += [(d, f"Let {to} be {what}.") for d, to, what in zip(depths, holders, given, strict=True)]
        others = [c for j, c in enumerate(chains) if j != i]
        places = rng.sample(range(1, HOPS), CHOICES - 1)  # beside the first name stands the value
        wrong = [_listed(_instead(holders, p, other[p])) for p, other in zip(places, others, strict=True)]
        question = f"Which {NUMBERS[HOPS]} names are {value}, directly or by way of another name?"
        questions.append(_question(rng, question, f"The names that are {value} are", holders, wrong))
    return Scene(_prose(seed, facts), tuple(questions), tuple(questions))


def common(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """A list of things, a few of them ten times as common as the others; the wrong choices are uncommon ones."""
    words = pool.take(thing, QUESTIONS * CHOICES)
    often, seldom = words[:QUESTIONS], words[QUESTIONS:]
    rare = _Lazy(chain(seldom, islice(pool.stream(thing), PLAIN_THINGS), pool.stream(rarer_thing)))

    def write(n: int) -> str:
        entries = [w for w in often for _ in range(COMMON_TIMES)]
        entries += [w for w in rare.first(len(seldom) + n) for _ in range(RARE_TIMES)]
        return LIST_INTRODUCTION + ", ".join(random.Random(f"{seed}/order").sample(entries, len(entries))) + "."

    return Scene(write, *_most("common", rng, often, seldom))


def frequent(seed: str, rng: random.Random, pool: Pool) -> Scene:
    """Coded words whose frequencies fall with their rank; right choices have the first ranks, wrong ones later ranks."""
    coded = pool.take(coded_word, QUESTIONS * CHOICES)
    often, seldom = coded[:QUESTIONS], coded[QUESTIONS:]
    between = islice(pool.stream(coded_word), RARE_RANK - 1 - QUESTIONS)
    ranked = _Lazy(chain(often, between, seldom, pool.stream(coded_word)))

    def write(n: int) -> str:
        known = RARE_RANK - 1 + len(seldom)  # each of these is there, however short the text
        kinds = max(known, int((n / ZETA) ** (1 / ZIPF)))
        times = [max(n * k**-ZIPF / ZETA, 1) for k in range(1, kinds + 1)]
        words = [w for w, many in zip(ranked.first(kinds), times, strict=True) for _ in range(int(many))]
        return LIST_INTRODUCTION + " ".join(random.Random(f"{seed}/order").sample(words, len(words))) + "."

    return Scene(write, *_most("frequent", rng, often, seldom))


FAMILIES: dict[str, Callable[[str, random.Random, Pool], Scene]] = {
    f.__name__: f for f in (single, multikey, multivalue, multiquery, variables, common, frequent)
}


def scene_of(family: str, seed: str, count: Count) -> Scene:
    """A scene of a family of `FAMILIES`; equal seeds give equal ones."""
    rng = random.Random(seed)
    return FAMILIES[family](seed, rng, Pool(rng, count))


class _Lazy:
    """A list that is filled from a stream as far as it is read."""

    def __init__(self, stream: Iterator[str]) -> None:
        self._stream, self._made = stream, list[str]()

    def first(self, n: int) -> list[str]:
        self._made += islice(self._stream, max(0, n - len(self._made)))
        return self._made[:n]


def _prose(seed: str, facts: Sequence[tuple[float, str]]) -> Callable[[int], str]:
    """Sentences of filler with `facts` at their depths (0 to 1) among them; equal depths in the order given."""
    filler = _Lazy(sentences(random.Random(f"{seed}/filler")))

    def write(n: int) -> str:
        text = filler.first(n)
        for depth, fact in sorted(facts, key=lambda f: f[0], reverse=True):  # from the end: no place before it moves
            text.insert(round(depth * n), fact)
        return INTRODUCTION + " ".join(text)

    return write


def _depth(rng: random.Random, i: int, n: int) -> float:
    """The depth of the `i`-th of `n` facts that are spread evenly, up to chance."""
    return (i + rng.random()) / n


def _most(
    word: str, rng: random.Random, often: Sequence[str], seldom: Sequence[str]
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The same prompt with one of `often` among the choices of each question; in writing all of them are to be named."""
    question, prefix = (
        f"Which {NUMBERS[QUESTIONS]} entries are the most {word} in the list?",
        f"The most {word} entries are",
    )
    wrong = [seldom[(CHOICES - 1) * i : (CHOICES - 1) * (i + 1)] for i in range(QUESTIONS)]
    questions = [_question(rng, question, prefix, [o], w) for o, w in zip(often, wrong, strict=True)]
    return tuple(questions), (Question(question, prefix, tuple(often), (_listed(often),), 0),)


def _question(rng: random.Random, text: str, prefix: str, answers: Sequence[str], wrong: Iterable[str]) -> Question:
    right = _listed(answers)
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(text, prefix, tuple(answers), tuple(choices), choices.index(right))


def _instead(values: Sequence[str], place: int, other: str) -> list[str]:
    return [*values[:place], other, *values[place + 1 :]]


def _listed(parts: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
