"""Policies that no file holds: rules, functions and merges as a user may write them, for tests that walk every policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from a2sf import Policy, Retention, Rule, Step
from a2sf.policies.rule import Cut


@dataclass(frozen=True, kw_only=True)
class Steady(Policy):
    """Of the tokens whose attention varies least, the smallest mean: the example of docs/rules.md."""

    name: ClassVar[str] = "calm"
    label: ClassVar[str] = "Calm"
    memory: ClassVar[int] = 1  # the sum of squares

    varying: int = 2

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget)

    def priorities(self, step: Step) -> tuple[Tensor, Tensor]:
        squares = step.memory[..., 0] + step.probabilities.sum(2) ** 2
        times = step.ages + 1
        mean = step.scores / times
        variance = (squares / times - mean**2).masked_fill(~step.cached, -torch.inf)
        most = variance.topk(min(self.varying, variance.shape[-1])).values[..., -1:]
        return mean.masked_fill((variance >= most) & (step.ages > 0), torch.inf), squares[..., None]


@dataclass(frozen=True, kw_only=True)
class AboveUniform(Policy):
    """How often a token got at least its share of attention, lately."""

    name: ClassVar[str] = "above_uniform"
    label: ClassVar[str] = "Above uniform"

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(count_above_uniform=True, mean_over_age=True, shared=True, weight=_one_more, bias=_first)
        return Retention(budget=budget, recent=budget // 3, forgetting_factor=0.8, rule=rule)


@dataclass(frozen=True, kw_only=True)
class Ending(Policy):
    """What the end of a prompt attended to, its last queries more than those before."""

    name: ClassVar[str] = "ending"
    label: ClassVar[str] = "Ending"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    count_above_uniform: bool = False

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=3), count_above_uniform=self.count_above_uniform)
        return Retention(budget=budget, recent=min(5, budget), forgetting_factor=0.5, rule=rule)


@dataclass(frozen=True, kw_only=True)
class Divided(Policy):
    """A layer's slots divided among its heads by more than attention, or by something else."""

    name: ClassVar[str] = "divided"
    label: ClassVar[str] = "Divided"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    scored: bool = True

    def retention(self, budget: int, layer: int) -> Retention:
        cut = Cut(kernel_size=3, floor=0.3)
        rule = Rule(weight=_one_more, bias=_first, cut=cut) if self.scored else Rule(scored=False, bias=_first, cut=cut)
        return Retention(budget=budget, recent=min(3, budget), rule=rule)


@dataclass(frozen=True, kw_only=True)
class Looked(Policy):
    """The same by a function, of the scores that the cut has averaged."""

    name: ClassVar[str] = "looked"
    label: ClassVar[str] = "Looked"
    schedules: ClassVar[tuple[str, ...]] = ("prompt",)

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=min(3, budget), rule=Rule(cut=Cut(kernel_size=3, floor=0.3)))

    def priorities(self, step: Step) -> Tensor:
        return step.scores * -step.values[..., 1]


@dataclass(frozen=True, kw_only=True)
class Watched(Policy):
    """What the last queries attend to, wherever they are, and the keys' lengths."""

    name: ClassVar[str] = "watched"
    label: ClassVar[str] = "Watched"
    unrotated: ClassVar[bool] = True

    window: int = 2

    @property
    def queries(self) -> int:
        return self.window

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=1, rule=Rule(scored=False))

    def priorities(self, step: Step) -> Tensor:
        logits = step.unrotated_queries @ step.keys[:, :, None].transpose(-1, -2) * step.scale  # [B, K, G, W, N]
        hidden = ~step.cached[:, :, None, None] | (step.positions[:, :, None, None] > step.query_positions[..., None])
        attention = (
            logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
        )  # a query before the first is nowhere
        assert attention.shape[3] <= self.window
        return attention.sum((2, 3)) + step.unrotated_keys.norm(dim=-1) / 100


@dataclass(frozen=True, kw_only=True)
class Noted(Watched):
    """The same, with a sum over all steps that it keeps itself."""

    name: ClassVar[str] = "noted"
    label: ClassVar[str] = "Noted"
    memory: ClassVar[int] = 1

    def priorities(self, step: Step) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = step.memory[..., 0] + super().priorities(step)
        return total, total[..., None]


