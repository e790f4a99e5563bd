"""Thresholds: keys alone decide which tokens stay, how many stay is counted, and what is refused."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from a2sf import PrunedCache, attend, make_policy
from a2sf.engine.kernels import attend as attend_segments
from a2sf.engine.kernels.registry import REGISTRY
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import AttentionCall, Options, Segments
from a2sf.errors import ConfigError
from a2sf.policies.base import Retention
from a2sf.policies.rule import Cut, Head, Recording, Rule
from a2sf.policies.schedule import Schedule
from a2sf.scoring.counts import Counts
from tests.models import shared
from tests.parity.test_generation import ids_for, one_pass

B, H, K, T, D = 2, 4, 2, 30, 8
SCHEDULES = ["step", "every4", "prompt", "prompt-step", "prompt-every4"]
PROMPT = 13


def tensors(seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, h, T, D, generator=g, dtype=torch.float64) for h in (H, K, K))


def last_due(schedule: Schedule, t: int, window: int) -> int:
    """The last step before `t` after which tokens leave, -1 for none: docs/semantics.md, one step at a time."""
    begin = max(window, PROMPT if schedule.prompt else 0)
    every = schedule.spare + 1

    def due(step: int) -> bool:
        since = step + 1 - begin
        if schedule.prompt and schedule.then == "keep":
            return step + 1 == PROMPT
        return since >= 0 and since % every == 0

    return max((step for step in range(t) if due(step)), default=-1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize(("threshold", "window"), [(-2.8, 5), (-1e6, 5), (1.0, 1), (-2.6, 17)])
def test_the_output_is_attention_with_a_mask_that_follows_from_keys(name, backend, threshold, window):
    """alive(j, t): j has not left by the last step before t at which tokens leave."""
    query, key, value = tensors(3)
    schedule = Schedule.named(name)
    policy = make_policy("dms", threshold=threshold, window=window)
    output, state = attend(policy, query, key, value, schedule=schedule, prompt=PROMPT, backend=backend)
    stays = -key.norm(dim=-1) >= threshold  # [B, K, T]
    position = torch.arange(T)

    def alive(t: int) -> torch.Tensor:
        old = position <= last_due(schedule, t, window) - window
        return (stays | ~old) & (position <= t)

    mask = torch.stack([alive(t) for t in range(T)], 2)  # [B, K, T, T]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.repeat_interleave(H // K, 1), enable_gqa=True
    )
    torch.testing.assert_close(output, wanted)
    at_end = (stays | (position > last_due(schedule, T, window) - window)).tolist()
    found = [[[p in head for p in range(T)] for head in row] for row in state.positions.tolist()]
    assert found == at_end


def test_a_budget_with_a_threshold_evicts_no_token_that_reaches_it():
    """A policy of one's own: the smallest leave down to the budget, but none of at least the threshold."""
    query, key, value = tensors(5)
    rule = Rule(scored=False, bias=lambda k, v, p: k[..., 0], threshold=0.5)
    segments = Segments.of_rows(BatchRetention.of([Retention(budget=8, recent=2, rule=rule)] * B), torch.full((B,), T))
    out = attend_segments(query, key, value, segments, Options(1.0, return_state=True))
    assert out.state is not None
    for row in range(B):
        for head in range(K):
            held = [p for p in out.state.positions[row, head].tolist() if p >= 0]
            high = {p for p in range(T) if key[row, head, p, 0] >= 0.5}
            assert high <= set(held)
            assert len(held) == max(8, len(high | {T - 2, T - 1}))


def test_compiled_kernels_refuse_a_threshold_and_say_why():
    query, key, value = (x.float() for x in tensors(0))
    segments = Segments.of_rows(BatchRetention.of([make_policy("dms").keeps(4)] * B), torch.full((B,), T))
    call = AttentionCall(query, key, value, segments, Options(1.0))
    reasons = {b.name: b.supports(call) for b in REGISTRY if b.name in ("numba", "dense")}
    assert "threshold" in reasons["numba"]
    assert reasons["dense"] is not None
    assert all(b.new_cache(segments, key) is None for b in REGISTRY)


@pytest.mark.parametrize(
    "more",
    [
        {"threshold": float("nan")},
        {"heads": (Head(),), "threshold": 0.0},
        {"full_heads": (0,), "threshold": 0.0},
        {"cut": Cut(floor=0.5), "threshold": 0.0},
    ],
)
def test_a_rule_that_a_threshold_does_not_fit_is_refused(more):
    with pytest.raises(ValueError, match="threshold is a finite number"):
        Rule(**more)


