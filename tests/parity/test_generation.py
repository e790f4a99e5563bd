"""Reading a sequence in one pass, in chunks and token by token through the bounded cache are the same thing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from a2sf import Schedule
from a2sf.engine.kernels import attend
from a2sf.hf.attention import Plan, attached, mixes_windows, running
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.projection import projections_for
from a2sf.hf.rotary import rotary_for
from a2sf.hf.scope import pruning
from a2sf.hf.settings import retention_of
from a2sf.policies.base import Policy
from a2sf.policies.budget import Budget
from tests.models import shared, shared_double
from tests.policies import cases, label, tiered, ties

# of each policy the instance whose settings matter in so few tokens
ALL = {(p.name, label(s)): (p, s) for p, s in cases() if p.causal}.values()
# where text is generated tokens come twice, and rounding decides between equal keys
NOT_TIED = [(p, s) for p, s in ALL if not ties(type(p))]
UNTIED = pytest.mark.parametrize(("policy", "schedule"), tiered(NOT_TIED, each=0), ids=label)
ARCHITECTURES = {"llama": False, "opt": False, "qwen3": True, "gemma3": True, "gemma2": False, "gpt_oss": False}
"""And whether they give all keys one length, so that rounding decides under a rule that only looks at that."""
TOKENS = 24
PROMPTS = [14, 9]
BUDGET = Budget(tokens=7)
BUDGETS = [("llama", BUDGET), ("opt", Budget(ratio=0.3, base="context")), ("gpt2", Budget(ratio=0.3))]


def fits(policy: Policy, name: str, normed: bool = False) -> bool:
    """Whether a policy's choice does not depend on rounding there; one that sees unrotated keys needs rotary embeddings."""
    return not (normed and ties(type(policy))) and not (policy.unrotated and name in ("opt", "gpt2"))


def ids_for(rows: int = 2, length: int = TOKENS, seed: int = 0) -> Tensor:
    """Tokens that come once in a row: equal ones have equal keys but for rounding, which then decides who goes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([3 + torch.randperm(94, generator=generator)[:length] for _ in range(rows)])


@dataclass
class Noted(Plan):
    """A pass that notes of each layer when every position went, int64 [B, K, T], T for never."""

    went: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer, query, key, value, options, window):
        options = replace(self.options(layer, options), trace=True)
        out = attend(query, key, value, self.segments(layer, window), options, backend=self.backend)
        self.reached.add(layer)
        rows, heads, tokens = out.evicted.shape
        evicted_at = torch.full((rows, heads, tokens + 1), tokens)
        evicted_at.scatter_(
            2,
            torch.where(out.evicted >= 0, out.evicted, tokens).long(),
            torch.arange(tokens).expand(evicted_at[..., :-1].shape),
        )
        row, head, column, position = out.cuts.unbind(1)
        evicted_at[row, head, position] = column
        self.went[layer] = evicted_at[..., :tokens]
        return out.output


def one_pass(
    model, policy: Policy, schedule: Schedule, ids: Tensor, prompts: list[int], budget: Budget = BUDGET
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, vocabulary] and, per layer, when every position went [B, K, T]."""
    rows, length = ids.shape
    layers = model.config.get_text_config().num_hidden_layers
    held = budget if policy.uses_budget else None
    kept = [retention_of(policy, held, length, prompt, layers, schedule) for prompt in prompts]
    plan = Noted.of_rows(
        [length] * rows,
        [0] * rows,
        lambda row, layer: kept[row][layer],
        layers,
        policy_on_sliding=not mixes_windows(model.config),
        schedule=schedule,
        prompt=prompts.__getitem__,
        rotary=rotary_for(model, policy),
        projections=projections_for(model, policy),
    )
    with torch.no_grad(), attached(model), running(plan):
        return model(ids, use_cache=False).logits, [plan.went[i] for i in range(layers)]


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-4 * max(1.0, float(b.abs().max()))


def check_kept(cache: PrunedCache, evicted_at: list[Tensor], step: int) -> None:
    """Every layer's, row's and head's kept positions after `step` are those of the one pass."""
    at = torch.arange(evicted_at[0].shape[-1])
    for layer, of_layer in enumerate(evicted_at):
        positions = cache.state(layer).positions
        kept = torch.zeros(*of_layer.shape[:2], len(at) + 1, dtype=torch.bool)
        kept.scatter_(2, positions.where(positions >= 0, len(at)), True)
        assert torch.equal(kept[..., :-1], (at <= step) & (of_layer > step))


