"""A sweep's plan on the screen: how many cells there are, what they consist of, and how long they will take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from a2sf.errors import counted
from a2sf.policies.schedule import schedule_for
from a2sf.sweep.cell import Cell
from a2sf.sweep.planning.estimate import WorkEstimate
from a2sf.sweep.planning.progress import duration
from a2sf.sweep.reuse import SweepPlan

MOST = 16
"""Values that a column lists; of more it shows the first, the last and their number."""

Groups = Sequence[Sequence[Cell]]


def headline(made: SweepPlan, groups: Groups, estimates: Sequence[WorkEstimate], directory: Path) -> str:
    """One line: the cells of the sweep in `directory`, those to run, and an estimate of tokens and time."""
    pending = made.pending
    known = [(len(g), e) for g, e in zip(groups, estimates, strict=True)]
    tokens = sum(e.tokens for _, e in known if e.tokens is not None)
    with_tokens = sum(n for n, e in known if e.tokens is not None)
    any_at_most = any(e.at_most for _, e in known)
    with_time = sum(n for n, e in known if e.seconds is not None)
    cells = counted(len(made.cells), "cell")
    line = f"[bold]{escape(str(directory))}[/bold]: {cells}, {len(made.done)} done, {len(pending)} to run"
    if tokens:
        line += f", about {float(f'{tokens:.2g}'):,.0f} tokens to compute"
        line += "" if with_tokens == len(pending) else f" for {with_tokens} of them"
    if with_time:
        by_trial = sum(n for n, e in known if e.by_trial)
        how = "by a short trial of this machine's speed" if by_trial else "at the speed measured here"
        line += f", about {duration(seconds_of(estimates))} {'partly ' if 0 < by_trial < with_time else ''}{how}"
        line += ", without the start and the loading of models"
        without = len(pending) - with_time
        line += f"; for {without} of them there is no measurement to estimate from" if without else ""
        line += "; where text is generated, if all texts reach their limit of tokens" if any_at_most else ""
    return line


def plan_table(groups: Groups, estimates: Sequence[WorkEstimate]) -> Table:
    """What is to run, one row per model; schedules, factors and shots are named where they are not the default."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("Model", "Policies", "Budgets", "Tasks"):
        table.add_column(head, overflow="fold")
    for head in ("Cells", "Time"):
        table.add_column(head, justify="right", no_wrap=True)
    for model in dict.fromkeys(g[0].model_name for g in groups):
        of_model = [(g, e) for g, e in zip(groups, estimates, strict=True) if g[0].model_name == model]
        cells = [c for g, _ in of_model for c in g]
        schedules = (schedule_for(c.policy, c.schedule).name for c in cells)
        policies = [_listed(c.policy.name for c in cells)]
        policies += [f"factors {_listed(map(_factor, cells))}"] if len({*map(_factor, cells)} - {None}) > 1 else []
        policies += [f"schedules {_listed(schedules)}"] if any(c.schedule for c in cells) else []
        tasks = [_listed(c.task_name for c in cells)]
        tasks += [f"shots {_listed(str(c.shots) for c in cells)}"] if any(c.shots for c in cells) else []
        row = [model, "\n".join(policies), _listed(map(_budget, cells)), "\n".join(tasks)]
        table.add_row(*map(escape, row), str(len(cells)), _time([e for _, e in of_model]))
    return table


def schedules_note(groups: Groups) -> str | None:
    """A sentence where not all policies evict at the same times, such as once after the prompt, by default or by choice."""
    of_policy: dict[str, list[str]] = {}
    for cell in (c for g in groups for c in g if c.policy.evicts):
        names, name = of_policy.setdefault(cell.policy.name, []), schedule_for(cell.policy, cell.schedule).name
        names += [name] * (name not in names)
    policies: dict[str, list[str]] = {}
    for policy, names in of_policy.items():
        policies.setdefault(" and ".join(sorted(names)), []).append(policy)
    if len(policies) < 2:
        return None
    return f"Schedules differ: {'; '.join(f'{names} ({_listed(of)})' for names, of in policies.items())}."


def seconds_of(estimates: Iterable[WorkEstimate]) -> float:
    """The sum of the times that are known, in seconds."""
    return sum(e.seconds for e in estimates if e.seconds is not None)


def _time(estimates: Sequence[WorkEstimate]) -> str:
    known = [e for e in estimates if e.seconds is not None]
    if not known:
        return "unknown"
    return ("" if len(known) == len(estimates) else "> ") + duration(seconds_of(known))


def _budget(cell: Cell) -> str | None:
    budget = cell.budget
    if budget is None:
        return None
    if budget.ratio is not None:
        ratio = "per layer" if isinstance(budget.ratio, tuple) else f"{budget.ratio:g}"
        return ratio if budget.base == "total" else f"{ratio} of {budget.base}"
    return "tokens per layer" if isinstance(budget.tokens, tuple) else f"{budget.tokens} tokens"


def _factor(cell: Cell) -> str | None:
    factor = getattr(cell.policy, "forgetting_factor", None)
    return None if factor is None else "per layer" if isinstance(factor, tuple) else f"{factor:g}"


def _listed(values: Iterable[str | None]) -> str:
    """Each value once; None is left out."""
    once = [v for v in dict.fromkeys(values) if v is not None]
    if len(once) > MOST:
        return f"{', '.join(once[:3])}, …, {once[-1]} ({len(once)})"
    return ", ".join(once) or "-"
