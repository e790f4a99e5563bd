"""What moved the numbers of few kinds of cells: their earlier results are not reused, and those of all others are."""

from __future__ import annotations

import pytest

from a2sf import Budget, make_policy
from a2sf.hf.loading import ModelSpec
from a2sf.policies.schedule import STEP, Schedule
from a2sf.sweep import cell as cells
from a2sf.sweep.cell import Cell
from a2sf.tasks.spec import DataSpec
from baselines.by import OWN_VERSION
from tests.conftest import SMOLLM2
from tests.models import small

KEEP = Schedule("prompt", at="context")
THEN_STEP = Schedule("prompt", then="step", at="context")
THEN_EVERY = Schedule("prompt", then="every", every=4, at="context")


def identity(policy: str, task: str = "gsm8k", schedule: Schedule | None = None, model: str = SMOLLM2) -> dict:
    spec, data = ModelSpec(model, device="cpu"), DataSpec(content="x")
    made = make_policy(policy)
    return Cell("small", spec, made, Budget(ratio=0.2), task, 0, 5, 0, data, schedule=schedule).identity


@pytest.mark.parametrize("policy", ["cake", "simlayerkv"])
@pytest.mark.parametrize("schedule", [THEN_STEP, THEN_EVERY], ids=lambda s: s.name)
def test_texts_after_a_look_at_the_context_and_further_evictions(policy, schedule):
    assert identity(policy, schedule=schedule)["context"] == cells.CONTEXT_VERSION
    for other in (
        identity(policy, task="copa", schedule=schedule),
        identity(policy, schedule=KEEP),
        identity(policy, schedule=Schedule("prompt", then="step")),
        identity("h2o", schedule=schedule),
    ):
        assert "context" not in other


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_slots_divided_among_layers_of_which_some_have_windows(tmp_path, kind):
    small(kind).save_pretrained(tmp_path)
    found = {p: identity(p, "copa", STEP, str(tmp_path)).get("layers") for p in ("pyramidkv", "calibrated", "snapkv")}
    # `calibrated` without a file gives all layers the same
    assert found == {
        "pyramidkv": cells.LAYERS_VERSION if kind == "gemma3" else None,
        "calibrated": None,
        "snapkv": None,
    }


def test_a_policy_of_ones_own_that_another_is_built_on():
    own = make_policy("chunkkv", by="tests.own_policies:AboveUniform").stored_settings()["by"]
    assert own["own"] == OWN_VERSION
    assert "own" not in make_policy("chunkkv", by="h2o").stored_settings()["by"]
