"""The tokens that kvpress's presses retain: kvpress.npz, and kvpress.json with versions. See `run.py`, which starts this.

Only what kvpress itself leaves in the cache is looked at: keys in the cut cache are found among the keys of the full one.
With names of cases after the two folders, only these are computed, and added to the stored ones.
"""

from __future__ import annotations

import inspect
import json
import sys
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path

import kvpress
import numpy as np
import torch
from kvpress.presses.kvzap_press import KVzapModel
from transformers import AutoModelForCausalLM, DynamicCache

RATIOS = (0.5, 0.75)  # exact in binary: kvpress rounds 1 - ratio down
THRESHOLDS = {0.5: 0.0, 0.75: 0.1}
"""Of the random gates' scores, instead of each ratio."""
WINDOW = 32
TEXTS: list[torch.Tensor] = []
"""The tokens [1, T] of each text."""


def presses(ratio: float, folder: Path) -> dict[str, kvpress.BasePress]:
    """The presses that have a counterpart, by the name of the case.

    Args:
        folder: that holds gates for `KVzapPress`.
    """

    def kvzap(kind: str, ratio: float = 0.0) -> kvpress.KVzapPress:
        press = kvpress.KVzapPress(ratio, model_type=kind)
        press.kvzap_model_name = f"nvidia/KVzap-{kind}-model"  # what it would fetch for a model in a folder `model`
        press.kvzap_model = KVzapModel.from_pretrained(folder / f"gates-{kind}")
        return press

    def snap() -> kvpress.SnapKVPress:
        return kvpress.SnapKVPress(ratio, window_size=WINDOW)

    return {
        "key_norm": kvpress.KnormPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "keydiff_block": kvpress.BlockPress(kvpress.KeyDiffPress(ratio), block_size=15),
        "tova": kvpress.TOVAPress(ratio),
        "streaming": kvpress.StreamingLLMPress(ratio),
        "mean_attention": kvpress.ObservedAttentionPress(ratio),
        "snapkv": snap(),
        "pyramidkv": kvpress.PyramidKVPress(ratio, window_size=WINDOW),
        "adakv": kvpress.AdaKVPress(snap()),
        "lagkv": kvpress.LagKVPress(ratio, lag_size=32),
        "curdkv": kvpress.CURPress(ratio),
        "chunkkv_key_norm": kvpress.ChunkKVPress(kvpress.KnormPress(ratio)),
        "chunkkv_keydiff": kvpress.ChunkKVPress(kvpress.KeyDiffPress(ratio)),
        "expected_attention": kvpress.ExpectedAttentionPress(ratio),
        "expected_attention_mean": kvpress.ExpectedAttentionPress(ratio, use_covariance=False),
        "criticalkv_snapkv": kvpress.CriticalKVPress(snap()),
        "criticalkv_tova": kvpress.CriticalKVPress(kvpress.TOVAPress(ratio)),
        "simlayerkv": kvpress.SimLayerKVPress(lazy_threshold=0.9, n_recent=64, n_initial=4),
        "kvzap_linear": kvzap("linear", ratio),
        "kvzap_mlp": kvzap("mlp", ratio),
        "kvzap_threshold": kvpress.DMSPress(kvzap("mlp"), threshold=THRESHOLDS[ratio], sliding_window_size=WINDOW),
    }


def read(model, ids: torch.Tensor, press: kvpress.BasePress | None = None, attention: str = "sdpa") -> DynamicCache:
    """The cache after a prompt; with `eager` attention, the press sees the attention weights."""
    model.set_attn_implementation(attention)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model) if press is not None else nullcontext():
        model(ids, past_key_values=cache, output_attentions=attention == "eager")
    return cache


@cache
def full_keys(model, text: int, attention: str) -> list[torch.Tensor]:
    """The keys [K, T, D] of each layer's full cache, in the arithmetic of the cut one, so that they are equal to the bit."""
    return [layer.keys[0] for layer in read(model, TEXTS[text], None, attention).layers]


def retained(model, text: int, press: kvpress.BasePress) -> np.ndarray:
    """bool [L, K, T]."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    attention = "eager" if isinstance(press, kvpress.ObservedAttentionPress) else "sdpa"
    cut = read(model, TEXTS[text], press, attention)
    masks = [layer.self_attn.masked_key_indices for layer in model.model.layers]
    found = []
    for mask, mine, whole in zip(masks, cut.layers, full_keys(model, text, attention), strict=True):
        kept = torch.zeros(whole.shape[:2], dtype=torch.bool)
        for head, keys in enumerate(mine.keys[0]):
            place = {row.tobytes(): t for t, row in enumerate(whole[head].numpy())}
            kept[head, [place[row.tobytes()] for row in keys.numpy()]] = True
        assert kept.sum() == mine.keys.shape[1] * mine.keys.shape[2]
        if mask is not None:  # divided among heads: the others stay in the cache, and attention leaves them out
            kept[mask[1], mask[2]] = False
        found.append(kept)
    return torch.stack(found).numpy()


def position_of_the_next_token(model) -> dict[str, int]:
    """Where a token after a cut prompt is placed, without and with positions given."""
    found = {"prompt": TEXTS[0].shape[1]}
    for name, more in (("without", {}), ("with", {"position_ids": torch.tensor([[found["prompt"]]])})):
        cut = read(model, TEXTS[0], kvpress.KnormPress(0.5))

        def note(module, args, kwargs, name=name) -> None:
            found[name] = int((kwargs.get("position_ids", args[-1]))[0, -1])

        hook = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(TEXTS[0][:, :1], past_key_values=cut, **more)
        hook.remove()
    return found


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    only = sys.argv[3:]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    TEXTS.extend(torch.tensor([ids]) for ids in json.loads((folder / "texts.json").read_text()))
    arrays = dict(np.load(out / "kvpress.npz")) if only else {}
    for i, ids in enumerate(TEXTS):
        assert not only or np.array_equal(arrays[f"text{i}"], ids[0].numpy()), "the stored cases are of other texts"
        arrays[f"text{i}"] = ids[0].numpy().astype(np.int32)
    for i in range(len(TEXTS)):
        for ratio in RATIOS:
            for name, press in presses(ratio, folder).items():
                if only and name not in only:
                    continue
                kept = retained(model, i, press)
                arrays[f"{name}/{i}/{ratio}"] = np.packbits(kept, axis=-1)
                print(name, i, ratio, kept.sum(-1).mean(), flush=True)
    np.savez_compressed(out / "kvpress.npz", **arrays)
    bases = (kvpress.BasePress, kvpress.ScorerPress)
    classes = {n: x for n in kvpress.__all__ if inspect.isclass(x := getattr(kvpress, n))}
    every = [n for n, x in classes.items() if issubclass(x, kvpress.BasePress) and x not in bases]
    said = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "shape": list(kept.shape[:2]),
        "presses": {name: repr(press) for name, press in presses(RATIOS[0], folder).items()},
        "all_presses": sorted(every),
        "next_token": position_of_the_next_token(model),
        "kept_of_300_at_0.8": int(sum(retained(model, 0, kvpress.KnormPress(0.8))[0, 0])),
    }
    (out / "kvpress.json").write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
