"""The keys of a configuration, their types and meanings.

The values are in `conf/`. `a2sf run --help` and docs/reference/keys.md are made from the docstrings here. It imports
no model library, so that the help and the shell's completion start at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

NAMES = {"names": True}
"""Marks keys whose value is a name or a list of names, or true, false or null."""
SWITCH = {"switch": True}
"""Marks keys whose value is true or false, or null where that is the default. They are not typed as bool, because OmegaConf
would read any number as true."""
RENAMED = {"until": "early_stopping", "until.verdict": "early_stopping.significant"}
"""Keys of the previous version, and what they are called now; a group's name stands for all its keys."""


@dataclass
class BudgetConfig:
    """`budget`: how many tokens a layer may retain (`a2sf.policies.budget.Budget`).

    Attributes:
        ratio: share of the sequence, 0 < ratio <= 1; one number, or one per layer; 0.2 if neither it nor tokens is given
        tokens: number of tokens, instead of a ratio; one number, or one per layer
        base: the length that a ratio refers to: total (context + continuation - 1), context, or seen (the tokens read so
            far, so that the budget grows with the text)
    """

    ratio: Any = None
    tokens: Any = None
    base: str = "total"


@dataclass
class ScheduleConfig:
    """`schedule`: when tokens are evicted (`a2sf.policies.schedule.Schedule`).

    Attributes:
        when: step, every or prompt; null: step, or the only schedule that the policy supports
        every: for every, and for prompt with then=every: tokens between two evictions. 16 in the file `every`
        then: for prompt: keep (evict nothing after the cut), step, or every
        at: for prompt: cut after the prompt, or after the context that several questions share. `prompt` or `context`
            ([long texts](../long.md))
    """

    when: str | None = None
    every: Any = None
    then: str | None = None
    at: str | None = None


@dataclass
class ModelConfig:
    """`model`: which model, and how it is loaded (`a2sf.hf.loading.ModelSpec`).

    Attributes:
        path: hub id or the address of its page, directory, .gguf file, or pkg://package/file.gguf
        name: label in tables; the last part of the path if null
        dtype: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16, float64
        device: auto, cpu, cuda, cuda:N
        revision: branch, tag or commit on the hub
        trust_remote_code: run modelling code that comes with the weights
        adapter: a directory or hub id (owner/name@revision) of LoRA or other weights that peft adds to the model; null: none
        device_map: spread a large model: auto, balanced, balanced_low_0, sequential, or a JSON file of modules and devices.
            See [several GPUs](../gpu.md#several-gpus)
        add_bos_token: whether each text starts with the beginning-of-sequence token; null: as in the tokenizer's files
    """

    path: str = ""
    name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    revision: str = "main"
    trust_remote_code: Any = field(default=False, metadata=SWITCH)
    device_map: str | None = None
    add_bos_token: Any = field(default=None, metadata=SWITCH)
    adapter: str | None = None


@dataclass
class DataConfig:
    """`data`: where documents come from (`a2sf.tasks.spec.DataSpec`).

    Attributes:
        source: hub, or bundle (the installed data wheel)
        dir: a directory of Arrow, Parquet or JSON-lines files, instead of a source. `<task>/<split>.parquet`,
            `<dataset>/<name>/<split>/*.arrow` or `<task>.jsonl` ([documents of your own](../own.md#documents))
        split: which split is scored; null: the task's choice
        fewshot_split: split of the few-shot examples; null: the task's, else validation
        revision: branch, tag or commit of the data on the hub; its main branch if null
        cluster: field of a document, such as passage, whose text several documents share; statistics then count texts
        content: fingerprint of the documents; set by a sweep for its workers
    """

    source: str = "hub"
    dir: str | None = None
    split: str | None = None
    fewshot_split: str | None = None
    revision: str | None = None
    cluster: str | None = None
    content: str | None = None


@dataclass
class EarlyStoppingConfig:
    """`early_stopping`: when to stop before all documents are scored (`a2sf.sweep.stopping_rule.StoppingRule`).

    Attributes:
        pair: names of the two policies that are compared, such as [a2sf,h2o]; null: all documents are scored
        half_width: stop when the confidence interval of their difference is at most this many points to either side
        significant: stop also when the interval excludes zero; true if half_width is null
        confidence: probability that all intervals of a group contain the difference on all documents
        metric: name of a metric that each document has, with values from 0 to 1
    """

    pair: Any = field(default=None, metadata=NAMES)
    half_width: Any = None
    significant: Any = field(default=False, metadata=SWITCH)
    confidence: float = 0.95
    metric: str = "acc"


@dataclass
class PlanConfig:
    """`plan`: what the plan says about the differences that a sweep can detect.

    Attributes:
        flips: share of documents on which two systems differ; null: that of earlier results of the task, else 0.15. See
            [how many documents](../statistics.md#how-many-documents-do-i-need)
        detect: difference in points; the plan then says how many documents it needs
    """

    flips: Any = None
    detect: Any = None


@dataclass
class TrackerConfig:
    """`tracker`: where results are logged in addition (`a2sf.tracking.tracker.TrackerSpec`).

    Attributes:
        kinds: kind of each chosen file in tracker/: none, wandb or tensorboard
        project: W&B project
        entity: W&B user or team
        directory: folder of TensorBoard's files; null: runs/<sweep>/tensorboard
    """

    kinds: dict[str, str] = field(default_factory=dict)
    project: str = "a2sf"
    entity: str | None = None
    directory: str | None = None


