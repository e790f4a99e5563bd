"""Datasets of the presets `reasoning`, `instructions` and `longbench2`: a few documents made up for each."""

from __future__ import annotations

from importlib.util import find_spec

from tests.hub.paper import commit_dataset
from tests.hub.store import Store

ROWS = 4


def has(*modules: str) -> bool:
    """Whether the packages are installed that a task's metrics need."""
    return all(find_spec(m) is not None for m in modules)


def reasoning_documents(store: Store) -> list[str]:
    """Commit the datasets of `reasoning`; returns its tasks that can be scored here."""
    sums = [(3 + i, 4 * i) for i in range(ROWS)]
    grade = [{"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in sums]
    commit_dataset(store, "openai/gsm8k", {"main": {"train": grade, "test": grade}})
    problems = [
        {
            "problem": f"Compute ${a} + {b}$.",
            "solution": f"It is $\\boxed{{{a + b}}}$.",
            "answer": str(a + b),
            "subject": "Algebra",
            "level": 1,
            "unique_id": f"test/{a}",
        }
        for a, b in sums
    ]
    commit_dataset(store, "HuggingFaceH4/MATH-500", {"default": {"test": problems}})
    contest = [
        {"ID": f"2024-I-{a}", "Problem": f"Find {a} + {b}.", "Solution": "Add.", "Answer": a + b} for a, b in sums
    ]
    commit_dataset(store, "Maxwell-Jia/AIME_2024", {None: {"train": contest}})
    commit_dataset(
        store,
        "math-ai/aime25",
        {None: {"test": [{"problem": d["Problem"], "answer": str(d["Answer"]), "id": d["ID"]} for d in contest]}},
    )
    return ["gsm8k", *(["minerva_math500"] if has("math_verify", "antlr4", "sympy") else []), "aime24", "aime25"]


def instruction_documents(store: Store) -> list[str]:
    """The same for `instructions`."""
    rows = [
        {
            "key": i,
            "prompt": f"Write {i + 2} words. Do not use any commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_words": None}],
        }
        for i in range(ROWS)
    ]
    commit_dataset(store, "google/IFEval", {None: {"train": rows}})
    return ["ifeval"] if has("langdetect", "immutabledict", "nltk") else []


def longbench_documents(store: Store, configurations: list[str]) -> None:
    """The same for `longbench2`: contexts of a few hundred words."""
    rows = [
        {
            "context": " ".join(f"The box number {j} is {'red' if j % 2 else 'blue'}." for j in range(60 + i)),
            "question": f"What colour is box {i}?",
            "choices": ["red", "blue", "green", "white"],
            "answer": 1 - i % 2,
        }
        for i in range(ROWS)
    ]
    commit_dataset(store, "recursal/longbench-v2", {name: {"train": rows} for name in configurations})
