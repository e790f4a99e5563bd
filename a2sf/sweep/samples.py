"""Several answers for each document: their metrics avg@k, pass@j and maj@k.

With k answers a metric's value is the mean over documents of the mean over answers (avg@k). pass@j is the probability that
one of j answers is right, estimated without bias from k (Chen et al. 2021, Evaluating Large Language Models Trained on Code,
arXiv:2107.03374, equation 1). maj@k is the score of the answer that comes most often (Wang et al. 2023, arXiv:2203.11171).
Drawing answers adds the mean over documents of s²/k, divided by their number, to the variance of a mean (Miller 2024, Adding
Error Bars to Evals, arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

METRIC = "metric/"
Extracted = Mapping[str, Mapping[int, str]]
"""By filter and document, what the filter found in an answer."""


def pass_at(right: np.ndarray, j: int) -> np.ndarray:
    """float [n]: of each document, the probability that at least one of j answers is right.

    Args:
        right: 0 or 1, [n, k], with k at least j.
    """
    k = right.shape[1]
    wrong = (k - right.sum(1)).astype(int)
    return np.array([1 - math.comb(w, j) / math.comb(k, j) for w in wrong])


def chosen_most_often(given: Sequence[str]) -> int:
    """The first of the answers that are equal to the most others."""
    counted = Counter(given)
    return max(range(len(given)), key=lambda i: (counted[given[i]], -i))


def sizes(k: int) -> list[int]:
    """The numbers of answers of which pass@j is computed: powers of two, and k itself."""
    return sorted({*(2**i for i in range(k.bit_length()) if 2**i <= k), k})


def of_draws(
    documents: pd.DataFrame,
    draws: Sequence[pd.DataFrame],
    found: Sequence[Extracted],
    metrics: Sequence[Mapping[str, Any]],
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The documents of a cell and its metrics, from those of each draw.

    Args:
        documents: with the columns of the first draw.
        draws: of each draw, the documents in the same order.
        found: of each draw, what filters found, by which votes are counted.
        metrics: of each draw, as `result.json` has them.
    """
    made = dict(metrics[0])
    columns: dict[str, Any] = {}
    numbers = [int(d) for d in documents["doc_id"]]
    for column in [c for c in map(str, documents) if c.startswith(METRIC)]:
        name = column.removeprefix(METRIC)
        values = np.stack([d[column].to_numpy(float) for d in draws], 1)
        columns[column] = values.mean(1)
        columns[f"draws/{column}"] = list(values)
        if name not in made:
            continue
        of_mean = [m.get(name, {}).get("value") for m in metrics]
        if not _is_mean(values, of_mean):  # an aggregate such as BLEU: the mean over draws
            made[name] = made[name] | {"value": _mean(of_mean), "stderr": None}
            continue
        more = _of_metric(name, values, numbers, found)
        made[name] = _entry(made[name], columns[column]) | {"stderr_draws": _stderr_of_draws(values)}
        for key, of_documents in more.items():
            columns[f"{METRIC}{key}"] = of_documents
            made[key] = _entry(made[name], of_documents)
    return documents.assign(**columns), made


def _of_metric(
    name: str, values: np.ndarray, documents: Sequence[int], found: Sequence[Extracted]
) -> dict[str, np.ndarray]:
    """For each further metric, by its name, the value of each document."""
    metric, _, filtered = name.partition(",")
    k, end = values.shape[1], f",{filtered}" if filtered else ""
    more = {f"{metric}:avg@{k}{end}": values.mean(1)}
    if np.isin(values, (0, 1)).all():
        more |= {f"{metric}:pass@{j}{end}": pass_at(values, j) for j in sizes(k)}
    votes = [f.get(filtered or "none", {}) for f in found]
    chosen = [chosen_most_often([v.get(d, "") for v in votes]) for d in documents]
    more[f"{metric}:maj@{k}{end}"] = values[np.arange(len(values)), chosen]
    return more


def _is_mean(values: np.ndarray, of_draws: Sequence[float | None]) -> bool:
    means = values.mean(0)
    return all(
        v is not None and math.isclose(v, m, rel_tol=1e-9, abs_tol=1e-12) for v, m in zip(of_draws, means, strict=True)
    )


def _entry(like: Mapping[str, Any], values: np.ndarray) -> dict[str, Any]:
    n = len(values)
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"value": float(values.mean()), "stderr": stderr, "n": n, "higher_is_better": like["higher_is_better"]}


def _stderr_of_draws(values: np.ndarray) -> float:
    """The part of a mean's standard error that comes from drawing answers."""
    n, k = values.shape
    return float(math.sqrt(values.var(axis=1, ddof=1).mean() / k / n))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
