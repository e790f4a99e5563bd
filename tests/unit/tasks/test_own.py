"""A folder of the user's own tasks, and lm-eval's other options: bad input is one sentence before anything slow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lm_eval._cli.harness import HarnessCLI

from a2sf.app.folders import model_names
from a2sf.errors import ConfigError, UserError
from a2sf.sweep.config.grid import addable
from a2sf.sweep.config.schema import register
from a2sf.sweep.config.settings import read, refuse_unused
from a2sf.tasks import spec as tasks
from a2sf.tasks.files import user_folder as own
from a2sf.tasks.files.functions import function_file
from a2sf.tasks.prompting import Prompting
from tests.own_tasks import own_tasks

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _hydra():
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def settings(*overrides):
    found = read(compose("config", [addable(o) for o in overrides]), model_names())
    refuse_unused([found])
    return found


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["chat_template=3"], ["chat_template=3", "true, false, or the name"]),
        (["fewshot_as_multiturn=true"], ["fewshot_as_multiturn=true", "needs chat_template=true"]),
        (["gen_kwargs.temprature=0.5", "tasks=[needle]"], ["gen_kwargs.temprature=0.5", "did you mean temperature"]),
        (["gen_kwargs.max_gen_toks=5", "tasks=[copa]"], ["gen_kwargs=", "none of the tasks generates"]),
        (
            ["gen_kwargs='max_gen_toks=5,max_new_tokens=6'", "tasks=[needle]"],
            ["gen_kwargs.max_new_tokens=6", "the same as max_gen_toks"],
        ),
        (
            ["tasks=[ruler,niah_single_1]", "task_args.ruler.max_seq_lengths=[2000]"],
            ["task_args=", "niah_single_1 is given twice"],
        ),
        (["gen_kwargs=much"], ["gen_kwargs=much", "a=1,b=2"]),
        (["gen_kwargs='{much'"], ["gen_kwargs={much", "not JSON"]),
        (["task_args.lenghts=[10]", "tasks=[needle]"], ["task_args.lenghts=[10]", "did you mean lengths"]),
        (
            ["task_args.lengths=[10]", "tasks=[copa]"],
            ["task_args.lengths=[10]", "copa has no code that takes arguments"],
        ),
        (["task_args.needle.lenghts=3", "tasks=[needle,copa]"], ["task_args.needle.lenghts=3", "no such argument"]),
        (["include_path=/nowhere"], ["include_path=/nowhere", "no such folder"]),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else "",
)
def test_what_is_not_allowed_is_one_sentence(overrides, parts):
    with pytest.raises(UserError) as raised:
        settings(*overrides)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


def test_an_argument_for_all_tasks_reaches_those_that_use_it():
    needle, copa = settings("tasks=[needle,copa]", "task_args.lengths=[20]", "task_args.needle.depths=[50]").cells
    assert needle.options == {"task_args": {"depths": [50], "lengths": [20]}}
    assert (copa.options, copa.data.task_args) == ({}, "")
    assert not {"prompting", "task_args"} & set(copa.identity)  # the names of cells that say nothing are as before
    assert len(tasks.TaskSpec(needle.task, needle.data).build(0).eval_docs) == 10
    (ruler,) = settings("tasks=[ruler_vt]", "task_args.max_seq_lengths=[512]").cells
    assert ruler.options == {"task_args": {"max_seq_lengths": [512]}}


def test_a_key_may_be_idle_in_one_point_of_a_grid():
    plain, chat = (
        read(compose("config", ["fewshot_as_multiturn=true", f"chat_template={x}"]), {}) for x in ("false", "true")
    )
    refuse_unused([plain, chat])
    with pytest.raises(ConfigError):
        refuse_unused([plain])


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"notes.txt": ""}, ["no YAML file in it defines a task"]),
        ({"template.yaml": "output_type: generate_until\n"}, ["no YAML file in it defines a task"]),
        ({"x.yaml": "task: mine\ndoc_to_text: 'a\n"}, ["x.yaml is not allowed: it is not YAML", "in line 3"]),
        ({"x.yaml": "task: [a, b]\n"}, ["x.yaml", "one name"]),
        ({"x.yaml": "include: gone.yaml\ntask: mine\n"}, ["x.yaml", "cannot be read", "gone.yaml"]),
        ({"x.yaml": "just text"}, ["x.yaml", "cannot be read"]),
        ({"a.yaml": "task: mine\n", "b/c.yaml": "task: mine\n"}, ["c.yaml", "it defines mine, as", "a.yaml does"]),
        ({"a.yaml": "task: demo\n"}, ["demo, which is a suite"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, files, parts):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as raised:
        settings(f"include_path={tmp_path}")
    assert "\n" not in str(raised.value)
    for part in ["include_path=", *parts]:
        assert part in str(raised.value)


def test_a_task_that_is_not_found_says_where_own_tasks_are_looked_for(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(ConfigError, match=r"tasks=minee .*own needs include_path="):
        settings("tasks=[minee]")
    with pytest.raises(ConfigError, match=r"tasks=minee .*did you mean mine.*nor a task in"):
        settings("tasks=[minee]", f"include_path={tmp_path}")


def test_a_name_of_ones_own_wins_and_that_is_reported(tmp_path):
    folder = own_tasks(tmp_path / "own")
    text = (folder / "own_one.yaml").read_text()
    (folder / "copa.yaml").write_text(text.replace("task: own_one", "task: copa"))
    (folder / "copas.yaml").write_text("group: copas\ntask: [copa, own_two]\n")
    (mine,) = settings("tasks=[copa]", f"include_path={folder}").cells
    (theirs,) = settings("tasks=[copa]").cells
    assert (mine.task, theirs.task) == (str(folder / "copa.yaml"), "copa")
    assert mine.task_name == theirs.task_name == "copa"
    (folder / "mmlu.yaml").write_text("group: mmlu\ntask: [own_one]\n")
    found = settings("tasks=[copas,mmlu,own_two]", f"include_path={folder}")
    assert [c.task for c in found.cells] == [mine.task, str(folder / "own_two.yaml"), str(folder / "own_one.yaml")]
    assert tasks.hidden(*found.include) == [
        f"{name}: the definition in {folder}/{name}.yaml is used instead of lm-eval's." for name in ("mmlu", "copa")
    ]
    with pytest.raises(ConfigError, match=r"did you mean own_t"):
        settings("tasks=[own_too]", f"include_path={folder}")
    assert own.folder_of(folder / "copa.yaml") == folder.resolve()


def test_a_task_of_ones_own_that_a_group_of_lm_evals_changes(tmp_path):
    folder = own_tasks(tmp_path / "own")
    (folder / "hellaswag.yaml").write_text(
        (folder / "own_one.yaml")
        .read_text()
        .replace("own_one", "hellaswag")
        .replace("fewshot_split: train", "fewshot_split: test")
    )
    with pytest.raises(
        ConfigError, match=r"hellaswag\.yaml is not allowed: it redefines a task that the group openllm"
    ):
        settings("tasks=[openllm]", f"include_path={folder}")


def test_a_definition_that_changes_after_the_sweep_began(tmp_path):
    folder = own_tasks(tmp_path / "own")
    (cell,) = settings("tasks=[own_one]", f"include_path={folder}").cells
    before = tasks.TaskSpec(cell.task, cell.data).build(1)
    assert before.config.doc_to_text.startswith("Question")
    assert tasks.TaskSpec(cell.task, cell.data).identity["definition"]
    file = folder / "own_one.yaml"
    file.write_text(file.read_text().replace("Question:", "Ask:"))
    with pytest.raises(UserError, match=r"tasks=own_one: its definition changed after the sweep began"):
        tasks.TaskSpec(cell.task, cell.data).build(1)


def test_code_that_is_not_beside_the_definition_is_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    code = tmp_path / "elsewhere" / "scores_of_mine.py"
    code.write_text("def score(doc, results):\n    return {'acc': 1.0}\n")
    monkeypatch.syspath_prepend(code.parent)
    folder = own_tasks(tmp_path / "own")
    assert function_file(f"{folder}/scores_of_mine.score") == code
    assert function_file(f"{folder}/no_such_module_at_all.score") is None
    assert function_file("/some words. about") is None


class Tokenizer:
    """As much of one as templates need."""

    def __init__(self, chat_template, takes_system=True):
        self.chat_template, self.takes_system = chat_template, takes_system

    def apply_chat_template(self, messages, **_):
        return "".join(m["content"] for m in messages if self.takes_system or m["role"] != "system")


@pytest.mark.parametrize(
    ("prompting", "tokenizer", "why"),
    [
        (Prompting(True), Tokenizer(None), "chat_template=true .*has no chat template"),
        (Prompting("rag"), Tokenizer("…"), "chat_template=rag .*one template without a name; give true"),
        (
            Prompting("toll_use"),
            Tokenizer({"default": "", "tool_use": ""}),
            r"default, tool_use \(did you mean tool_use",
        ),
        (Prompting(True), Tokenizer({"tool_use": ""}), "chat_template=true .*has the templates tool_use"),
        (
            Prompting(True, "Be brief."),
            Tokenizer("…", False),
            "system_instruction='Be brief.' .*accepts no system message",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_template_that_is_not_there(prompting, tokenizer, why):
    with pytest.raises(ConfigError, match=why):
        prompting.check(tokenizer, "the model")
    Prompting().check(tokenizer, "the model")
    Prompting(True, "Be brief.").check(Tokenizer({"default": ""}), "the model")


def test_every_flag_of_lm_eval_is_in_the_table():
    text = (ROOT / "docs" / "lm_eval.md").read_text()
    table = text.split("## Where this differs")[0]
    run = HarnessCLI()._subparsers.choices["run"]
    flags = {o for a in run._actions for o in a.option_strings if o.startswith("--")} - {"--help"}
    assert len(flags) > 30
    assert flags == set(re.findall(r"(--[a-z_]+)\b", "".join(re.findall(r"^\| `--.*?\|", table, re.MULTILINE))))
    tests = re.findall(r"`((?:unit|parity|end_to_end)/[\w/]+\.py)`", table)
    assert tests
    for named in tests:
        assert (ROOT / "tests" / named).is_file(), named
