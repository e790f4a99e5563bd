"""Rows in which policies look at prompts before they say what is retained: the prompts are read first, then the rest.

What is retained may depend on all layers, and a layer is cut before the next is read. So a prompt is read to its end and not
cut, its policy looks at every layer, and the sequences continue from the states that the prompt's tokens left: they read
its last token again, at which it is cut.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.hf.attention import Plan, attached, rope_switch
from a2sf.hf.attention.looking import Look, running_with_looks
from a2sf.hf.attention.mixed import MixedPass
from a2sf.hf.attention.named import Configs
from a2sf.hf.calls.chunks import bounds
from a2sf.hf.calls.logits import logits_in_parts
from a2sf.hf.reader import check_rules, concluded, look_of
from a2sf.hf.warned import Warned
from a2sf.policies.base import Policy
from a2sf.scoring.passes.long_rows import Part, in_parts, parts_save_memory
from a2sf.scoring.passes.packing import Pack, build, in_order, numbered, pack
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.scoring.systems import Answers

TOGETHER = 4
"""Passes over prompts that policies look at before what follows the prompts is read; caches are held until then."""


@dataclass
class PromptLook:
    """A prompt of a row that a policy looks at.

    Attributes:
        serves: the numbers of the sequences whose retention it decides.
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
        device: where the model computes.
        looks: the prompts that policies look at, by part of the row.
        ends: the columns at which these parts end; none if nothing is looked at.
    """

    row: Pack
    sequences: dict[int, ScoredSequence]
    device: torch.device
    looks: list[list[PromptLook]] = field(default_factory=list)
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
            return LookingRow(packs[0] if len(packs) == 1 else _built(found, root), found, device)
        for n, of_prompt in enumerate(serves.values(), 1):
            found[-n], root[-n] = found[of_prompt[0]].prompt_sequence, root[of_prompt[0]]
        made = _built(found, root)
        place = {i: which for which, i in enumerate(made.items)}
        parts: dict[int, list[int]] = {}  # the numbers of what is looked at in each
        for n, (part, _, _) in enumerate(serves, 1):
            parts.setdefault(part, []).append(-n)
        made, ends = in_order(made, [[place[i] for i in of_part] for of_part in parts.values()])
        looked: list[list[PromptLook]] = []
        each = list(serves.items())
        for begin, of_part in zip([0, *ends], parts.values(), strict=False):
            looked.append([])
            for i in of_part:
                (_, policy, _), of_prompt = each[-1 - i]
                columns, warned = _slice_of(torch.from_numpy(made.columns(place[i])) - begin, device), Warned()
                looked[-1].append(PromptLook(policy, look_of(policy, columns, warned), of_prompt, warned))
        return LookingRow(made, found, device, looked, ends)

    @property
    def items(self) -> list[int]:
        """The numbers of the sequences that are scored; the others are prompts that are looked at."""
        return [i for i in self.row.items if i >= 0]

    @property
    def all_looks(self) -> list[PromptLook]:
        """What is looked at in all parts, in the order of the negative numbers."""
        return [at for of_part in self.looks for at in of_part]

    def decide(self, part: int, model: PreTrainedModel) -> None:
        """Decide what is retained, once the prompts of a part were read.

        Raises:
            PolicyError: as `concluded` and `check_rules`.
            UserError: as `System.retention`.
        """
        for at in self.looks[part]:
            prepared = concluded(model, at.policy, at.look, at.warned)
            for i in at.serves:
                before, after = self.sequences[i], self.sequences[i].decided(prepared)
                check_rules(at.policy, before.retention, after.retention)
                self.sequences[i] = after

    def parts(
        self, reading: Plan | MixedPass, tokens_per_pass: int, model: PreTrainedModel, keep: bool = False
    ) -> Iterator[Part]:
        """The passes that read the row: one, or for a long row several that hold less together than at once.

        Prompts that are looked at are parts of their own, the first ones.

        Args:
            keep: whether the states in which the sequences end are kept, so that a row that is read at once is a part, too.
        """
        size, first = len(self.row.tokens), self.ends[-1] if self.ends else 0
        # one that hangs over a little, as rows of short requests do, is read at once
        ends = [*self.ends, *(first + end for end in bounds(size - first, tokens_per_pass))]
        if self.ends or (len(ends) > 1 and parts_save_memory(self.row, ends, self.sequences, model.config)):
            return in_parts(reading, ends, keep)
        return in_parts(reading, [size], keep) if keep else iter([Part(0, size, reading)])

    @contextmanager
    def logits(
        self, number: int, part: Part, columns: Tensor, model: PreTrainedModel, configs: Configs | None = None
    ) -> Iterator[Iterator[Tensor]]:
        """Read a part of the row: inside, its logits are computed; at the end, what was looked at in it is decided.

        Args:
            number: of the part.
            columns: int64 [n] in ascending order, the columns of the row whose logits are needed; none: nothing is scored.
            configs: as for `attached`.

        Returns:
            The logits [1, n', vocabulary] of some of the columns at a time; if there are none, of the part's first column.
        """
        looks = [at.look for at in self.looks[number]] if number < len(self.looks) else []
        # a model needs one position at least
        needed = columns - part.begin if len(columns) else torch.tensor([0])
        with attached(model, configs=configs), torch.inference_mode(), running_with_looks(model, part.reading, looks):
            ids = torch.tensor([self.row.tokens[part.begin : part.end]], device=self.device)
            positions = torch.tensor([self.row.positions[part.begin : part.end]], device=self.device)
            inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            # closed before an error is handled, since it replaces a method of the model while it is suspended
            with closing(logits_in_parts(model, needed.to(self.device), **inputs)) as made:
                yield made
        if looks:
            self.decide(number, model)

    def note_warned(self, answers: Sequence[Answers]) -> None:
        """Note for each system what its policy warned of; `answers` are those of each sequence, by number."""
        for at in self.all_looks:
            for one in {id(answers[i]): answers[i] for i in at.serves}.values():
                one.warned.update(at.warned)

    def blamed(self, segments: Sequence[int]) -> list[int]:
        """The numbers of the sequences that run through some segments of the row; a look counts for those it serves."""
        bad, looks = set(segments), self.all_looks
        through = [i for i, path in zip(self.row.items, self.row.path, strict=True) if bad.intersection(path)]
        return sorted({n for i in through for n in ([i] if i >= 0 else looks[-1 - i].serves)})


def rows_of(
    places: Sequence[int],
    sequences: Sequence[ScoredSequence],
    model: PreTrainedModel,
    tokens_per_pass: int,
    room: int,
    most: int | None = None,
) -> Iterator[list[Pack]]:
    """Some of `sequences`, by their places, in rows.

    A row never mixes sequences that the model's rotary scaling treats differently. Nor does it mix those whose prompts are
    looked at, so that it is read in parts, with those that are read at once. Rows whose prompts are looked at are several of
    a pass's size: what follows their prompts is read together.

    Args:
        room: tokens for whose states there is memory in all layers.
        most: sequences of a row; None: no limit.
    """
    limit = rope_switch(model.config)
    looking = any(sequences[i].undecided is not None for i in places)
    room = room if looking else tokens_per_pass
    groups: dict[tuple[bool, bool], list[int]] = {}
    for i in places:
        one = sequences[i]
        groups.setdefault((len(one.read) > limit, looking and one.needs_future), []).append(i)
    for group in groups.values():
        items = [sequences[i].item() for i in group]
        together: list[Pack] = []
        for row in pack(items, max_tokens=min(room, tokens_per_pass), max_items=most):
            row.items = [group[i] for i in row.items]
            row.owner = [group[i] for i in row.owner]
            together.append(row)
            size = sum(len(r.tokens) for r in together)
            alone = most is not None or all(sequences[i].undecided is None for i in row.items)
            if alone or size + tokens_per_pass > min(room, TOGETHER * tokens_per_pass):
                yield together
                together = []
        if together:
            yield together


def _slice_of(columns: Tensor, device: torch.device) -> Tensor | slice:
    """Columns [T] as a slice where they follow each other, so that nothing is copied."""
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns.to(device)


def _built(sequences: dict[int, ScoredSequence], root: dict[int, Hashable]) -> Pack:
    """A row of sequences, by number; those with another `root` share nothing."""
    numbers = list(sequences)
    trees: dict[Hashable, list[int]] = {}
    for at, i in enumerate(numbers):
        trees.setdefault(root[i], []).append(at)
    made = build(numbered([one.item() for one in sequences.values()]), list(trees.values()))
    made.items, made.owner = [numbers[i] for i in made.items], [numbers[i] for i in made.owner]
    return made
