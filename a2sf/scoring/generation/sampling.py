"""The next token of a text: the likeliest, or one that is drawn, always the same for a document, a draw and a seed.

A token is drawn by the Gumbel-max method: the largest sum of a log-probability and a random number from the Gumbel
distribution. A text's random numbers come from a generator of its own, one for each token and entry of the vocabulary. So a
text does not depend on what else is in the batch, and two systems with similar probabilities draw mostly the same token.
Source: Maddison, Tarlow and Minka (2014), A* Sampling, section 2, arXiv:1411.0030.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from a2sf.compat.transformers import Choosing
from a2sf.hf.devices import input_device


def generator_for(key: str, seed: int) -> np.random.Generator:
    """The random numbers of a text.

    Args:
        key: what identifies the text: the hash of its request, and the number of the draw.
        seed: of the sweep.
    """
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return np.random.Generator(np.random.Philox(np.frombuffer(digest, dtype=np.uint32).tolist()))


class Choice(Choosing):
    """How the next tokens are chosen: greedily, or drawn with random numbers that are a text's own.

    Args:
        settings: of generation, as transformers has them.
    """

    def __init__(self, model: PreTrainedModel, settings: dict[str, object]) -> None:
        super().__init__(model, settings, input_device(model))

    @property
    def greedy(self) -> bool:
        """Whether the next token is that of the largest logit, whatever came before."""
        return not self.changes_scores and not self.draws

    def next_token(
        self, logits: Tensor, tokens: Sequence[int], prompt: int, generator: np.random.Generator | None
    ) -> int:
        """The next token of a text.

        Args:
            logits: [1, vocabulary], what follows it.
            tokens: the text so far, of which the first `prompt` are the prompt.
            generator: its random numbers, if tokens are drawn.
        """
        scores = self.scores(logits.float(), tokens, prompt)
        if self.draws:
            assert generator is not None
            noise = torch.from_numpy(generator.standard_exponential(scores.shape[-1]))
            scores = scores.double() - noise.log().to(scores.device)  # minus its logarithm is a Gumbel number
        return int(scores.argmax(-1))
