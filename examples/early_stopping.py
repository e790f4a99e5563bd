"""After how many documents a sweep would have stopped, had it been run with early stopping.

`python examples/early_stopping.py runs/<sweep> a2sf h2o` replays the answers of a finished sweep.
"""

import sys
from pathlib import Path

import pandas as pd

from a2sf.store.archive import read_sweep
from a2sf.sweep.early_stopping import Comparisons, order_of
from a2sf.sweep.stopping_rule import StoppingRule

sweep = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "runs/reference/smollm2-135m.a2sf.zip"
pair = (sys.argv[2], sys.argv[3]) if len(sys.argv) > 3 else ("full", "window")


def stops_after(rule: StoppingRule, a: pd.Series, b: pd.Series) -> int:
    comparisons = Comparisons(rule, [1] * len(a), [("a", "b")])
    for seen, document in enumerate(order_of(len(a)), 1):
        comparisons.see({"a": [a[document]], "b": [b[document]]})
        if comparisons.decided:
            return seen
    return len(a)


right: dict[tuple[str, int, float | None], dict[str, pd.Series]] = {}
for cell in read_sweep(sweep):
    about, answers = cell.cell, cell.documents
    budgets = [about["budget"]["ratio"]] if about["budget"] else [None]
    for budget in budgets:
        key = about["task"], about["shots"], budget
        right.setdefault(key, {})[about["policy"]] = (answers["prediction"] == answers["gold"]).astype(float)

rows = []
for (task, shots, budget), policies in right.items():
    policies = right.get((task, shots, None), {}) | policies  # a policy without a budget is compared at each
    if budget is not None and set(pair) <= set(policies):
        a, b = (policies[p] for p in pair)
        ways = {
            "±5": StoppingRule(pair, half_width=5),
            "±10": StoppingRule(pair, half_width=10),
            "which is better": StoppingRule(pair),
        }
        after = {name: stops_after(rule, a, b) for name, rule in ways.items()}
        difference = 100 * (a.mean() - b.mean())
        rows.append({"task": task, "shots": shots, "budget": budget, "n": len(a), "difference": difference} | after)

frame = pd.DataFrame(rows)
print(frame.round(1).to_string(index=False))
print(
    f"\nshare of the documents: {(frame[['±5', '±10', 'which is better']].sum() / frame['n'].sum()).round(2).to_dict()}"
)
