"""Each of lm-eval's options gives the numbers that lm-eval's own flag gives, full cache; groups score as lm-eval's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from a2sf.app.compute import overrides_of_job
from a2sf.app.folders import model_names
from a2sf.hf.loading import ModelSpec, load
from a2sf.scoring.lm import PrunedLM
from a2sf.store.aggregates import aggregates
from a2sf.store.runs import read_groups, results_frame, table_of, write_cell, write_groups
from a2sf.sweep.config.grid import addable
from a2sf.sweep.config.schema import register
from a2sf.sweep.config.settings import read
from a2sf.sweep.group import CellGroup
from tests.hub.build import write_model
from tests.own_tasks import SIZES, own_tasks, simple_evaluate

CONF = Path(__file__).parents[2] / "conf"
DEFAULT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}>"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A random model with SmolLM2's tokenizer and two chat templates."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    found = load(ModelSpec(str(folder), device="cpu"))
    found.tokenizer.chat_template = {"default": DEFAULT, "short": TEMPLATE}
    found.tokenizer.save_pretrained(folder)
    return folder, found


@pytest.fixture
def settings(own, loaded):
    """What an `a2sf run` with some overrides comes to."""
    GlobalHydra.instance().clear()
    register()

    def composed(*overrides: str, include: bool = True):
        more = [f"include_path={own}"] if include else []
        given = ["policy=full", f"model.path={loaded[0]}", *more, *map(addable, overrides)]
        return read(compose("config", given), model_names())

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield composed


@pytest.fixture(scope="module")
def lm(loaded):
    return PrunedLM(loaded[1].model, tokenizer=loaded[1].tokenizer)


def compute(cell, lm, directory):
    (made,) = CellGroup([cell], lm.scorer, directory).compute()
    assert made.error is None
    return made.result, made.documents


def theirs(loaded, own, tasks, *, metadata=None, **flags):
    lm = HFLM(pretrained=loaded[1].model, tokenizer=loaded[1].tokenizer, batch_size=8, **flags.pop("model", {}))
    manager = TaskManager(include_path=str(own), include_defaults=False, metadata=metadata)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=2, **flags)


CHAT = {"apply_chat_template": True}
CASES = [
    ([], {}),
    (["system_instruction=Be brief."], {"system_instruction": "Be brief."}),
    (["chat_template=true"], CHAT),
    (["chat_template=true", "shots=2", "system_instruction=Be brief."], CHAT | {"system_instruction": "Be brief."}),
    (["chat_template=true", "shots=2", "fewshot_as_multiturn=false"], CHAT | {"fewshot_as_multiturn": False}),
    (["chat_template=short", "shots=2"], CHAT | {"model": {"chat_template_args": {"chat_template": "short"}}}),
]


@pytest.mark.parametrize(("overrides", "flags"), CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_the_same_prompts_and_log_likelihoods(settings, loaded, own, lm, tmp_path, overrides, flags):
    (cell,) = settings("tasks=[own_two]", "limit=4", *overrides).cells
    result, documents = compute(cell.with_content(), lm, tmp_path / "own")
    expected = theirs(loaded, own, ["own_two"], limit=4, num_fewshot=cell.shots, **flags)
    samples = sorted(expected["samples"]["own_two"], key=lambda s: s["doc_id"])
    assert list(documents["context"]) == [s["arguments"][0][0] for s in samples]
    for got, sample in zip(documents["loglikelihoods"], samples, strict=True):
        assert list(got) == pytest.approx([a[0] for a in sample["filtered_resps"]], abs=1e-3)
    assert result["metrics"]["acc"]["value"] == expected["results"]["own_two"]["acc,none"]
    assert ("options" in result["cell"]) == bool(overrides)
    begins = {"chat_template=true": "[", "chat_template=short": "<|im_start|>"}
    assert documents["context"].str.startswith(begins.get(" ".join(overrides[:1]), "")).all()


@pytest.mark.parametrize("given", ["gen_kwargs.max_gen_toks=9", "gen_kwargs='max_gen_toks=9'"])
def test_settings_of_generation(settings, loaded, own, lm, tmp_path, given):
    cell, other = settings("tasks=[own_writes,own_two]", "limit=3", given).cells
    _, documents = compute(cell.with_content(), lm, tmp_path / "own")
    expected = theirs(loaded, own, ["own_writes"], limit=3, gen_kwargs="max_gen_toks=9")["samples"]["own_writes"]
    assert list(documents["generated"]) == [s["resps"][0][0] for s in expected]
    assert max(n for (n,) in documents["continuation_tokens"]) > 5  # the task's own limit
    assert cell.options == {"gen_kwargs": {"max_gen_toks": 9}}
    # by another of lm-eval's names, which the task's own would win over
    (same,) = settings("tasks=[own_writes]", "limit=3", "gen_kwargs.max_new_tokens=9").cells
    assert list(compute(same.with_content(), lm, tmp_path / "own")[1]["generated"]) == list(documents["generated"])
    (hot,) = settings("tasks=[own_writes]", "limit=3", "gen_kwargs.temperature=0.7", "samples=1").cells
    (failed,) = CellGroup([hot.with_content()], lm.scorer, tmp_path / "own").compute()
    assert "gen_kwargs.temperature=0.7 is not allowed" in str(failed.error)
    assert other.id == settings("tasks=[own_two]", "limit=3").cells[0].id


def test_arguments_of_a_task(settings, loaded, own, lm, tmp_path):
    given = ["task_args.number=3", "task_args.own_arguments.word=go"]
    cell, other = settings("tasks=[own_arguments,own_two]", *given).cells
    assert (cell.options, other.options) == ({"task_args": {"number": 3, "word": "go"}}, {})
    _, documents = compute(cell.with_content(), lm, tmp_path / "own")
    expected = theirs(loaded, own, ["own_arguments"], metadata={"number": 3, "word": "go"})["samples"]["own_arguments"]
    assert list(documents["context"]) == [s["arguments"][0][0] for s in expected] == ["go 0", "go 1", "go 2"]
    assert cell.id != settings("tasks=[own_arguments]").cells[0].id


def test_a_worker_has_the_same_cell(settings, loaded):
    """Also where the point of the grid says more than concerns the cell."""
    given = ["tasks=[own_group,own_arguments]", "chat_template=short", "system_instruction='a, b=\"c\"'", "shots=1"]
    given += ["task_args.own_arguments.word='a\"b'", "task_args.number=4", "gen_kwargs={max_gen_toks: 3}"]
    planned = [c.with_content() for c in settings(*given).cells]
    assert len(planned) == 4
    for cell in planned:
        (again,) = settings(*overrides_of_job([([addable(g) for g in given], None)], [cell])).cells
        assert (again.id, again.options, again.task_name) == (cell.id, cell.options, cell.task_name)


def test_groups_score_as_lm_evals(settings, loaded, own, lm, tmp_path):
    found = settings("tasks=[own_group]")
    assert [c.task_name for c in found.cells] == list(SIZES)
    stored = []
    for cell in found.cells:
        result, documents = compute(cell.with_content(), lm, tmp_path / "own")
        stored.append(write_cell(tmp_path / "runs" / cell.name, result, documents, ""))
    write_groups(tmp_path / "runs", found.groups)
    assert read_groups(tmp_path / "runs") == list(found.groups)
    table = table_of(stored, found.groups)
    made = table[table["members"].notna()].set_index(["task", "metric"])
    expected = theirs(loaded, own, ["own_group"])["groups"]
    inner = "own_group::own_inner"
    assert set(made.index) == {("own_group", "acc"), (inner, "acc"), (inner, "acc_norm")}
    for (group, metric), row in made.iterrows():
        assert row["value"] == pytest.approx(expected[group][f"{metric},none"], abs=1e-12)
        assert row["lm_eval_stderr"] == pytest.approx(expected[group][f"{metric}_stderr,none"], abs=1e-12)
        assert row["n"] == expected[group]["sample_count"][f"{metric},none"]
    assert (made.loc[("own_group", "acc"), "members"], made.loc[("own_group", "acc"), "shots"]) == (3, 0)
    rows, notes = aggregates(results_frame(stored[:2]), found.groups)  # one is missing
    assert set(rows["task"]) == {inner}
    assert notes == ["The group own_group has no score in rows that lack some of its 3 tasks; missing are own_three."]


def test_a_tag_of_ones_own_stands_for_its_tasks(settings, own):
    assert [c.task_name for c in settings("tasks=[own_tag]").cells] == sorted(SIZES)
    assert settings("tasks=[own_tag]").groups == ()


def test_texts_are_left_out_and_nothing_else(settings, lm, tmp_path):
    for task in ("own_two", "own_writes"):
        cell = settings(f"tasks=[{task}]", "limit=3").cells[0].with_content()
        bare = settings(f"tasks=[{task}]", "limit=3", "log_samples=false").cells[0].with_content()
        assert bare.name == cell.name
        result, documents = compute(bare, lm, tmp_path / "own")
        complete, with_texts = compute(cell, lm, tmp_path / "own")
        assert result["metrics"] == complete["metrics"]
        texts = {"context", "choices", "target", "generated", "tokens", "thinking"}
        numbers = [c for c in with_texts if c not in texts]
        assert documents[numbers].equals(with_texts[numbers])
        written = documents.drop(columns=numbers).to_json()
        assert "own_two" not in written
        assert "it is" not in written
        stored = write_cell(tmp_path / "runs" / "bare" / bare.name, result, documents, "")
        (longer,) = settings(f"tasks=[{task}]", "log_samples=false").cells  # a higher limit continues it
        again, _ = compute(longer.with_content(), lm, tmp_path / "runs" / "longer")
        assert again["timing"]["reused_requests"] == (6 if task == "own_two" else 0)
        assert stored.result["documents"]["n"] == 3
