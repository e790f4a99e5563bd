"""Text of the long-context tasks: sentences of a small grammar, invented names and codes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

PEOPLE = (
    "the miller|a young doctor|our neighbour|the ferryman|a retired teacher|the night watch|an apprentice|the librarian"
    "|a travelling salesman|the mayor|two sisters|the baker's son|an old sailor|the gardener|a clerk from the town hall"
    "|the innkeeper|a painter|the choir|three students|the postman|a shepherd|the stationmaster|her uncle|the carpenter"
).split("|")
ACTS = (
    "repaired|carried|described|remembered|sold|borrowed|painted|measured|cleaned|found|hid|praised|counted|moved"
    "|sketched|returned|polished|inherited|weighed|photographed"
).split("|")
THINGS = (
    "a wooden boat|the church clock|a basket of pears|the long ladder|an iron stove|a map of the valley|the blue door"
    "|a pair of boots|the garden wall|an old piano|a crate of bottles|the winter coats|a broken wheel|the brass lamp"
    "|a sack of barley|the stone bench|a box of letters|the weather vane|a heavy rope|the kitchen table"
).split("|")
PLACES = (
    "by the river|behind the mill|near the market square|at the edge of the wood|on the stone bridge|in the harbour"
    "|under the lime trees|at the end of the lane|beside the railway|in the schoolyard|on the western shore"
    "|above the salt works|in front of the museum|along the northern road|in the quiet courtyard|at the old ford"
).split("|")
TIMES = (
    "in early spring|before the first snow|on market day|after the long rain|late in the evening|at dawn"
    "|during the harvest|one cold morning|when the wind turned|on the last day of the fair|around noon|that same week"
).split("|")
STATES = (
    "was busier than usual|smelled of bread and smoke|had been swept that morning|lay empty for an hour"
    "|was covered with leaves|looked smaller than before|was lit by a single lamp|could be heard from far away"
    "|had not changed in years|was full of voices|needed a new roof|stood open all day"
).split("|")
SPOTS = (
    "the square|the harbour|the mill|the old inn|the station|the orchard|the town hall|the bakery|the ferry landing"
    "|the school|the museum|the north gate|the workshop|the library"
).split("|")
REASONS = (
    "because nobody else had the time|although it was not urgent|so that it would last another year"
    "|as the council had asked|without telling anyone|to the surprise of the others|for a fair price"
    "|with some help from a friend|as if it were nothing|and went home early"
).split("|")
SHAPES: tuple[tuple[str | Sequence[str], ...], ...] = (
    (PEOPLE, ACTS, THINGS, PLACES),
    (TIMES, PEOPLE, ACTS, THINGS),
    (PEOPLE, ACTS, THINGS, REASONS),
    (TIMES, SPOTS, STATES),
    (SPOTS, STATES, TIMES),
    (PEOPLE, ACTS, THINGS, PLACES, TIMES),
)
SYLLABLES = (
    "ba be bo da de do fa ga ka ke ki la le lo ma me mi na ne no pa ra re ri sa se so ta te ti to va ve vo za zo"
)
ADJECTIVES = (
    "amber blue bright broken copper cotton early empty frozen gentle golden green heavy hollow humble iron ivory late"
    " little lonely marble narrow northern olive open painted pale plain polished quiet red round rusty silent silver"
    " simple sleepy small soft stone sunny tall tiny velvet warm white wild wooden woven yellow young"
).split()
NOUNS = (
    "anchor apple arrow barrel basket bell bench blanket boat bottle bowl box bridge broom bucket button candle carpet"
    " chair chest clock coat compass cradle crown cup curtain door drum engine fence flag flute fork garden gate glove"
    " hammer harp hat helmet hook horn jar kettle key kite knife ladder lamp lantern lock map mask mirror needle oar"
    " paddle pan pencil pillow pipe plate pocket pot purse ring roof rope saddle sail scarf shelf shirt shoe shovel"
    " spoon stamp stool stove sword table ticket torch tower tray trunk vase violin wagon wallet wheel whistle window"
).split()


def sentences(rng: random.Random) -> Iterator[str]:
    """An endless stream of filler sentences, without repetition as far as possible (there are some 400,000)."""
    seen: set[str] = set()
    while True:
        for _ in range(20):
            parts = [rng.choice(p) for p in rng.choice(SHAPES)]
            made = " ".join(parts).capitalize() + "."
            if made not in seen:
                break
        seen.add(made)
        yield made


def name(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES.split(), k=3)).capitalize()


def code(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def coded_word(rng: random.Random) -> str:
    return name(rng).lower()


def thing(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def rarer_thing(rng: random.Random) -> str:
    """One of a quarter of a million."""
    return f"{rng.choice(ADJECTIVES)} {thing(rng)}"


class Pool:
    """Random words or codes, none of them twice; those of one call have the same number of tokens.

    So prompts that differ only in them have equal lengths, and no answer is likelier because it is shorter.

    Args:
        rng: the random generator.
        count: counts the tokens of a text.
    """

    def __init__(self, rng: random.Random, count: Callable[[str], int]) -> None:
        self.rng, self.count = rng, count
        self._used: set[str] = set()

    def take(self, draw: Callable[[random.Random], str], n: int) -> list[str]:
        """`n` draws, which with a space before them have the same number of tokens."""
        of_size: dict[int, list[str]] = {}
        for made in self.stream(draw):
            same_size = of_size.setdefault(self.count(f" {made}"), [])
            same_size.append(made)
            if len(same_size) == n:
                return same_size
        raise AssertionError("a stream has no end")

    def stream(self, draw: Callable[[random.Random], str]) -> Iterator[str]:
        """An endless stream of draws of any length."""
        while True:
            made = draw(self.rng)
            if made not in self._used:
                self._used.add(made)
                yield made
