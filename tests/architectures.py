"""Architectures on small random models, and what is known of each: the table of docs/models.md.

`python -m tests.architectures` prints the table; a test compares each row with what the model does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.models import CAPPED, COMMON, CONFIGS, EXPERTS, LLAMA_LIKE, WINDOWS, enlarge

EIGHT = {**LLAMA_LIKE, "head_dim": 8}
GPT2 = {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT = {
    **LLAMA_LIKE,
    **ROUTED,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 32,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
IMAGE = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def wrapped(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A multimodal model around a text model."""
    return {"text_config": text, "vision_config": VISION, **more}


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row.

    Attributes:
        name: as the table has it.
        kind: transformers' `model_type`.
        settings: of a small model.
        refused: why it cannot be scored, part of the message; None: it can.
        undecodable: why it cannot be generated with, part of the message; None: it can.
        note: what else the table says.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=lambda: LLAMA_LIKE)
    refused: str | None = None
    undecodable: str | None = None
    note: str = ""

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **self.settings)
        multimodal = "vision_config" in self.settings
        model = (AutoModelForImageTextToText if multimodal else AutoModelForCausalLM).from_config(config)
        return enlarge(model)


TEXT_ONLY = "text only"
SOFTCAP, SINKS = "softcap", "learned attention sinks"
GLOBAL = "the policy acts on its global layers"
SHOWN = {
    "llama": "Llama (and all that use its classes: SmolLM2, Yi, InternLM3, EXAONE 3)",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3, Phi-4",
    "gpt_neox": "GPT-NeoX (Pythia)",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "gemma3": "Gemma 3 (text)",
    "gemma2": "Gemma 2",
    "gpt_oss": "GPT-OSS",
}
NOTES = {
    "mistral": "sequences may not outgrow its window",
    "gemma3": GLOBAL,
    "gemma2": f"{SOFTCAP}; {GLOBAL}",
    "gpt_oss": f"{SINKS}; {GLOBAL}",
}

