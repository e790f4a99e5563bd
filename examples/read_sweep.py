"""A sweep as pandas frames: one row per cell, one per document. `python examples/read_sweep.py runs/<sweep>`"""

import sys
from pathlib import Path

import pandas as pd

from a2sf.store.archive import read_sweep
from a2sf.store.runs import results_frame

sweep = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "runs/reference/smollm2-135m.a2sf.zip"
cells = read_sweep(sweep)

results = results_frame(cells)
accuracy = results[results["metric"] == "acc"]
print(
    accuracy.pivot_table(index=["shots", "policy", "budget_ratio"], columns="task", values="value").round(3).to_string()
)

of_documents = [c.documents.assign(**{k: c.cell[k] for k in ("policy", "task", "shots")}) for c in cells]
documents = pd.concat(of_documents, ignore_index=True)
right = (documents["prediction"] == documents["gold"]).groupby([documents["shots"], documents["policy"]]).mean()
print(f"\n{len(documents)} scored documents; right answers:\n{right.round(3).to_string()}")
