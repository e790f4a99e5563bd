"""Bad input: one sentence that names the key, the value and what is allowed, before anything slow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from a2sf.app.check import _check_each_cell_once, examples_left_out
from a2sf.app.folders import model_names
from a2sf.app.process import explain
from a2sf.calibration.filters import content
from a2sf.errors import ConfigError, Notice, UserError
from a2sf.policies.renamed import notice
from a2sf.sweep.config.overrides import quote
from a2sf.sweep.config.schema import register
from a2sf.sweep.config.settings import as_group, read, refuse_unused
from a2sf.tasks import spec as tasks

CONF = Path(__file__).parents[3] / "conf"


@pytest.fixture(autouse=True)
def _hydra():
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def settings(*overrides: str):
    return read(compose("config", list(overrides)), model_names())


def sentence(*overrides: str) -> str:
    """What the user reads."""
    try:
        got = settings(*overrides)
        for cell in got.cells:
            tasks.TaskSpec(cell.task, cell.data, cell.shots).check()
    except UserError as error:
        return str(error)
    except Exception as error:
        return explain(error)
    raise AssertionError(f"{overrides} was accepted")


def test_a_file_for_heads_of_another_size_is_refused(tmp_path):
    """By the model's config alone, also for a policy that another one is built on."""
    file = tmp_path / "filters.json"
    file.write_text(json.dumps(content(torch.ones(30, 3, 32), "mine", {"tokens": 130})))
    for overrides in ([f"policy.file={file}"], ["policy=chunkkv", f"policy.by={{name: qfilter, file: {file}}}"]):
        said = sentence("policy=qfilter", *overrides)
        assert said == "policy.file=mine is not allowed: it is of heads of 32 numbers, and this model's have 64."
    file.write_text(json.dumps(content(torch.ones(30, 3, 64), "mine", {"tokens": 130})))
    settings("policy=qfilter", f"policy.file={file}")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["budget.ratio=0"], ["budget.ratio=0", "0 < ratio <= 1"]),
        (["checkpoint=0"], ["checkpoint=0", "above 0"]),
        (["budget.ratio=1.7", "policy=h2o"], ["budget.ratio=1.7", "0 < ratio <= 1"]),
        (["budget.ratio=nan"], ["budget.ratio=nan", "0 < ratio <= 1"]),
        (["budget.ratio=some"], ["budget.ratio=some", "0 < ratio <= 1"]),
        (["budget.ratio=2", "policy=full"], ["budget.ratio=2"]),
        (["budget.ratio=[0.1,0.2]"], ["budget.ratio=[0.1, 0.2]", "one entry per layer, 30"]),
        (["budget.tokens=0"], ["budget.tokens=0", "at least 1"]),
        (["budget.tokens=100000000000000000000", "policy=h2o"], ["budget.tokens=1000", "at most 2,147,483,647"]),
        (["policy=criticalkv", "policy.by=key_norm"], ["policy.by=key_norm", "may be negative", "such as snapkv"]),
        (["policy=criticalkv", "policy.by={name: rkv}"], ["policy.by=rkv", "may be negative"]),
        (["budget.tokens=4", "budget.ratio=0.1"], ["budget", "exactly one"]),
        (["budget.base=everything"], ["budget.base=everything", "total, context, seen"]),
        (["policy=streaming", "budget.tokens=3"], ["budget.tokens=3", "recent + sinks", "4"]),
        (["policy=streaming", "policy.sinks=-1"], ["policy.sinks=-1", "at least 0"]),
        (["policy=h2o", "policy.recent_share=1.5"], ["policy.recent_share=1.5", "from 0 to 1"]),
        (["policy=h2o", "+policy.heavy=3"], ["policy.heavy=3", "recent_share"]),
        (["policy=future", "schedule=prompt"], ["schedule.when=prompt", "the policy future supports only step"]),
        (["policy=snapkv", "schedule=step"], ["schedule.when=step", "the policy snapkv supports only prompt"]),
        (["schedule=evry"], ["schedule=evry", "every, prompt, step", "did you mean every"]),
        (["schedule.when=now"], ["schedule.when=now", "step, every, prompt"]),
        (["schedule=every", "schedule.every=0"], ["schedule.every=0", "at least 1"]),
        (["schedule=every", "schedule.every=some"], ["schedule.every=some", "at least 1"]),
        (["schedule=prompt", "schedule.then=stop"], ["schedule.then=stop", "keep, step"]),
        (["schedule=step", "schedule.every=0"], ["schedule.every=0", "at least 1"]),
        (["schedule.every=4"], ["schedule.every=4", "schedule=every"]),
        (
            ["policy=h2o", "schedule=prompt", "schedule.then=every"],
            ["schedule.every=None", "needs the number of tokens"],
        ),
        (["schedule.then=step"], ["schedule.then=step", "schedule=prompt"]),
        (["schedule=prompt", "schedule.at=end", "policy=h2o"], ["schedule.at=end", "prompt, context"]),
        (["schedule.at=context"], ["schedule.at=context", "schedule=prompt"]),
        (
            ["schedule=prompt", "schedule.at=context", "budget.base=context"],
            ["schedule.at=context", "the task piqa", "give prompt"],
        ),
        (
            ["schedule=prompt", "schedule.at=context", "tasks=needle"],
            ["budget.base=total", "before the question", "base context"],
        ),
        (["tasks=long", "shots=1"], ["shots=1", "prompts of long_single have the lengths in task_args.lengths"]),
        (["task_args=1024"], ["task_args=1024", "task_args.lengths=[1024,4096]"]),
        (["policy=snapkv", "policy.window=0"], ["policy.window=0", "at least 1"]),
        (["policy=snapkv", "policy.kernel=4"], ["policy.kernel=4", "odd"]),
        (["policy=snapkv", "policy.kernel=0"], ["policy.kernel=0", "odd"]),
        (["policy=adakv", "policy.floor=1.5"], ["policy.floor=1.5", "from 0 to 1"]),
        (["policy=heads", "policy.heads=[[0,3]]"], ["policy.heads=[0, 3]", "30 layers of 3 key/value heads"]),
        (["policy=heads", "policy.heads=[[30,0]]"], ["policy.heads=[30, 0]", "30 layers"]),
        (["policy=heads", "policy.heads=nowhere.json"], ["policy.heads=nowhere.json", "No such file"]),
        (["policy=future", "tasks=[needle]"], ["policy=future", "later tokens", "needle generates text"]),
        (["forgetting_factor=1.2"], ["forgetting_factor=1.2", "0 to 1"]),
        (["forgetting_factor=[0.1,0.2]"], ["forgetting_factor=[0.1, 0.2]", "one factor per layer, 30", "has 2"]),
        (["policy=h2oo"], ["policy=h2oo", "a2sf, adakv, ", "calibrated, ", "did you mean h2o"]),
        (["model=smollm2"], ["model=smollm2", "did you mean smollm2-135m"]),
        (["model.dtype=int8"], ["model.dtype=int8", "float32, bfloat16"]),
        (["model.device=cuda:7"], ["model.device=cuda:7", "no such GPU"]),
        (["model.device_map=blanced"], ["model.device_map=blanced", "did you mean balanced"]),
        (["model.device_map=nowhere.json"], ["model.device_map=nowhere.json", "No such file"]),
        (["model.path=''"], ["model.path", "hub id"]),
        (["tasks=[pipa]"], ["tasks=pipa", "did you mean", "piqa"]),
        (["tasks=[]"], ["tasks=[]", "suite"]),
        (["tasks=[mathqa]", "data=bundle"], ["tasks=mathqa", "data=bundle does not hold it; it holds ARC-", " more"]),
        (["tasks=[piqa]", "data=bundle", "data.split=test"], ["data.split=test", "only validation"]),
        (["data.split=validaton", "data=bundle"], ["data.split=validaton", "did you mean validation"]),
        (["data.split=''"], ["data.split=''", "give a name"]),
        (["data.dir=/nowhere"], ["data.dir=/nowhere", "cannot be read"]),
        (["data=hubb"], ["data=hubb", "bundle, hub"]),
        (["shots=-1"], ["shots=-1", "from 0 to 1000"]),
        (["shots=1001"], ["shots=1001", "from 0 to 1000"]),
        (["plan.flips=15"], ["plan.flips=15", "above 0 and up to 1, such as 0.15"]),
        (["plan.flips=0"], ["plan.flips=0", "above 0"]),
        (["plan.flips=many"], ["plan.flips=many", "a share"]),
        (["plan.detect=0"], ["plan.detect=0", "points above 0"]),
        (["plan.detect=true"], ["plan.detect=True", "a number of points"]),
        (["plan.detect=nan"], ["plan.detect=nan", "a number of points"]),
        (["plan.detect=20", "plan.flips=0.1"], ["plan.detect=20", "10 % of the documents (plan.flips)"]),
        (["plan.flip=0.1"], ["plan.flip", "not a key", "plan.flips"]),
        (["limit=0"], ["limit=0", "at least 1"]),
        (["limit=ten"], ["limit=ten is not allowed: give a whole number, or null."]),
        (["limit=0.5"], ["limit=0.5 is not allowed: give a whole number, or null."]),
        (["seed=abc"], ["seed=abc is not allowed: give a whole number."]),
        (["checkpoint=soon"], ["checkpoint=soon is not allowed: give a number."]),
        (["policy=h2o", "policy.recent_share=half"], ["policy.recent_share=half is not allowed: give a number."]),
        (["plan_only=maybe"], ["plan_only=maybe is not allowed: give true or false."]),
        (["log_samples=7"], ["log_samples=7 is not allowed: give true or false."]),
        (["log_samples=null"], ["log_samples=None is not allowed: give true or false."]),
        (["model.add_bos_token=2"], ["model.add_bos_token=2 is not allowed: give true or false, or null."]),
        (["early_stopping.significant=1"], ["early_stopping.significant=1 is not allowed: give true or false."]),
        (["early_stopping.metric=acc_norm"], ["early_stopping.metric=acc_norm", "early_stopping.pair"]),
        (["early_stopping.confidence=0.5"], ["early_stopping.confidence=0.5", "early_stopping.pair"]),
        (["batch_size=0"], ["batch_size=0", "at least 1"]),
        (["batch_size=many"], ["batch_size=many", "at least 1"]),
        (["backend=cuda"], ["backend=cuda", "numba"]),
        (["tracker=mlflow"], ["tracker=mlflow", "none, tensorboard, wandb"]),
        (
            ["tracker=[wandb,tensorbord]"],
            ["tracker=tensorbord", "did you mean tensorboard", "none, tensorboard, wandb"],
        ),
        (["tracker=[wandb,none]"], ["tracker=[wandb, none]", "none cannot be one of several"]),
        (["tracker=wandb", "+tracker.kinds.team=wandb"], ["tracker=[wandb, team]", "one kind (wandb)"]),
        (["~tracker", "+tracker.kinds.mine=tensorbord"], ["tracker=tensorbord", "did you mean tensorboard"]),
        (["tracker.kind=wandb"], ["tracker.kind is not a key", "tracker.kinds"]),
        (["sweep_name=a/b"], ["sweep_name='a/b'", "folder"]),
        (["budgt.ratio=0.2"], ["budgt", "not a key", "budget"]),
        (["+budgt=0.2"], ["budgt", "not a key", "budget"]),
        (["+budget.rato=0.2"], ["budget.rato", "not a key", "budget.ratio"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and "=" in x[0] else "",
)
def test_bad_input_is_one_sentence(overrides, parts):
    message = sentence(*overrides)
    assert "\n" not in message.strip()
    for part in parts:
        assert part in message


def test_a_key_that_nothing_uses_is_refused_unless_a_preset_gives_it():
    h2o, a2sf = (settings(f"policy={p}", "forgetting_factor=0.5") for p in ("h2o", "a2sf"))
    refuse_unused([h2o, a2sf])
    refuse_unused([h2o], given=["limit"])
    with pytest.raises(ConfigError, match=r"forgetting_factor=0\.5 is not allowed: h2o has none"):
        refuse_unused([h2o], given=["forgetting_factor"])
    texts = settings("full_texts=true", "tasks=[copa]")
    with pytest.raises(ConfigError, match="full_texts=true is not allowed: none of the tasks generates text"):
        refuse_unused([texts])
    refuse_unused([texts, settings("full_texts=true", "tasks=[needle]")])


def test_triton_that_is_not_installed_is_refused_before_anything_slow(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    composed = compose("config", ["backend=triton", "model.path=someone/their-model"])
    with pytest.raises(ConfigError, match="backend=triton is not allowed: the package triton is not installed"):
        read(composed)
    assert read(composed, here=False).cells[0].backend == "triton"


@pytest.mark.parametrize(
    ("key", "values"),
    [("backend", ("numba", "reference")), ("batch_size", (1, 8)), ("model.name", ("A", "B")), ("trace", (0, 1))],
)
def test_values_that_would_be_one_cell_are_refused(key, values):
    several = [settings(f"{key}={value}", "policy=full") for value in values]
    with pytest.raises(UserError, match=rf"{key}={values[0]} and {key}={values[1]} would be one cell"):
        _check_each_cell_once(several)
    _check_each_cell_once([several[0], settings(f"{key}={values[1]}", "policy=h2o"), several[0]])


def test_an_unreadable_file_as_data_directory(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be read" in sentence(f"data.dir={tmp_path / 'file'}")
    (tmp_path / "empty").mkdir()
    assert "empty" in sentence(f"data.dir={tmp_path / 'empty'}")


def test_what_is_requested_arrives():
    got = settings("policy=streaming", "policy.sinks=2", "budget.tokens=8", "tasks=[piqa,copa]", "shots=1", "limit=5")
    assert [c.task for c in got.cells] == ["piqa", "copa"]
    cell = got.cells[0]
    assert (cell.policy.sinks, cell.budget.tokens, cell.shots, cell.limit) == (2, 8, 1, 5)
    assert cell.model_name == "smollm2-135m"
    assert cell.name.startswith("smollm2-135m__streaming__c8__piqa__1shot__n5__")


def test_a_model_path_names_itself():
    assert settings("model.path=someone/their-model").cells[0].model_name == "their-model"
    assert settings("model.path=facebook/opt-2.7b").cells[0].model_name == "opt-2.7b"


def test_cells_that_a_policy_cannot_tell_apart_are_one():
    full = {
        settings("policy=full", f"budget.ratio={r}", f"forgetting_factor={a}").cells[0].name
        for r, a in ((0.1, 0.3), (0.5, 0.7))
    }
    h2o = {settings("policy=h2o", f"forgetting_factor={a}").cells[0].name for a in (0.1, 0.9)}
    a2sf = {settings("policy=a2sf", f"forgetting_factor={a}").cells[0].name for a in (0.1, 0.9)}
    assert (len(full), len(h2o), len(a2sf)) == (1, 1, 2)


def test_schedules_that_come_to_the_same_are_one_cell():
    def of(*overrides: str):
        (cell,) = settings("tasks=[copa]", "data=bundle", *overrides).cells
        return cell

    step = of("policy=h2o")
    assert step.schedule is None
    assert "schedule" not in step.identity  # as before there were schedules
    assert of("policy=h2o", "schedule=step").id == step.id
    assert of("policy=h2o", "schedule=every", "schedule.every=1").id == step.id
    assert of("policy=full", "schedule=prompt").id == of("policy=full").id
    assert of("policy=snapkv", "schedule=prompt").id == of("policy=snapkv").id
    assert of("policy=snapkv").describe()["schedule"] == "prompt"
    kinds = (["schedule=every", "schedule.every=4"], ["schedule=every"], ["schedule=prompt"])
    others = [of("policy=h2o", *kind) for kind in (*kinds, ["schedule=prompt", "schedule.then=step"])]
    assert len({step.id, *(c.id for c in others)}) == 5
    parts = ["every4", "every16", "prompt", "prompt-step"]
    assert [c.name.split("__")[3] for c in others] == parts
    assert [c.describe()["schedule"] for c in others] == parts
    later = of("policy=h2o", "schedule=prompt", "schedule.then=every", "schedule.every=4")
    assert later.describe()["schedule"] == "prompt-every4"
    assert later.id not in {c.id for c in others}
    ignored = of("policy=h2o", "schedule=prompt", "+schedule.every=4")  # in a grid another point looks at it
    assert ignored.id == others[2].id


def test_the_identity_changes_with_everything_that_could_change_a_number():
    base = settings("policy=h2o", "data=bundle", "shots=1").cells[0]
    for change in (
        "policy.recent_share=0.4",
        "schedule=prompt",
        "budget.ratio=0.3",
        "budget.base=context",
        "shots=2",
        "seed=7",
        "model.dtype=bfloat16",
        "tasks=[copa]",
    ):
        assert settings("policy=h2o", "data=bundle", "shots=1", change).cells[0].id != base.id, change
    assert settings("policy=h2o", "data=bundle", "shots=1", "limit=9", "batch_size=3").cells[0].id == base.id


def test_only_a_gpus_cells_are_of_the_gpus_version(monkeypatch):
    cpu = settings("policy=h2o", "data=bundle", "model.device=cpu").cells[0]
    gpu = dataclasses.replace(cpu, model=dataclasses.replace(cpu.model, device="cuda:1"))
    assert "gpu" not in cpu.identity
    before = gpu.id
    assert before != cpu.id
    monkeypatch.setattr("a2sf.sweep.cell.GPU_VERSION", 999)
    assert dataclasses.replace(gpu).id != before
    assert dataclasses.replace(cpu).id == cpu.id


def test_only_a_changed_policys_cells_are_of_its_version(monkeypatch):
    """Finished results of an earlier version are not reused, and those of all other policies are."""
    h2o, snapkv = (settings(f"policy={p}", "data=bundle").cells[0] for p in ("h2o", "snapkv"))
    assert not {"policy_version", "cut"} & {*h2o.identity, *snapkv.identity}
    before = h2o.id, snapkv.id
    monkeypatch.setattr(type(snapkv.policy), "version", 2)
    changed = dataclasses.replace(snapkv)
    assert (dataclasses.replace(h2o).id, changed.id != before[1]) == (before[0], True)
    assert changed.identity == snapkv.identity | {"policy_version": 2}


def test_suites():
    paper = [c.task for c in settings("tasks=paper").cells]
    assert paper == ["openbookqa", "winogrande", "piqa", "copa", "mathqa", "arc_easy", "arc_challenge"]


def test_a_policy_without_a_setting_that_the_user_must_give_is_refused():
    """The others are composed in tests/end_to_end/test_docs.py, each file under conf/policy with its page's command."""
    needed = {}
    for file in sorted((CONF / "policy").glob("*.yaml")):
        given = yaml.safe_load(file.read_text())
        for key in ("file", "threshold", "gates"):
            if given.get(key, "") is None:
                needed.setdefault(file.stem, key)
    assert len(needed) >= 3
    for name, key in needed.items():
        with pytest.raises(ConfigError, match=rf"policy\.{key}"):
            settings(f"policy={name}")


def test_a_group_reaches_a_worker_complete(tmp_path):
    """Its first cell by overrides, the others by one key: policies, lists, schedules, what names another key and all."""
    for budget in (0.1, 0.4):
        file = {"name": f"of {budget}", "layers": [{"forgetting_factor": budget}] * 30}
        (tmp_path / f"a-{budget}.yaml").write_text(yaml.safe_dump(file))
    own = f"++policy.file='{tmp_path}/a-${{budget.ratio}}.yaml'"
    overrides = [
        ["policy=h2o", "budget.ratio=0.1"],
        ["policy=a2sf", "forgetting_factor=0.05", "++policy.sinks=2", "budget.tokens=32", "schedule=every"],
        ["policy=heads", "++policy.heads=[[0,1],[2,0]]", "budget.base=context"],
        ["policy=snapkv", "++policy.window=8", "schedule=prompt", "schedule.then=step"],
        ["policy=full", "budget.ratio=0.7"],
        ["policy=calibrated", own, "budget.ratio=0.4"],
        ["policy=calibrated", own, "budget.ratio=0.1"],
    ]
    common = ["tasks=[piqa]", "limit=3"]
    points = [compose("config", [*common, *a]) for a in overrides]
    expected = [c for p in points for c in read(p, model_names()).cells]
    names = [c.name for c in expected]
    made = settings(*common, *overrides[0], f"group={quote(as_group(points[1:], names))}")
    assert list(made.cells) == expected
    assert made.planned == set(names)
    assert len({c.id for c in made.cells}) == len(overrides)
    assert [c.policy.file["name"] for c in made.cells[-2:]] == ["of 0.4", "of 0.1"]


def test_early_stopping_under_its_name_of_the_previous_version():
    """As a file of the user's may have it: `until:`, with `verdict`."""
    new = settings("early_stopping={pair: [a2sf,h2o], half_width: 5, significant: true}").cells[0]
    notice.cache_clear()
    with pytest.warns(Notice, match="until is now called early_stopping"):
        old = settings("until={pair: [a2sf,h2o], half_width: 5, verdict: true}").cells[0]
    assert old == new
    assert old.describe() == new.describe()
    assert "-untilbada__" in old.name  # cells of the previous version are found by their names
    assert old.describe()["until"] == {
        "pair": ["a2sf", "h2o"],
        "half_width": 5,
        "verdict": True,
        "confidence": 0.95,
        "metric": "acc",
    }
    assert "early_stopping has pair" in sentence("until={par: [a2sf,h2o]}")
    assert "give its keys under early_stopping" in sentence("until=3")


def test_examples_of_a_tasks_file_that_are_left_out_are_reported():
    (said,) = examples_left_out([settings("tasks=[gsm8k,piqa]")])
    assert said.startswith("gsm8k: lm-eval gives 5 few-shot examples")
    assert examples_left_out([settings("tasks=[gsm8k]", "shots=3"), settings("tasks=[copa]")]) == []