@pytest.mark.parametrize(
    ("policy", "schedule", "name"),
    tiered(((p, s, a) for a, normed in ARCHITECTURES.items() for p, s in ALL if fits(p, a, normed)), each=1),
    ids=label,
)
def test_token_by_token_equals_one_pass(policy, schedule, name):
    model, ids = shared(name), ids_for()
    expected, evicted_at = one_pass(model, policy, schedule, ids, PROMPTS)
    cache = PrunedCache(model, policy, BUDGET, schedule=schedule, context_tokens=PROMPTS)
    with torch.no_grad():
        for t in range(TOKENS):
            close(model(ids[:, t : t + 1], cache=cache).logits[:, 0], expected[:, t])
            check_kept(cache, evicted_at, t)


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox", "gpt2", "mistral"])
def test_other_architectures(name):
    for policy, schedule in ALL:
        if policy.name in ("a2sf", "snapkv", "roco"):
            test_token_by_token_equals_one_pass(policy, schedule, name)


@pytest.mark.parametrize(
    ("policy", "schedule", "chunks"),
    tiered(((p, s, chunks) for p, s in ALL for chunks in ([20], [1, 5, 3, 11], [9, 8, 2])), each=1, turn=1),
    ids=label,
)
def test_a_prompt_at_once_or_in_chunks_then_token_by_token(policy, schedule, chunks):
    model, ids = shared("llama"), ids_for()
    expected, evicted_at = one_pass(model, policy, schedule, ids, PROMPTS)
    trace = len(chunks) == 3
    cache, at = PrunedCache(model, policy, BUDGET, schedule=schedule, context_tokens=PROMPTS, trace=trace), 0
    with torch.no_grad():
        for size in [*chunks, *[1] * (TOKENS - sum(chunks))]:
            close(model(ids[:, at : at + size], cache=cache).logits, expected[:, at : at + size])
            at += size
            check_kept(cache, evicted_at, at - 1)
    for i, of_layer in enumerate(evicted_at if trace else ()):
        noted = torch.full_like(of_layer, TOKENS)
        row, head, step = (cache.evicted(i) >= 0).nonzero(as_tuple=True)
        noted[row, head, cache.evicted(i)[row, head, step].long()] = step
        row, head, step, position = cache.cuts(i).unbind(1)
        noted[row, head, position] = step
        assert torch.equal(noted, of_layer)