@dataclass(frozen=True, kw_only=True)
class Strict(Policy):
    """Written for a cut: whatever it sees is a token, in order, and it may look at its neighbours."""

    name: ClassVar[str] = "strict"
    label: ClassVar[str] = "Strict"
    schedules: ClassVar[tuple[str, ...]] = ("every", "prompt")

    @property
    def queries(self) -> int:
        return 4

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, sinks=min(1, budget), rule=Rule(scored=False))

    def priorities(self, step: Step) -> Tensor:
        if step.prompt is not None and int(step.now.min()) >= int(step.prompt.min()):
            return step.keys[..., 0]  # after a prompt, step by step
        n = step.keys.shape[2]
        assert len(step.now) == 1
        assert step.cached.all()
        assert (step.positions.diff() > 0).all()
        assert (step.positions[..., -1:] == step.now).all()
        assert (step.budget < n).all()
        assert step.queries is not None
        assert step.queries.shape[3] == min(4, int(step.now) + 1)
        assert step.prompt is None or int(step.prompt) == int(step.now) + 1
        logits = step.queries[:, :, :, -1:] @ step.keys[:, :, None].transpose(-1, -2) * step.scale
        own = step.softmax(logits, ~step.cached[:, :, None, None])[..., 0, :]
        torch.testing.assert_close(own, step.probabilities)
        torch.testing.assert_close(step.attention[:, :, :, -1], step.probabilities)
        return torch.nn.functional.avg_pool1d(step.keys[..., 0], 3, stride=1, padding=1)


@dataclass(frozen=True, kw_only=True)
class Merging(Watched):
    """The same, and what is evicted moves what stays: values by their mean, keys a little to theirs."""

    name: ClassVar[str] = "merging"
    label: ClassVar[str] = "Merging"

    def merge(self, step: Step, evicted: Tensor) -> tuple[Tensor, Tensor]:
        number = evicted.sum(-1)[..., None, None].clamp(min=1)
        values, keys = ((x * evicted[..., None]).sum(2, keepdim=True) / number for x in (step.values, step.keys))
        near = torch.exp(-step.ages[..., None].to(values.dtype) / 10)
        # little, and bounded: else rounding errors grow from step to step, or keys become equal
        return step.values + near / 4 * (values - step.values), step.keys * 0.99 + keys * 0.01


@dataclass(frozen=True, kw_only=True)
class Weighed(Policy):
    """A rule as data, whose weights follow the merged values."""

    name: ClassVar[str] = "weighed"
    label: ClassVar[str] = "Weighed"

    def retention(self, budget: int, layer: int) -> Retention:
        return Retention(budget=budget, recent=budget // 3, rule=Rule(weight=_one_more, bias=_first))

    def merge(self, step: Step, evicted: Tensor) -> Tensor:
        lost = (step.values * step.scores[..., None] * evicted[..., None]).sum(2, keepdim=True)
        return step.values + lost / step.scores.sum(-1)[..., None, None]


@dataclass(frozen=True, kw_only=True)
class Apportioned(Ending):
    """The end of a prompt ranks tokens; what the newest query looks at says how many each head has."""

    name: ClassVar[str] = "apportioned"
    label: ClassVar[str] = "Apportioned"

    @property
    def queries(self) -> int:
        return 2

    def retention(self, budget: int, layer: int) -> Retention:
        rule = Rule(cut=Cut(kernel_size=3, floor=0.2), count_above_uniform=self.count_above_uniform)
        return Retention(budget=budget, recent=min(3, budget), rule=rule)

    def head_priorities(self, step: Step) -> Tensor:
        assert len(step.now) == 1
        return step.attention[:, :, :, -1].sum(2) * step.values[..., 0].abs()


OWN = (Steady, AboveUniform, Ending, Divided, Looked, Watched, Noted, Strict, Merging, Weighed, Apportioned)


def _one_more(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return 1 + values[..., 0].abs()


def _first(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return keys[..., 0] / 10
