"""A softcap and learned sinks: the probabilities, and that every implementation and every rule computes with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from a2sf import A2SF, Schedule, attend, evicting_attention, make_policy
from a2sf.engine import kernels
from a2sf.engine.kernels import backends_run, new_cache
from a2sf.engine.retention import BatchRetention
from a2sf.engine.state import Attended, Options, Segments
from a2sf.engine.trace import attention_mass, steps_of
from a2sf.errors import ConfigError
from a2sf.policies.base import Retention
from a2sf.policies.model.softmax import PLAIN, Softmax
from a2sf.policies.prepared import LayerRead
from tests.own_policies import AboveUniform
from tests.policies import cases, label, tiered
from tests.unit.engine.test_prompts import Operations

B, K, G, T, D, PROMPT = 2, 2, 2, 26, 8, 17
H = K * G
SINKS = torch.tensor([1.0, -2.0, 3.0, 0.5])
KINDS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"learned_sinks": SINKS},
    "both": {"softcap": 2.0, "learned_sinks": SINKS},
}


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [factor * torch.randn(B, n, T, D, generator=g).to(dtype) for n, factor in ((H, 3), (K, 1), (K, 1))]


def given(policy, schedule: Schedule | None = None, kind: str = "both", **more) -> dict:
    schedule = schedule or Schedule()
    prompt = {"prompt": torch.tensor([PROMPT, PROMPT - 4])} if schedule.prompt else {}
    budget = {"budget": 7} if policy.uses_budget else {"budget": None}
    return {"layers": 3, "layer": 1, "schedule": schedule} | prompt | budget | KINDS[kind] | more


def close(a: tuple[Tensor, object], b: tuple[Tensor, object]) -> None:
    """Check that outputs and states are the same but for rounding."""
    torch.testing.assert_close(a[0].double(), b[0].double(), atol=2e-5, rtol=1e-4)
    assert torch.equal(a[1].positions, b[1].positions)
    torch.testing.assert_close(a[1].scores.double(), b[1].scores.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_plain_loops(kind):
    softmax = Softmax.of(KINDS[kind].get("softcap"), KINDS[kind].get("learned_sinks"), H, K)
    logits = 4 * torch.randn(K, G, 3, 5, generator=torch.Generator().manual_seed(0))
    hidden = torch.arange(5) > torch.tensor([[1], [4], [2]])
    got = softmax(logits, hidden)
    for k in range(K):
        for g in range(G):
            for q in range(3):
                x = [float(logits[k, g, q, n]) for n in range(5) if not hidden[q, n]]
                c = softmax.softcap
                weights = [math.exp(y if c is None else c * math.tanh(y / c)) for y in x]
                total = sum(weights) + (0 if kind == "softcap" else math.exp(SINKS[k * G + g]))
                want = torch.tensor([w / total for w in weights] + [0.0] * (5 - len(x)))
                torch.testing.assert_close(got[k, g, q], want)
    assert (got.sum(-1) < 0.99).any() == (kind != "softcap")


def test_a_plain_softmax_is_torchs_and_what_is_no_softcap_or_sink_is_refused():
    assert Softmax.of(None, None, H, K) is PLAIN
    logits = torch.randn(K, G, 3, 5)
    assert torch.equal(PLAIN(logits, torch.zeros(5, dtype=torch.bool)), logits.softmax(-1))
    for bad in (0, -1.0, float("inf"), True, torch.ones(1)):
        with pytest.raises(ValueError, match="softcap must be a finite number above 0"):
            Softmax.of(bad, None, H, K)
    for bad in (torch.ones(K), torch.ones(B, H, T, 1), torch.ones(H, dtype=torch.int64), 3.0):
        with pytest.raises(ValueError, match="learned_sinks must be a floating tensor of 4, one for each query head"):
            Softmax.of(None, bad, H, K)


@pytest.mark.parametrize(("policy", "schedule"), tiered(cases()), ids=label)
def test_every_way_to_run_a_policy_gives_the_same(policy, schedule):
    """The reference; plain torch token by token; and prompts read at once, as `auto` does it."""
    more = given(policy, schedule, lengths=torch.tensor([T, T - 3]))
    want = attend(policy, *tensors(dtype=torch.float64), **more, backend="reference")
    for backend in ("torch", "auto"):
        with backends_run() as ran:
            got = attend(policy, *tensors(), **more, backend=backend)
        close(got, want)
        assert ran <= {"torch", "dense"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("h2o", {}),
        ("tova", {}),
        ("future", {}),
        ("rkv", {"window": 3, "mix": 1.0}),
        ("expected_attention", {"sinks": 1, "covariance": False}),
        ("scissorhands", {"recent": 1}),
    ],
)
def test_what_is_evicted_depends_on_it(policy, settings, kind):
    """In one of a few random cases at least; R-KV leaves out sinks."""
    policy, differ = make_policy(policy, **settings), []
    for seed in range(8):
        more = given(policy, kind=kind)
        with_it, without = (
            attend(policy, *tensors(seed), **more | plain) for plain in ({}, {"softcap": None, "learned_sinks": None})
        )
        assert (with_it[0] - without[0]).abs().max() > 0.05
        differ.append(not torch.equal(with_it[1].positions, without[1].positions))
    assert any(differ) == ((policy.name, kind) != ("rkv", "sinks"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "schedule", [Schedule(), Schedule("every", every=3), Schedule("prompt", then="step")], ids=label
)
@pytest.mark.parametrize("policy", ["a2sf", "snapkv", "keyformer", "heads", "adakv"])
def test_chunks_and_single_rows_are_the_whole(policy, schedule, kind):
    policy = make_policy(policy, **({"heads": [[1, 0]]} if policy == "heads" else {}))
    if schedule.when not in policy.schedules:
        pytest.skip("the policy does not know the schedule")
    more = given(policy, schedule, kind)
    whole = attend(policy, *tensors(), **more)
    state, outputs, at = None, [], 0
    for n in (9, 1, 11, 5):
        output, state = attend(policy, *(x[:, :, at : at + n] for x in tensors()), **more, state=state)
        outputs.append(output)
        at += n
    close((torch.cat(outputs, 2), state), whole)
    if schedule.prompt:
        more["prompt"] = more["prompt"][1:]
    alone = attend(policy, *(x[1:] for x in tensors()), **more)
    assert torch.equal(alone[0], whole[0][1:])  # to the bit


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_and_a_window_are_masked_attention(kind):
    """What dense attention computes in chunks, for trees of segments too."""
    q, k, v = tensors()
    softmax = Softmax.of(KINDS[kind].get("softcap"), KINDS[kind].get("learned_sinks"), H, K)
    options = Options(D**-0.5, softmax=softmax)
    rows = [Retention(budget=100), Retention(budget=5, recent=5)] * 2
    segments = Segments(
        **BatchRetention.of(rows).retention(),
        row=torch.tensor([0, 1, 0, 1]),
        start=torch.tensor([0, 0, 10, 10]),
        length=torch.tensor([10, 10, T - 10, T - 10]),
        parent=torch.tensor([-1, -1, 0, 1]),
    )
    with backends_run() as ran:
        got = kernels.attend(q, k, v, segments, options)
    assert ran == {"dense"}
    torch.testing.assert_close(
        got.output, kernels.attend(q, k, v, segments, options, backend="reference").output, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_has_gradients_of_everything(kind):
    q, k, v = (x[:1, :, :9].requires_grad_() for x in tensors(dtype=torch.float64))
    sinks = None if kind == "softcap" else SINKS.double().requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        cap = KINDS[kind].get("softcap")
        return attend(A2SF(), q, k, v, budget=4, backend="reference", softcap=cap, learned_sinks=sinks)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)
    if sinks is not None:
        alone = [x.detach() for x in (q, k, v)]
        assert run(*alone, sinks).requires_grad
        with pytest.raises(ConfigError, match="only reference has gradients"):
            attend(A2SF(), *alone, budget=4, learned_sinks=sinks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_kernel_says_that_it_does_not_know_it(kind):
    policy = make_policy("h2o")
    with pytest.raises(
        ConfigError, match=r"backend=numba is not allowed: numba does not know the softcap or the learned"
    ):
        attend(policy, *tensors(), **given(policy, kind=kind), backend="numba")
    softmax = Softmax.of(KINDS[kind].get("softcap"), KINDS[kind].get("learned_sinks"), H, K)
    rule = BatchRetention.of([Retention(budget=5)])
    assert new_cache(rule, tensors()[1]) is not None
    assert new_cache(rule, tensors()[1], softmax=softmax) is None


def test_what_a_sink_takes_no_token_receives():
    """Token by token through the engine: without forgetting, a score is the attention received so far."""
    q, k, v = tensors()
    retention = BatchRetention.of([Retention(budget=8, recent=2)] * B)
    options = Options(D**-0.5, True, True, softmax=Softmax.of(2.0, SINKS, H, K))
    done: Attended = kernels.attend(q, k, v, Segments.of_rows(retention, torch.tensor([T, T])), options)
    at = steps_of(done)
    received, lost = attention_mass(q, k, at, options)
    torch.testing.assert_close(received.gather(2, done.state.positions), done.state.scores, atol=1e-4, rtol=1e-4)
    assert received.sum(-1).max() < T * G - 1
    logits = q.unflatten(1, (K, G)) @ k[:, :, None].transpose(-1, -2) * options.scale
    full = options.softmax(logits, torch.ones(T, T, dtype=torch.bool).triu(1))
    gone = at[:, :, None] < torch.arange(T)[:, None]
    torch.testing.assert_close(lost, (full * gone[:, :, None]).sum(-1).mean(2))
    assert lost.max() > 0


def test_a_policy_sees_the_models_attention():
    """What a policy computes of the queries and keys of a text is what the engine computes."""
    q, k, v = (x[:1] for x in tensors())
    softmax = Softmax.of(2.0, SINKS, H, K)
    read = LayerRead(0, q[0].unflatten(0, (K, G)), k[0], v[0], D**-0.5, softmax=softmax)
    numbers = {"budget": T, "recent": 0, "forgetting_factor": 0.0}  # scores are the attention of the last token
    _, state = evicting_attention(q, k, v, **numbers, softcap=2.0, learned_sinks=SINKS)
    torch.testing.assert_close(read.attention(T - 1)[:, :, 0].sum(1), state.scores[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [A2SF(forgetting_factor=0.9), make_policy("h2o"), AboveUniform()], ids=label)
def test_prompts_of_many_tokens_are_read_at_once(policy, kind):
    """Longer than what attends at a time, rows of several lengths, with states that go on."""
    g = torch.Generator().manual_seed(0)
    long = [torch.randn(3, n, 150, D, generator=g) for n in (H, K, K)]
    lengths = torch.tensor([150, 149, 70])
    more = {"schedule": Schedule("prompt", then="step"), "budget": 40, "prompt": lengths - 3, "lengths": lengths}
    more |= KINDS[kind]
    want = attend(policy, *(x.double() for x in long), **more, backend="reference")
    with Operations() as operations:
        got = attend(policy, *long, **more)
    assert operations.count < 2500  # those of 150 steps are more
    close(got, want)
    first, state = attend(policy, *(x[:, :, :90] for x in long), **more | {"lengths": lengths.clamp(max=90)})
    second, state = attend(
        policy, *(x[:, :, 90:] for x in long), **more | {"lengths": (lengths - 90).clamp(min=0)}, state=state
    )
    close((torch.cat([first, second], 2), state), want)
    for row in range(3):
        alone = attend(
            policy,
            *(x[row : row + 1, :, : lengths[row]] for x in long),
            **more | {"prompt": int(lengths[row]) - 3, "lengths": None},
        )
        assert torch.equal(alone[0][0], got[0][row, :, : lengths[row]])  # to the bit
