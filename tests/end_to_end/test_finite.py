"""The command on a model that overflows in half precision: its cell fails with a message, the others run."""

from __future__ import annotations

import json

import pytest
import torch

from a2sf.store.runs import load_sweep
from tests.end_to_end.test_evaluate import evaluate
from tests.models import small

pytestmark = pytest.mark.full


def test_a_cell_with_nan_fails_and_the_others_run(smollm2, tmp_path):
    model = small("llama", vocab_size=len(smollm2.tokenizer))
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(3e6)
    model.save_pretrained(tmp_path / "model")
    smollm2.tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"goal": f"Goal number {i}", "sol1": f"right {i}", "sol2": f"wrong {i}", "label": 0} for i in range(8)]
    (data / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = evaluate(
        "-m",
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float16,float32",
        "tasks=[piqa]",
        f"data.dir={data}",
        "policy=full",
        "sweep_name=s",
        runs=tmp_path / "runs",
    )
    assert done.returncode == 1
    (cell,) = load_sweep(tmp_path / "runs" / "s")
    assert cell.cell["dtype"] == "float32"
    (failure,) = (tmp_path / "runs" / "s" / "failures").iterdir()
    message = json.loads(failure.read_text())["error"]
    assert message.startswith(
        "task piqa, documents 0, 1, 2, 3, 4 and 3 more: NaN or infinity in the logits, computed in float16"
    )
    assert "model.dtype=bfloat16 or float32" in message
    assert message in done.stdout + done.stderr
