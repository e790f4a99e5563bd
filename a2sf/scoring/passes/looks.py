"""Rows in which policies look at prompts before they say what is retained: the prompts are read first, then the rest.

What is retained may depend on all layers, and a layer is cut before the next is read. So a prompt is read to its end and not
cut, its policy looks at every layer, and the sequences continue from the states that the prompt's tokens left: they read
its last token again, at which it is cut.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from a2sf.errors import PolicyError
from a2sf.hf.attention.looking import Look
from a2sf.hf.reader import concluded, look_of
from a2sf.hf.warned import Warned
from a2sf.policies.base import Policy
from a2sf.policies.rule import Rule
from a2sf.scoring.passes.packing import Pack, build, in_order, numbered
from a2sf.scoring.passes.sequences import ScoredSequence


@dataclass
class LookedAt:
    """A prompt of a row that a policy looks at.

    Attributes:
        serves: the numbers of the sequences that it decides.
        warned: what the policy warns of.
    """

    policy: Policy
    look: Look
    serves: list[int]
    warned: Warned = field(default_factory=Warned)


@dataclass
class LookingRow:
    """A row with what policies look at.

    Attributes:
        row: with the prompts that are looked at as sequences of their own, whose numbers are negative; they come first.
        sequences: of the row, by number; `decide` replaces those that are undecided.
        looked: what is looked at, by part of the row.
        ends: the columns at which these parts end; none if nothing is looked at.
    """

    row: Pack
    sequences: dict[int, ScoredSequence]
    looked: list[list[LookedAt]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @staticmethod
    def of(packs: Sequence[Pack], sequences: Sequence[ScoredSequence], device: torch.device) -> LookingRow:
        """Rows of some of `sequences` as one; the prompts of undecided ones are added, those of each row as a part."""
        found = {i: sequences[i] for row in packs for i in row.items}
        serves: dict[tuple[int, Policy, tuple[int, ...]], list[int]] = {}
        root: dict[int, Hashable] = {}
        for part, row in enumerate(packs):
            for i, path in zip(row.items, row.path, strict=True):
                one, root[i] = found[i], (part, path[0])
                if one.undecided is not None:
                    serves.setdefault((part, one.undecided.policy, one.read[: one.prompt]), []).append(i)
        if not serves:
            return LookingRow(packs[0] if len(packs) == 1 else _built(found, root), found)
        for n, of_prompt in enumerate(serves.values(), 1):
            found[-n], root[-n] = found[of_prompt[0]].looked_at, root[of_prompt[0]]
        made = _built(found, root)
        place = {i: which for which, i in enumerate(made.items)}
        parts: dict[int, list[int]] = {}  # the numbers of what is looked at in each
        for n, (part, _, _) in enumerate(serves, 1):
            parts.setdefault(part, []).append(-n)
        made, ends = in_order(made, [[place[i] for i in of_part] for of_part in parts.values()])
        looked: list[list[LookedAt]] = []
        each = list(serves.items())
        for begin, of_part in zip([0, *ends], parts.values(), strict=False):
            looked.append([])
            for i in of_part:
                (_, policy, _), of_prompt = each[-1 - i]
                columns, warned = _slice_of(torch.from_numpy(made.columns(place[i])) - begin, device), Warned()
                looked[-1].append(LookedAt(policy, look_of(policy, columns, warned), of_prompt, warned))
        return LookingRow(made, found, looked, ends)

    @property
    def items(self) -> list[int]:
        """The numbers of the sequences that are scored; the others are prompts that are looked at."""
        return [i for i in self.row.items if i >= 0]

    @property
    def every(self) -> list[LookedAt]:
        """What is looked at in all parts, in the order of the negative numbers."""
        return [at for of_part in self.looked for at in of_part]

    def decide(self, part: int, model: PreTrainedModel) -> None:
        """Decide what is retained, once the prompts of a part were read.

        Raises:
            PolicyError: as `concluded`; or if a policy ranks tokens by another rule now, which its prompt was not read with.
            UserError: as `System.retention`.
        """
        for at in self.looked[part]:
            prepared = concluded(model, at.policy, at.look, at.warned)
            for i in at.serves:
                before, after = self.sequences[i], self.sequences[i].decided(prepared)
                if _ranking(before) != _ranking(after):
                    raise PolicyError(
                        f"policy {at.policy.name} looks at a prompt while it is read, and has another rule or forgetting "
                        "factor at another budget; define prepare instead of look"
                    )
                self.sequences[i] = after

    def serving(self, number: int) -> list[int]:
        """The sequences that the one with this number stands for."""
        return [number] if number >= 0 else self.every[-1 - number].serves


def _slice_of(columns: torch.Tensor, device: torch.device) -> torch.Tensor | slice:
    """Columns [T] as a slice where they follow each other, so that nothing is copied."""
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns.to(device)


def _ranking(sequence: ScoredSequence) -> list[tuple[Rule, float]]:
    return [(k.rule, k.forgetting_factor) for k in sequence.retention]


def _built(sequences: dict[int, ScoredSequence], root: dict[int, Hashable]) -> Pack:
    """A row of sequences, by number; those with another `root` share nothing."""
    numbers = list(sequences)
    trees: dict[Hashable, list[int]] = {}
    for at, i in enumerate(numbers):
        trees.setdefault(root[i], []).append(at)
    made = build(numbered([one.item() for one in sequences.values()]), list(trees.values()))
    made.items, made.owner = [numbers[i] for i in made.items], [numbers[i] for i in made.owner]
    return made