def test_a_recording_has_no_threshold():
    with pytest.raises(ValueError, match="recording ranks nothing"):
        Rule(scored=False, threshold=1.0, recording=Recording(torch.zeros(1, 1)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": None}, r"policy\.threshold=None is not allowed: give a number"),
        ({"threshold": float("inf")}, r"policy\.threshold=inf is not allowed"),
        ({"window": 0}, r"policy\.window=0 is not allowed"),
        ({"by": "h2o"}, r"policy\.by=h2o is not allowed: its priorities are not fixed when a token is cached"),
        ({"by": "qfilter"}, r"policy\.by=qfilter is not allowed: its priorities are not fixed"),
        ({"by": "chunkkv"}, r"policy\.by=chunkkv is not allowed: chunkkv is built on another policy itself"),
        ({"by": "future"}, r"policy\.by=future is not allowed: future sees later tokens"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        make_policy("dms", **settings)


def test_gates_from_a_file(tmp_path):
    """The score of `qfilter` with a file is k · u, with the directions of the layer; a file of another model is refused."""
    u = torch.randn(3, K, D, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "gates.json"
    coded = base64.b64encode(u.numpy().astype("<f4").tobytes()).decode()
    file.write_text(json.dumps({"name": "gates", "shape": [3, K, D], "filters": coded}))
    policy = make_policy("dms", by={"name": "qfilter", "file": str(file)}, threshold=0.3, window=4)
    query, key, value = tensors(2)
    for layer in range(3):
        _, state = attend(policy, query, key, value, layer=layer, layers=3)
        score = (key * u[layer].double()[None, :, None]).sum(-1)
        stays = (score >= 0.3) | (torch.arange(T) >= T - 4)
        assert [[[p in h for p in range(T)] for h in row] for row in state.positions.tolist()] == stays.tolist()
    with pytest.raises(ConfigError, match="it is of a model of 3 layers"):
        policy.check(4, K)
    assert "filters" not in json.dumps(policy.stored_settings())  # a digest stands for them


def counts(*requests: tuple[float, int], schedule: str = "step", prompt: int = 1) -> Counts:
    made = Counts(Schedule.named(schedule), 2, [True])
    for cached, total in requests:
        made.count_cached(cached, total, prompt, [make_policy("dms", window=4).keeps(1)])
    return made


def test_cached_tokens_are_counted_and_a_threshold_without_effect_is_reported():
    some = counts((6, 10), (9, 20))
    assert (some.kept_tokens, some.cache_share, max(some.shares)) == (7.5, pytest.approx(0.525), 0.6)
    assert some.lengths["budget"] == pytest.approx({"min": 6, "p25": 6.75, "median": 7.5, "p75": 8.25, "max": 9})
    assert some.doubt is None
    assert counts((4, 10), (4, 20)).doubt == "it keeps no token of any request beyond its window"
    assert counts((10, 10), (20, 20)).doubt == "it keeps every token of all requests"
    assert counts((3, 3)).doubt == "no request has more tokens than its window"
    # after one cut of 12 tokens, 8 more stay whatever the threshold is
    assert counts((12, 20), schedule="prompt", prompt=12).doubt == "it keeps no token of any request beyond its window"
    assert counts((13, 20), schedule="prompt", prompt=12).doubt is None


def test_what_a_pass_counts_is_what_a_cache_holds():
    """Decoding through a bounded cache holds as many tokens as scoring the same text in one pass counts."""
    model, ids = shared("llama"), ids_for()
    policy = make_policy("dms", threshold=-2.5, window=3)
    _, evicted_at = one_pass(model, policy, Schedule(), ids, [1, 1])
    cache = PrunedCache(model, policy)
    with torch.no_grad():
        for t in range(ids.shape[1]):
            model(ids[:, t : t + 1], cache=cache)
    for layer, of_layer in enumerate(evicted_at):
        held = cache.state(layer).counts
        assert torch.equal(held, (of_layer >= ids.shape[1]).sum(-1))
        assert held.max() < ids.shape[1]  # some left
        assert held.min() > 3  # and some stayed
    stored = cache.stored()
    other = PrunedCache(model, policy)
    other.load(stored)  # any number of tokens fits
    assert torch.equal(other.state(0).positions, cache.state(0).positions)
