"""Which model to run, and how: `ModelSpec`, and its commit on the hub (`pin`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from a2sf.errors import ConfigError
from a2sf.hf import devices
from a2sf.hf.files import adapter as adapters
from a2sf.hf.files.paths import ResolvedPath, understand
from a2sf.hub import snapshot as hub
from a2sf.hub.refusals import Wanted

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class ModelSpec:
    """Which model to run and how.

    Attributes:
        path: hub id, local directory, `.gguf` file (local, or `owner/name/file.gguf` on the hub), page of the hub, or
            `pkg://package/file.gguf` for one in an installed package. It has one spelling: `~`, a link or a slash at
            the end make no other model.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU) or a name in `DTYPES`.
        device: auto (a GPU if there is one) or a torch device.
        device_map: how the model is spread over devices, a name in `devices.MAPS` or a JSON file of modules and devices;
            None: it is on `device`.
        revision: branch, tag or commit on the hub; `pin` makes a commit of it.
        trust_remote_code: run modelling code that comes with the weights.
        add_bos_token: whether the tokenizer puts its beginning-of-sequence token before each text; None: as its files say.
        adapter: a directory or hub id (`owner/name@revision`) of weights that peft adds; None: none are, also where some
            lie beside the model. It has one spelling.

    Raises:
        ConfigError: if a value is not allowed.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str = "main"
    trust_remote_code: bool = False
    device_map: str | None = None
    add_bos_token: bool | None = None
    adapter: str | None = None
    source: ResolvedPath = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        source = understand(self.path, self.revision)
        for name, value in (("source", source), ("path", source.path), ("revision", source.revision)):
            object.__setattr__(self, name, value)
        if self.adapter is not None:
            object.__setattr__(self, "adapter", adapters.understand(self.adapter).value)
            if self.device_map is not None:
                why = "an adapter is added on one device only; merge it into the model first, or leave out model.device_map"
                raise ConfigError(adapters.KEY, self.adapter, why)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError("model.dtype", self.dtype, f"give auto or one of {', '.join(DTYPES)}")
        devices.check(self.device, self.device_map)

    @property
    def resolved_device(self) -> str:
        return devices.resolve(self.device, self.device_map)

    @property
    def resolved_dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "float32" if torch.device(self.resolved_device).type == "cpu" else "bfloat16"

    def check_here(self) -> None:
        """Refuse GPUs that this machine does not have.

        Raises:
            ConfigError: if the model is to use one.
        """
        devices.check_here(self.device, self.device_map)

    @property
    def pinned(self) -> bool:
        """Whether it cannot change: all but a branch or tag of the hub."""
        of_model = self.source.kind != "hub" or hub.is_commit(self.revision)
        return of_model and (self.added is None or self.added.pinned)

    @property
    def added(self) -> adapters.Adapter | None:
        """The adapter."""
        return None if self.adapter is None else adapters.understand(self.adapter)

    @property
    def wanted(self) -> Wanted:
        """What is requested of the hub."""
        return Wanted(self.source.repo, revision=self.revision, value=self.path)


def pin(spec: ModelSpec) -> tuple[ModelSpec, str | None]:
    """The model at the commit that its revision is now, and a note for the user if only the cache was available.

    Raises:
        ConfigError: if there is no such model or revision, or no way to find out.
    """
    if spec.pinned:
        return spec, None
    notes = []
    if spec.source.kind == "hub":
        commit, note = hub.commit_of(spec.wanted)
        spec, notes = dataclasses.replace(spec, revision=commit), [note]
    if spec.added is not None:
        added, note = spec.added.pin()
        spec, notes = dataclasses.replace(spec, adapter=added.value), [*notes, note]
    return spec, " ".join(filter(None, notes)) or None