@dataclass
class Config:
    """All keys of a run.

    Attributes:
        model: a file in model/
        policy: a file in policy/, or an installed policy; its settings are policy.<setting>
        schedule: a file in schedule/
        budget: how many tokens a layer may retain
        forgetting_factor: for policies that have one; one number in [0, 1], or one per layer; null: the policy's default
        tasks: demo, paper, long, long_generate, or a list such as [piqa,copa] of lm-eval's tasks and groups
        shots: few-shot examples before each document; null: 0, or the number that a group gives for its tasks. A document
            is never one of its own examples
        limit: documents of each task, the first ones; null: all
        chat_template: true, or the name of one of the tokenizer's templates: prompts are messages of a chat
        system_instruction: text before everything else in a prompt
        fewshot_as_multiturn: whether examples are turns of a chat (the default with a template) or in one turn
        gen_kwargs: settings of generation that replace a task's, such as gen_kwargs.max_gen_toks=32
        samples: answers that are drawn at random for each document; null: one, or as the task says. See
            [several answers](../generation.md#several-answers)
        enable_thinking: given to the chat template of a model that can think or not; null: the template's default
        think_end_token: the token that ends a model's thinking, such as "</think>", or its number. See
            [models that think](../generation.md#models-that-think)
        task_args: arguments of tasks whose documents are made by code; task_args.<task>.<name> for one task or group
        include_path: a folder with your task definitions, which are then found by name
        log_samples: store prompts, choices and generated texts; false: only numbers and hashes. See
            [for users of lm-eval](../lm_eval.md)
        data: a file in data/
        batch_size: sequences per forward pass, or auto. `auto` fills as many tokens as there is memory for: on a
            CPU at most 1,024, on a GPU 1,024 to 65,536
        seed: of the few-shot examples, and of answers that are drawn
        backend: implementation of the eviction: auto, reference, torch, numba, triton. A rule that a compiled kernel does
            not support runs in torch
        tracker: a file in tracker/, or several: [wandb,tensorboard]. See [trackers](../trackers.md)
        sweep_name: folder of the results
        runs_dir: where sweeps' folders are
        plan_only: print what would run and how long it may take, and stop
        plan: what the plan says about the differences that a sweep can detect
        trace: number of documents of each cell whose evictions are recorded in traces.npz. See
            [traces](../generation.md#traces)
        full_texts: of tasks that generate text, read the full cache's texts under each system. See
            [texts](../generation.md#what-eviction-does-to-text)
        early_stopping: when to stop before all documents are scored. See
            [early stopping](../statistics.md#early-stopping)
        checkpoint: seconds of work after which the answers of unfinished cells are saved
        group: cells computed together with this one; set by a sweep for its workers
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    policy: Any = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    forgetting_factor: Any = None
    tasks: Any = field(default="demo", metadata=NAMES)
    shots: int | None = None
    limit: int | None = None
    chat_template: Any = field(default=False, metadata=NAMES)
    system_instruction: str | None = None
    fewshot_as_multiturn: Any = field(default=None, metadata=SWITCH)
    gen_kwargs: Any = None
    samples: int | None = None
    enable_thinking: Any = field(default=None, metadata=SWITCH)
    think_end_token: str | None = None
    task_args: Any = None
    include_path: str | None = None
    log_samples: Any = field(default=True, metadata=SWITCH)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: Any = "auto"
    seed: int = 1234
    backend: str = "auto"
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sweep_name: str = "single"
    runs_dir: str = "runs"
    plan_only: Any = field(default=False, metadata=SWITCH)
    plan: PlanConfig = field(default_factory=PlanConfig)
    trace: int = 0
    full_texts: Any = field(default=False, metadata=SWITCH)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    until: Any = None  # in files; the command line's is renamed when it is read
    checkpoint: float = 60.0
    group: str | None = None


def groups() -> dict[str, type]:
    """Groups of keys: name -> dataclass."""
    parts = vars(Config())
    return {name: type(part) for name, part in parts.items() if dataclasses.is_dataclass(part)}


def is_key(key: str) -> bool:
    """Whether a configuration has that key, or a group of keys of that name."""
    return _field(key) is not None


def renamed(key: str) -> str:
    """What a key of the previous version is called now; any other key as it is."""
    if key in RENAMED:
        return RENAMED[key]
    group, dot, name = key.partition(".")
    return f"{RENAMED.get(group, group)}{dot}{name}"


def holds_text(key: str) -> bool:
    """Whether a key's value is text, even if it looks like a number."""
    found = _field(key)
    return found is not None and str(found.type).startswith("str")


def holds_names(key: str) -> bool:
    """Whether a key's value is text, unless it is true, false or null."""
    found = _field(key)
    return found is not None and "names" in found.metadata


def switches(cls: type) -> dict[str, bool]:
    """The keys of a configuration, or of a group of its keys, that are true or false -> whether they may be null."""
    return {f.name: f.default is None for f in dataclasses.fields(cls) if "switch" in f.metadata}


def may_be_null(key: str) -> bool:
    """Whether a key's value may be null."""
    found = _field(key)
    return found is not None and "None" in str(found.type)


def may_be_list(key: str) -> bool:
    """Whether a key's value may be a list."""
    found = _field(key)
    return found is not None and str(found.type) == "Any" and "switch" not in found.metadata


def _field(key: str) -> dataclasses.Field[Any] | None:
    *group, name = key.split(".")
    cls = groups().get(".".join(group)) if group else Config
    return None if cls is None else next((f for f in dataclasses.fields(cls) if f.name == name), None)


def register() -> None:
    """Make the schema known to Hydra as `schema`, and installed policies as choices of `policy`."""
    from hydra.core.config_store import ConfigStore

    from a2sf.policies.find import configurations

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, node in configurations().items():
        store.store(group="policy", name=name, node=node)