SUPPORTED = [
    *(Architecture(SHOWN[k], kind, settings, note=NOTES.get(k, "")) for k, (kind, settings) in CONFIGS.items()),
    Architecture("OLMo", "olmo"),
    Architecture("OLMo 2", "olmo2"),
    Architecture("OLMo 3", "olmo3", {**LLAMA_LIKE, **WINDOWS}, note=GLOBAL),
    Architecture("Phi-1, Phi-2", "phi"),
    Architecture("Gemma", "gemma", EIGHT),
    Architecture(
        "Gemma 3n (text)",
        "gemma3n_text",
        {
            **EIGHT,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
        note="layers that share keys and values evict them separately",
    ),
    Architecture("Cohere", "cohere"),
    Architecture("Cohere 2", "cohere2", {**LLAMA_LIKE, **WINDOWS}, note=GLOBAL),
    Architecture("Granite", "granite"),
    Architecture("StableLM", "stablelm"),
    Architecture("Starcoder2", "starcoder2"),
    Architecture("GLM", "glm", EIGHT),
    Architecture("GLM-4", "glm4", EIGHT),
    Architecture("SmolLM3", "smollm3", {**LLAMA_LIKE, "no_rope_layers": [1, 0, 1]}),
    Architecture("EXAONE 4", "exaone4", {**LLAMA_LIKE, **WINDOWS}, note=GLOBAL),
    Architecture("HunYuan", "hunyuan_v1_dense", EIGHT),
    Architecture("Seed-OSS", "seed_oss", EIGHT),
    Architecture("Nemotron", "nemotron"),
    Architecture("Ernie 4.5", "ernie4_5"),
    Architecture("Arcee", "arcee"),
    Architecture("Apertus", "apertus"),
    Architecture("Helium", "helium", EIGHT),
    Architecture("Persimmon", "persimmon"),
    Architecture("GPT-J", "gptj", {**GPT2, "rotary_dim": 4}),
    Architecture("CodeGen", "codegen", {**GPT2, "rotary_dim": 4}),
    Architecture("GPT-BigCode (Starcoder)", "gpt_bigcode", GPT2),
    Architecture("DiffLlama", "diffllama", note="each half of its values has a cache of its own"),
    Architecture("Mixtral", "mixtral", {**LLAMA_LIKE, **EXPERTS}),
    Architecture("Qwen2-MoE", "qwen2_moe", {**LLAMA_LIKE, **QWEN_EXPERTS, "shared_expert_intermediate_size": 16}),
    Architecture("Qwen3-MoE", "qwen3_moe", {**EIGHT, **QWEN_EXPERTS}),
    Architecture("OLMoE", "olmoe", {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Phi-3.5-MoE", "phimoe", {**LLAMA_LIKE, **EXPERTS}),
    Architecture("GraniteMoE", "granitemoe", {**LLAMA_LIKE, **EXPERTS}),
    Architecture(
        "Ernie 4.5 MoE",
        "ernie4_5_moe",
        {**LLAMA_LIKE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    ),
    Architecture("GLM-4.5", "glm4_moe", {**EIGHT, **ROUTED}),
    Architecture("HunYuan-MoE", "hunyuan_v1_moe", {**EIGHT, "num_experts": 4, "moe_topk": 2}),
    Architecture("MiniMax-M2", "minimax_m2", {**EIGHT, **EXPERTS}),
    Architecture("JetMoE", "jetmoe", {**LLAMA_LIKE, **EXPERTS, "kv_channels": 8}),
    Architecture("DeepSeek-V2", "deepseek_v2", LATENT, note="its keys and values are cached, not their latents"),
    Architecture("DeepSeek-V3", "deepseek_v3", LATENT, note="its keys and values are cached, not their latents"),
    Architecture(
        "LLaVA", "llava", wrapped({"model_type": "llama", **LLAMA_LIKE}, image_token_index=90), note=TEXT_ONLY
    ),
    Architecture(
        "Mistral 3",
        "mistral3",
        wrapped({"model_type": "mistral", **LLAMA_LIKE}, image_token_index=90),
        note=TEXT_ONLY,
    ),
    Architecture("Qwen2-VL", "qwen2_vl", wrapped({**LLAMA_LIKE, **MROPE}, **IMAGE), note=TEXT_ONLY),
    Architecture("Qwen2.5-VL", "qwen2_5_vl", wrapped({**LLAMA_LIKE, **MROPE}, **IMAGE), note=TEXT_ONLY),
    Architecture(
        "SmolVLM, Idefics3",
        "smolvlm",
        wrapped({"model_type": "llama", **LLAMA_LIKE}, image_token_id=90),
        note=TEXT_ONLY,
    ),
    Architecture(
        "Gemma 3", "gemma3", wrapped({**EIGHT, **WINDOWS}, image_token_id=90, mm_tokens_per_image=4), note=TEXT_ONLY
    ),
    Architecture(
        "Whisper's decoder",
        "whisper",
        {
            **COMMON,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "max_target_positions": 128,
        },
    ),
    Architecture("VaultGemma", "vaultgemma", {**EIGHT, **WINDOWS, **CAPPED}, note=f"{SOFTCAP}; {GLOBAL}"),
    Architecture("MiMo-V2-Flash", "mimo_v2_flash", {**EIGHT, **WINDOWS, **EXPERTS}, note=f"{SINKS}; {GLOBAL}"),
    Architecture("Granite with sinks", "granite_swa", {**EIGHT, **WINDOWS}, note=f"{SINKS}; {GLOBAL}"),
    Architecture("GraniteMoE with sinks", "granitemoe_swa", {**EIGHT, **WINDOWS, **EXPERTS}, note=f"{SINKS}; {GLOBAL}"),
    Architecture("Flint", "flint", {**EIGHT, **EXPERTS}, note=SINKS),
]
WITH_SOFTMAX = [of for of in SUPPORTED if of.note.startswith((SOFTCAP, SINKS))]
"""Those whose attention is not a plain softmax."""

OUT_OF_REACH = "has an attention of its own that transformers' AttentionInterface does not reach"
REFUSED = [
    Architecture(
        "Llama 4",
        "llama4_text",
        {**EIGHT, **EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
        "layers that attend only within chunks of the text",
    ),
    Architecture("Doge", "doge", refused="builds an attention mask of its own"),
    Architecture(
        "LFM2",
        "lfm2",
        {**LLAMA_LIKE, "layer_types": ["conv", "full_attention", "conv"]},
        "layers that are convolutions",
    ),
    Architecture("Jamba", "jamba", refused="layers that keep a recurrent state"),
    Architecture(
        "Falcon-H1",
        "falcon_h1",
        {**LLAMA_LIKE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        "layers that keep a recurrent state",
    ),
    Architecture("Qwen3-Next", "qwen3_next", {**LLAMA_LIKE, **QWEN_EXPERTS}, "layers that keep a recurrent state"),
    Architecture(
        "MiniMax",
        "minimax",
        {**EIGHT, **EXPERTS, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        "layers that keep a recurrent state",
    ),
    Architecture(
        "Mamba", "mamba", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2}, "layers that keep a recurrent state"
    ),
    Architecture(
        "PaliGemma",
        "paligemma",
        wrapped(
            {"model_type": "gemma", **EIGHT},
            image_token_index=90,
            projection_dim=32,
        )
        | {"vision_config": {"model_type": "siglip_vision_model", **VISION}},
        "is not causal",
    ),
    Architecture("BERT", "bert", refused="is not causal"),
    Architecture(
        "Falcon",
        "falcon",
        {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        OUT_OF_REACH,
    ),
    Architecture("BLOOM", "bloom", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}, OUT_OF_REACH),
    Architecture("MPT", "mpt", {**COMMON, "d_model": 32, "n_layers": 2, "n_heads": 4}, OUT_OF_REACH),
    Architecture(
        "GPT-Neo",
        "gpt_neo",
        {**COMMON, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        OUT_OF_REACH,
    ),
    Architecture(
        "XGLM", "xglm", {**COMMON, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, OUT_OF_REACH
    ),
]


SCORED_ONLY = "it can be scored, not generated with"
UNDECODABLE = [
    Architecture("Dory", "dory", {**EIGHT, "sliding_window": 64}, undecodable=SCORED_ONLY),
]


def row(of: Architecture) -> str:
    """Its line of the table."""
    plain = (of.refused or "").replace("\\", "")
    plain = f"has {plain}" if plain.startswith("layers ") else plain
    scoring, decoding = ("no", "no") if of.refused else ("yes", "no" if of.undecodable else "yes")
    return f"| {of.name} | `{of.kind}` | {scoring} | {decoding} | {plain or of.undecodable or of.note} |"


def table() -> str:
    """The table of docs/models.md."""
    head = "| model | `model_type` | scoring | generating | note |\n|---|---|---|---|---|"
    return "\n".join([head, *map(row, [*SUPPORTED, *UNDECODABLE, *REFUSED])])


if __name__ == "__main__":
    print(table())
