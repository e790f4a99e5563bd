"""A tokenizer for models whose requests are token ids, or whose words do not matter."""

from __future__ import annotations

import torch


class StandIn:
    """As much of a tokenizer as HFLM asks for: a letter is a token, and batches are padded on the left."""

    bos_token_id, eos_token_id, pad_token_id, vocab_size = 1, 2, 0, 97
    pad_token, eos_token, unk_token, bos_token = "<pad>", "<eos>", None, "<bos>"
    chat_template, name_or_path, is_fast, model_max_length = None, "stand-in", True, 256
    padding_side = "left"

    def __len__(self):
        return 97

    def __call__(self, texts, **_):
        rows = [self.encode(x) for x in texts]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        }

    def encode(self, text, **_):
        return [3 + ord(c) % 90 for c in text]

    def decode(self, ids, **_):
        return "".join(chr(65 + i % 26) for i in (ids if isinstance(ids, list) else [ids]))

    def batch_decode(self, rows, **_):
        return [self.decode(r.tolist() if hasattr(r, "tolist") else r) for r in rows]


class Letters(StandIn):
    """Whose texts hold by chance neither the name of a special token nor a mark."""

    def decode(self, ids, **_):
        return "".join(chr(200 + i) for i in (ids if isinstance(ids, list) else [ids]))
