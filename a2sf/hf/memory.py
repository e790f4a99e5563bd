"""How many tokens there is memory for: in a pass of a model, and in the caches of texts that are generated.

Numbers follow from the model's configuration and from the memory that is free once it is loaded. They are rough: where a
GPU's memory does not suffice after all, passes are halved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from a2sf.compat.transformers import is_spread
from a2sf.engine.kernels.dense import CHUNK
from a2sf.engine.kernels.gpu.plan import SCRATCH
from a2sf.engine.tree import WORTHWHILE
from a2sf.hf.calls.logits import ROWS
from a2sf.hf.devices import devices_of, input_device
from a2sf.hf.loading import kv_heads_of

PACK_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Computed tokens per forward pass where `batch_size` is auto and the memory is not known."""
MOST_TOKENS = {"cpu": PACK_TOKENS["cpu"], "cuda": 65536}
"""However much memory there is: a sweep can be interrupted between passes only."""
LEAST_TOKENS = {"cpu": 64, "cuda": 1024}
"""However little memory there is."""
SHARE_OF_PASS = 0.5
"""Of the memory that is free, the part that a pass may take."""
SHARE_OF_CACHES = 0.25
"""The same of the caches of texts, which are held while passes read further prompts."""
WIDE = 4
"""Bytes of a number in the engine, which computes in float32."""


class ModelSizes(NamedTuple):
    """Of a model: width of the layers, of their feed-forward part, query heads, KV heads, and the size of a head."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int

    @staticmethod
    def of(config: Any) -> ModelSizes:
        """As far as a configuration states them; the usual proportions elsewhere."""
        text = config.get_text_config()
        hidden = _stated(text, "hidden_size", 4096)
        heads = _stated(text, "num_attention_heads", 1)
        head = _stated(text, "head_dim", max(1, hidden // heads))
        return ModelSizes(
            hidden, _stated(text, "intermediate_size", 4 * hidden), heads, kv_heads_of(config) or heads, head
        )

    @property
    def cached(self) -> int:
        """Bytes of a cached token in a layer: key and value, and for each KV head a score and a position."""
        return self.kv_heads * (2 * self.head * WIDE + 16)


def _stated(config: Any, name: str, otherwise: int) -> int:
    """A number of a configuration, the largest where layers differ; `otherwise` where it states none."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple):
        value = max((n for n in value if isinstance(n, int)), default=None)
    return value if isinstance(value, int) and value > 0 else otherwise


def free_bytes(model: PreTrainedModel) -> int:
    """Memory that is free for what a model computes: of the GPU, of the fullest of its GPUs, or of the machine."""
    device = input_device(model)
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    numbers = [int(d.removeprefix("cuda:")) for d in devices_of(model) if d.removeprefix("cuda:").isdecimal()]
    return min(_free_of_gpu(torch.device("cuda", n)) for n in numbers) if numbers else _free_of_gpu(device)


def _free_of_gpu(device: torch.device) -> int:
    # torch reuses what it has reserved
    reused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reused


def pass_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes that a pass takes: for each token, and besides. What the layers compute is freed layer by layer."""
    config, size = model.config, max(2, model.dtype.itemsize)  # quantized weights are not what is computed with
    sizes, text = ModelSizes.of(config), config.get_text_config()
    # the layer's input, its normalized input, the attention's output and the sum; gate, up and their product
    layer = (4 * sizes.hidden + 3 * sizes.intermediate * _stated(text, "num_experts_per_tok", 1)) * size
    # queries, keys, values and the output, as the model has them and packed twice by the engine
    numbers = 2 * (sizes.heads + sizes.kv_heads) * sizes.head
    engine = numbers * (size + 2 * WIDE) + sizes.cached + CHUNK * (1 + WIDE)  # and a mask, as bool and added to logits
    # a column's logits, in float32 too, and their logarithms; where they cannot be computed in parts, of all tokens
    logits = _stated(text, "vocab_size", 2**17) * (size + 2 * WIDE)
    spread = is_spread(model)
    scratch = SCRATCH + WORTHWHILE * numbers * 2 * WIDE  # shares of attention, and padding that saves no batch
    on_gpu = input_device(model).type != "cpu"
    return layer + engine + (logits if spread else 0), scratch * on_gpu + ROWS * logits


def tokens_per_pass(model: PreTrainedModel) -> int:
    """Computed tokens of a pass that there is memory for: a power of two, so that a little more or less changes nothing."""
    kind = input_device(model).type
    kind = kind if kind in MOST_TOKENS else "cuda"
    each, besides = pass_bytes(model)
    fit = int(SHARE_OF_PASS * free_bytes(model) - besides) // each
    return min(MOST_TOKENS[kind], max(LEAST_TOKENS[kind], 1 << max(0, fit).bit_length() >> 1))


def tokens_in_caches(model: PreTrainedModel) -> int:
    """Tokens times layers that there is memory for in the caches of texts."""
    return int(SHARE_OF_CACHES * free_bytes(model) / ModelSizes.of(model.config).cached)
