"""Small random models of many architectures, float32 on the CPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
"""Where tests run that any device must pass."""
COMMON = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CAPPED = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 1}
"""A softcap that matters."""
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    }
}

CONFIGS = {
    "llama": ("llama", LLAMA_LIKE),
    "mistral": ("mistral", {**LLAMA_LIKE, "sliding_window": 64}),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "phi3": ("phi3", {**LLAMA_LIKE, "original_max_position_embeddings": 256}),
    "gpt_neox": (
        "gpt_neox",
        {
            **COMMON,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "gpt2": ("gpt2", {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "opt": (
        "opt",
        {
            **COMMON,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **LLAMA_LIKE,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": ("gemma2", {**LLAMA_LIKE, "head_dim": 8, **WINDOWS, **CAPPED}),
    # all experts for every token: in bfloat16 rounding would choose between them
    "gpt_oss": ("gpt_oss", {**LLAMA_LIKE, "head_dim": 8, **WINDOWS, **EXPERTS, "num_experts_per_tok": 4, **YARN}),
}
NO_SDPA = ("gemma2", "gpt_oss")
"""Those whose attention is more than torch's own computes."""


def small(name: str, seed: int = 0, **more: object) -> PreTrainedModel:
    """A random model of architecture `name`, with weights large enough that attention matters."""
    kind, settings = CONFIGS[name]
    return random_model(kind, seed, **{**settings, **more})


@cache
def shared(name: str) -> PreTrainedModel:
    """`small(name)`, made (and its decoding proved) once: for tests that only read it."""
    return small(name)


@cache
def shared_double(name: str) -> PreTrainedModel:
    """The same in float64."""
    return small(name).double()


def random_model(kind: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    return enlarge(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)))


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights large enough that attention matters, ready to be read."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            elif name.endswith("sinks"):  # learned sinks, which are next to 0
                parameter.normal_(mean=2.0)
    return model.float().eval()


def write_piqa(file: Path, rows: int = 8, label: int = 0) -> Path:
    """Documents of piqa's form: `Goal number i`, the right and the wrong solution."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"goal": f"Goal number {i}", "sol1": f"right {i}", "sol2": f"wrong {i}", "label": label} for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file.parent
