"""`a2sf calibrate --filters`: a file that the policy reads, of the directions that the model's queries have."""

from __future__ import annotations

import pytest
import torch

from a2sf import make_policy
from a2sf.calibration.capture import capture
from a2sf.commands.policy import calibrate
from a2sf.errors import ConfigError


def test_the_command_writes_what_the_policy_reads(tmp_path, smollm2, capsys):
    text, file = tmp_path / "text.txt", tmp_path / "filters.json"
    text.write_text(
        "\n\n".join(f"The {n}th house in the street has a door, a window and {n} chimneys." for n in range(60))
    )
    calibrate.main(
        ["--filters", "--text", str(text), "--tokens", "192", "--held-out", "96", "--lengths", "96", "--out", str(file)]
    )
    assert f"policy=qfilter policy.file={file}" in capsys.readouterr().out.replace("\n", "")
    policy = make_policy("qfilter", file=str(file))
    found = policy.directions
    assert found.shape == (30, 3, 64)
    policy.check(30, 3)
    # along it, the mean query of each head is positive, and keys that get more attention have more of it
    agree = []

    def look(layer) -> None:
        query, key = layer.query[0].unflatten(0, (3, -1)), layer.key[0]
        assert ((query.mean((1, 2)) * found[layer.number]).sum(-1) > 0).all()
        logits = (query[:, :, -20:].mean((1, 2))[:, None] * key).sum(-1)
        along = (key * found[layer.number][:, None]).sum(-1)
        agree.extend(torch.corrcoef(torch.stack(x))[0, 1] for x in zip(logits, along, strict=True))

    capture(smollm2.model, smollm2.tokenizer(text.read_text())["input_ids"][-120:], look)
    assert torch.stack(agree).mean() > 0.5


def test_directions_have_no_other_settings():
    with pytest.raises(ConfigError, match="--filters=True is not allowed: give it without --per and --shares"):
        calibrate.main(["--filters", "--shares"])