@pytest.mark.parametrize(
    ("policy", "schedule", "name", "budget"),
    tiered(((p, s, *more) for p, s in NOT_TIED for more in BUDGETS if fits(p, more[0])), each=0, turn=3),
    ids=label,
)
def test_left_padding_never_enters_the_cache_and_each_row_has_its_own_budget(policy, schedule, name, budget):
    model, ids = shared(name), ids_for(rows=3)
    lengths, more = [12, 20, 5], 6
    mask = torch.zeros(3, 20, dtype=torch.long)
    padded = torch.zeros(3, 20, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, 20 - n :] = 1
        padded[row, 20 - n :] = ids[row, :n]
    common = {"max_new_tokens": more, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    settings = {"schedule": schedule, "max_new_tokens": more}
    cache = PrunedCache(model, policy, budget, **settings)
    together = model.generate(padded, attention_mask=mask, cache=cache, **common)
    for row, n in enumerate(lengths):
        own = PrunedCache(model, policy, budget, **settings)
        alone = model.generate(ids[row : row + 1, :n], cache=own, **common)
        assert together.sequences[row, 20:].tolist() == alone.sequences[0, n:].tolist()
        for a, b in zip(together.logits, alone.logits, strict=True):
            close(a[row], b[0])
        for layer in range(3):
            a, b = cache.state(layer).positions[row], own.state(layer).positions[0]
            assert [x[x >= 0].tolist() for x in a] == [x[x >= 0].tolist() for x in b]


@UNTIED
def test_generate_chooses_what_scoring_the_same_text_would(policy, schedule):
    model, ids = shared("llama"), ids_for(rows=2, length=15)
    cache = PrunedCache(model, policy, BUDGET, schedule=schedule)
    text = model.generate(ids, cache=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected, evicted_at = one_pass(model, policy, schedule, text, [15, 15])
    assert torch.equal(text[:, 15:], expected[:, 14:-1].argmax(-1))
    check_kept(cache, evicted_at, 25)  # the last token was chosen, not read


@UNTIED
def test_beams_with_a_cache_equal_beams_without(policy, schedule):
    """Beam search that reorders the cache finds the sequences that a search without a cache finds."""
    model, ids = shared("llama"), ids_for(rows=2, length=15)
    common = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached = model.generate(ids, cache=PrunedCache(model, policy, BUDGET, schedule=schedule), **common)
    with pruning(model, policy, BUDGET, schedule=schedule, context_tokens=[15, 15]):
        anew = model.generate(ids, use_cache=False, **common)
        supplied = model.generate(ids, **common)
    assert torch.equal(cached, anew)
    assert torch.equal(cached, supplied)


@UNTIED
def test_sampling_with_a_cache_equals_sampling_without(policy, schedule):
    model, ids = shared("qwen2"), ids_for(rows=2, length=15)
    common = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3, "top_k": 5}
    torch.manual_seed(3)
    cached = model.generate(ids, cache=PrunedCache(model, policy, BUDGET, schedule=schedule), **common)
    torch.manual_seed(3)
    with pruning(model, policy, BUDGET, schedule=schedule, context_tokens=15):
        assert torch.equal(cached, model.generate(ids, use_cache=False, **common))


@UNTIED
def test_a_conversation_continues_in_the_cache_of_its_last_turn(policy, schedule):
    model, ids, more = shared("llama"), ids_for(rows=2, length=12), ids_for(rows=2, length=9, seed=1)
    cache = PrunedCache(model, policy, BUDGET, schedule=schedule)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = model.generate(ids, cache=cache, **settings)
    second = model.generate(torch.cat([first, more], 1), cache=cache, **settings)
    expected, evicted_at = one_pass(model, policy, schedule, second, [12, 12])
    assert torch.equal(second[:, -6:], expected[:, -7:-1].argmax(-1))
    check_kept(cache, evicted_at, second.shape[1] - 2)


@pytest.mark.parametrize(
    ("policy", "schedule", "side"),
    tiered(((p, s, side) for p, s in ALL for side in ("left", "right")), each=0),
    ids=label,
)
def test_plain_calls_inside_pruning_read_padded_rows_as_if_alone(policy, schedule, side):
    model, ids = shared("llama"), ids_for()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 11) if side == "left" else slice(19, None)] = 0
    found = []
    for keep in (False, True):
        with torch.no_grad():
            with pruning(model, policy, Budget(ratio=0.3), schedule=schedule, context_tokens=PROMPTS):
                together = model(ids, attention_mask=mask, use_cache=keep).logits
            found.append(together[mask.bool()])
            with pruning(model, policy, Budget(ratio=0.3), schedule=schedule, context_tokens=PROMPTS[1]):
                alone = model(ids[1:, mask[1].bool()], use_cache=keep).logits[0]
        close(together[1, mask[1].bool()], alone)
    close(*found)  # a cache counts what its first call reads, as a call without one does


@pytest.mark.parametrize(
    ("policy", "schedule", "backend"),
    tiered(((p, s, backend) for p, s in ALL for backend in ("float64", "reference", "numba")), each=0, turn=2),
    ids=label,
)
def test_backends_and_float64(policy, schedule, backend):
    model, ids = shared("llama"), ids_for()
    if backend == "float64":
        model, backend = shared_double("llama"), "auto"
    expected, evicted_at = one_pass(model, policy, schedule, ids, PROMPTS)
    cache = PrunedCache(model, policy, BUDGET, schedule=schedule, context_tokens=PROMPTS, backend=backend, trace=True)
    order = [1, 0, 1]
    with torch.no_grad():
        close(model(ids[:, :10], cache=cache).logits, expected[:, :10])
        cache.batch_select_indices(torch.tensor(order))
        for t in range(10, TOKENS):
            if t == 20:  # one row is past its prompt from the 9th token on, the other from the 14th
                cache.load([cache.state(i) for i in range(3)])
            close(model(ids[order, t : t + 1], cache=cache).logits[:, 0], expected[order, t])
    check_kept(cache, [g[order] for g in evicted_at], TOKENS - 1)


@pytest.mark.full
def test_smollm2(smollm2):
    """The small real model: the same logits and kept sets, over all policies."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    ids = tokenizer("The keeper of the lighthouse counted ships that passed in night.", return_tensors="pt").input_ids
    prompt = ids.shape[1] - 3
    for policy, schedule in {p.name: (p, s) for p, s in ALL}.values():
        expected, evicted_at = one_pass(model, policy, schedule, ids, [prompt])
        cache = PrunedCache(model, policy, BUDGET, schedule=schedule)
        with torch.no_grad():
            close(model(ids[:, :prompt], cache=cache).logits, expected[:, :prompt])
            for t in range(prompt, ids.shape[1]):
                close(model(ids[:, t : t + 1], cache=cache).logits[:, 0], expected[:, t])
        check_kept(cache, evicted_at, ids.shape[1] - 1)
