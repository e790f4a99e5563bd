"""The presets for models that reason, follow instructions and read long contexts, as far as tiny models go over loopback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml
from lm_eval.tasks import __file__ as tasks_of_lm_eval

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate, tables
from tests.hub.build import write_model
from tests.hub.reasoning import instruction_documents, longbench_documents, reasoning_documents

pytestmark = pytest.mark.full
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def ran(hub, tmp_path: Path, preset: str, model: str, *more: str) -> tuple[Path, str]:
    """The directory of a preset's sweep with a tiny model under the published name, and what was printed."""
    folder = write_model(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    hub.store.model(model).commit({f.name: f for f in folder.iterdir()})
    environment = hub.environment(tmp_path / "hf") | {"COLUMNS": "200"}
    done = evaluate(f"+sweep={preset}", "model.device=cpu", "limit=2", *more, runs=tmp_path / "runs", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "runs" / preset, done.stdout


def names(values: Sequence[str]) -> str:
    return f"[{','.join(values)}]"


def test_the_reasoning_preset_runs_to_its_tables(hub, tmp_path: Path):
    tasks = reasoning_documents(hub.store)
    # fewer policies and new tokens, and a budget that these exceed; the rest is the preset's
    arguments = [f"tasks={names(tasks)}", "policy=full,streaming,h2o", "gen_kwargs.max_gen_toks=20", "budget.tokens=16"]
    arguments += ["think_end_token=null"]  # which SmolLM2's tokenizer lacks
    directory, out = ran(hub, tmp_path, "reasoning", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", *arguments)
    stored = load_sweep(directory)
    assert len(stored) == len(tasks) * (1 + 2 * 2), out
    assert {s.cell.get("schedule") for s in stored} == {"step", "every128"}
    assert all(s.cell["options"]["chat_template"] for s in stored)
    pruned = [s for s in stored if s.cell["policy"] != "full"]
    assert all(s.documents["full_text_loglikelihood"].notna().all() for s in stored)
    assert any(s.pruned_share for s in pruned)
    shown = tables(directory, "--metric", "exact_match", "--no-plots")
    assert shown.returncode == 0, shown.stderr
    texts = pd.read_csv(directory / "tables" / "texts.csv")
    assert {"aime24", "aime25"} <= set(texts["task"])
    assert texts["tokens"].le(20).all()
    gsm8k = next(s for s in stored if s.cell["task"] == "gsm8k")
    assert "extracted,flexible-extract" in gsm8k.documents


def test_the_instructions_preset_runs(hub, tmp_path: Path):
    if not instruction_documents(hub.store):
        pytest.skip("the packages of lm-eval[ifeval] are not installed")
    arguments = ["gen_kwargs={max_gen_toks:8}", "budget.ratio=0.4"]
    directory, out = ran(hub, tmp_path, "instructions", "meta-llama/Llama-3.1-8B-Instruct", *arguments)
    assert len(load_sweep(directory)) == 8, out


def test_the_longbench2_preset_runs(hub, tmp_path: Path):
    definitions = Path(tasks_of_lm_eval).parent / "longbench2"
    bodies = [yaml.safe_load(f.read_text()) for f in definitions.glob("*.yaml") if not f.name.startswith("_")]
    longbench_documents(hub.store, [b["dataset_name"] for b in bodies])
    arguments = ["policy=full,streaming,snapkv", "budget.tokens=128"]
    directory, out = ran(hub, tmp_path, "longbench2", "meta-llama/Llama-3.1-8B-Instruct", *arguments)
    assert len(load_sweep(directory)) == 3 * len(bodies), out
    frame = pd.read_csv(directory / "results.csv")
    assert "longbench2" in set(frame["task"])
