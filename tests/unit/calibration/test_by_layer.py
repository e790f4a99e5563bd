"""`a2sf layer-errors`: what an error by layer is, for any policy, and what the command refuses and writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from a2sf import Budget, attend, make_policy
from a2sf.calibration.by_layer import check_policies, errors_by_layer
from a2sf.calibration.capture import Captured, capture, projections
from a2sf.calibration.local import HeadAtRatio, errors
from a2sf.commands.policy import layer_errors as command
from a2sf.errors import ConfigError
from a2sf.policies.rule import Head
from tests.hub.build import write_model
from tests.models import small

IDS = [tuple(range(5, 29)), tuple(range(40, 60))]


def seen(model, ids):
    layers: list[Captured] = []
    capture(model, ids, layers.append)
    return layers


def test_it_is_what_calibration_measures():
    model = small("llama")
    policy = make_policy("a2sf", forgetting_factor=0.4)
    found = errors_by_layer(model, IDS, [policy], [0.2, 0.5])
    weights = projections(model)
    tried = [HeadAtRatio(Head(forgetting_factor=0.4), ratio) for ratio in (0.2, 0.5)]
    expected = np.mean([[errors(x, weights[x.number], tried)[:, -1] for x in seen(model, ids)] for ids in IDS], axis=0)
    np.testing.assert_allclose(found[0], expected.T, rtol=1e-4)


@pytest.mark.parametrize("name", ["tova", "vatp", "random", "future", "keydiff", "uneven"])
def test_each_policy_by_itself(name):
    """The oracle: the policy alone on what the layer saw, after the projection."""
    model = small("llama")
    policy = make_policy("calibrated", file=UNEVEN) if name == "uneven" else make_policy(name)
    found = errors_by_layer(model, IDS[:1], [policy], [0.3])
    C = Budget(ratio=0.3).slots(total=24, context=24, layer=0)
    for x, weights in zip(seen(model, IDS[0]), projections(model).values(), strict=True):
        where = {"layer": x.number, "layers": 3, "backend": "reference"}
        output, _ = attend(policy, x.query, x.key, x.value, budget=C, **where)
        full, lost = x.output[0].transpose(0, 1).flatten(1), (output - x.output)[0].transpose(0, 1).flatten(1)
        expected = float((lost @ weights).square().sum() / (full @ weights).square().sum())
        assert found[0, 0, x.number] == pytest.approx(expected, rel=1e-3), name
    assert found.min() > 0


UNEVEN = {"name": "uneven", "layers": [{"share": s, "forgetting_factor": 0.5} for s in (1.5, 1.0, 0.5)]}


def test_what_makes_no_error_step_by_step_is_refused():
    for name, why in (("full", "prunes nothing"), ("snapkv", "once after a prompt")):
        with pytest.raises(ConfigError, match=why):
            check_policies([make_policy(name)], [0.2], 3, 2)
    with pytest.raises(ConfigError, match="layers"):
        check_policies([make_policy("calibrated", file=UNEVEN)], [0.2], 4, 2)
    with pytest.raises(ConfigError, match="key=value"):
        command.policy_of("a2sf,0.4")
    with pytest.raises(ConfigError, match="did you mean h2o"):
        command.policy_of("h2")
    for argument, message in (
        (["--budget", "1.2"], "--budget=1.2"),
        (["--tokens", "0"], "--tokens=0"),
        (["--skip", "0"], "--skip=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.main(["h2o", *argument])


def test_the_command_writes_every_layer_and_a_picture(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{w} fox jumps over the lazy dog, twice." * 3 for w in "abcdefghij")
    )
    options = ["--model", "./model", "--text", "text.txt", "--lengths", "24", "--tokens", "48", "--skip", "24"]
    command.main(["h2o", "a2sf,forgetting_factor=0.4", *options, "--budget", "0.2", "0.5", "--out", "o/e.csv"])
    frame = pd.read_csv("o/e.csv")
    assert set(frame["policy"]) == {"h2o", "a2sf,forgetting_factor=0.4"}
    assert set(frame["budget"]) == {0.2, 0.5}
    assert (frame["error"] > 0).all()
    assert Path("o/e.png").stat().st_size > 5000
    assert "2 passages, 48 tokens of text.txt" in capsys.readouterr().out
