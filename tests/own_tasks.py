"""A folder of a user's own tasks for `include_path`: choices, generated text, made documents, nested groups.

And lm-eval's own entry, without what costs it seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

UTILS = """
from datasets import Dataset

def documents(number=2, word="so", **other):
    rows = [{"goal": f"{word} {i}", "sol1": "yes", "sol2": "no", "label": i % 2} for i in range(number)]
    return {"test": Dataset.from_list(rows)}
"""
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, train: {folder}/train.jsonl}}}}
output_type: multiple_choice
test_split: test
training_split: train
fewshot_split: train
description: "Choose well."
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
tag: own_tag
"""
WRITES = """
include: own_one.yaml
task: own_writes
tag: own_writing
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{sol1}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ARGUMENTS = """
task: own_arguments
custom_dataset: !function utils.documents
output_type: multiple_choice
test_split: test
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metadata: {version: 1.0}
"""
GROUP = """
group: own_group
task:
  - group: own_inner
    task: [own_one, own_two]
    aggregate_metric_list: [{metric: acc, weight_by_size: false}, {metric: acc_norm}]
  - own_three
aggregate_metric_list: {metric: acc, weight_by_size: true}
metadata: {version: 1.0}
"""
SIZES = {"own_one": 3, "own_two": 7, "own_three": 5}


def own_tasks(folder: Path) -> Path:
    """Write the folder; the data lie in it, too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in {**SIZES, "train": 6}.items():
        rows = [
            {"goal": f"{name} is {i}", "sol1": f"it is {i * i}", "sol2": f"never {i}", "label": (i + size) % 2}
            for i in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {f"{name}.yaml": CHOICES.format(name=name, folder=folder) for name in SIZES}
    files |= {"writes.yaml": WRITES, "arguments.yaml": ARGUMENTS, "group.yaml": GROUP, "utils.py": UTILS}
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def simple_evaluate(*arguments: Any, **more: Any) -> Any:
    """`lm_eval.simple_evaluate` of tasks that are made, or given by a file.

    Without reading the names of all of lm-eval's tasks and asking pip for all packages, which takes six seconds.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = more.pop("task_manager", None) or TaskManager(include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        return lm_eval.simple_evaluate(*arguments, task_manager=manager, **more)
