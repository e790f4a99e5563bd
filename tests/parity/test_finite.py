"""NaN and infinity never become an answer: scores, generated text and plain calls name the document, or the row."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance

from a2sf import A2SF, Budget
from a2sf.hf.attention import NonFiniteError
from a2sf.hf.cache.pruned import PrunedCache
from a2sf.hf.scope import pruning
from a2sf.policies.find import find_policies
from a2sf.scoring.lm import PrunedLM
from tests.models import small
from tests.stand_in import StandIn

pytestmark = pytest.mark.usefixtures("stand_in")

POLICIES = [cls() for cls in find_policies().values()]
BAD = 50
NAN, INF = float("nan"), float("inf")
BUDGET = Budget(tokens=8)
IDS = torch.randint(51, 97, (3, 12), generator=torch.Generator().manual_seed(0))


def spoilt(value: float = NAN, token: int = BAD, where: str = "last_hidden_state"):
    """A model whose last hidden state is `value` after `token`, as an overflow in its last layer would leave it."""
    model = small("llama")

    def spoil(module, args, kwargs, output):
        output.last_hidden_state[kwargs["input_ids"] == token] = value
        return output

    model.model.register_forward_hook(spoil, with_kwargs=True)
    return model


def lm_of(model, policy=None, **more) -> PrunedLM:
    policy = policy or A2SF(forgetting_factor=0.4)
    return PrunedLM(model, policy, BUDGET if policy.uses_budget else None, tokenizer=StandIn(), **more)


def ask(kind: str, *documents: tuple) -> list[Instance]:
    return [Instance(kind, {}, d, 0, metadata=("sums", i, 1)) for i, d in enumerate(documents)]


def text(token: int) -> str:
    """A text of one token, for `StandIn`."""
    return next(chr(c) for c in range(90, 180) if 3 + c % 90 == token)


CLEAN = ("the lighthouse keeper", " counts the ships")
DIRTY = (f"the lighthouse {text(BAD)} keeper", " counts")


def tokens(*texts: str) -> set[int]:
    return {t for x in texts for t in StandIn().encode(x)}


def test_the_texts_are_what_they_are_for():
    assert BAD in tokens(*DIRTY)
    assert BAD not in tokens(*CLEAN)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_only_the_document_that_depends_on_it_is_blamed(policy):
    lm = lm_of(spoilt(), policy)
    scored = (f"{text(BAD)}", " that is scored")  # the logits after BAD are of the first scored token
    before = (f"{text(BAD)} is read", " long before")  # and here nobody needs them, as it is the last layer's
    todo = ask("loglikelihood", CLEAN, before, scored, CLEAN)
    with pytest.raises(
        NonFiniteError, match=r"^task sums, document 2: NaN or infinity in the logits, .* float32"
    ) as raised:
        lm.loglikelihood(todo)
    assert "\n" not in str(raised.value)
    assert len(lm.loglikelihood([todo[i] for i in (0, 1, 3)])) == 3


def test_what_is_spoilt_below_reaches_the_attention_and_is_blamed_there():
    model = small("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = NAN
    with pytest.raises(NonFiniteError, match=r"^task sums, document 1: NaN or infinity in the query of layer 0"):
        lm_of(model).loglikelihood(ask("loglikelihood", CLEAN, DIRTY))
    assert len(lm_of(model).loglikelihood(ask("loglikelihood", CLEAN))) == 1


def test_a_model_that_is_nan_throughout_names_the_document_too():
    model = small("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 4] = NAN
    lm = lm_of(model)
    with pytest.raises(NonFiniteError, match=r"^task sums, document 0: NaN or infinity in the key of layer 1"):
        lm.loglikelihood(ask("loglikelihood", CLEAN))
    with pytest.raises(NonFiniteError, match=r"^task sums, document 0: NaN or infinity in the key of layer 1"):
        lm.generate_until(ask("generate_until", ("abc", {"until": ["."], "max_gen_toks": 3})))


def test_half_precision_that_overflows_says_what_to_try():
    model = small("llama").half()
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(3e6)
    with pytest.raises(NonFiniteError, match=r"documents 0, 1.*float16.*try model\.dtype=bfloat16 or float32"):
        lm_of(model).loglikelihood(ask("loglikelihood", CLEAN, DIRTY))
    with pytest.raises(NonFiniteError, match=r"document 0: .*logits.*float16"):
        lm_of(model).generate_until(ask("generate_until", ("abc", {"until": ["."], "max_gen_toks": 3})))


def vocabulary(model, value: float, entries: slice):
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill_(-1, torch.arange(97)[entries], value)
    )
    return model


def test_a_vocabulary_may_be_masked_where_no_token_is_used():
    todo = ask("loglikelihood", CLEAN)
    unused = slice(94, 97)
    assert not tokens(*CLEAN) & set(range(97)[unused])
    lm, masked = lm_of(small("llama")), lm_of(vocabulary(small("llama"), -INF, unused))
    least = lm_of(vocabulary(small("llama"), torch.finfo(torch.float32).min, unused))
    ((score, _),), ((same, _),), ((other, _),) = (x.loglikelihood(todo) for x in (masked, least, lm))
    assert score == pytest.approx(same)
    assert score != pytest.approx(other, abs=1e-3)
    prompt = ask("generate_until", ("abc", {"until": ["."], "max_gen_toks": 3}))
    assert masked.generate_until(prompt) == least.generate_until(prompt)


@pytest.mark.parametrize(("value", "entries"), [(INF, slice(94, 97)), (NAN, slice(94, 97)), (-INF, slice(0, 97))])
def test_infinity_and_nan_anywhere_in_the_logits_are_an_error(value, entries):
    lm = lm_of(vocabulary(small("llama"), value, entries))
    with pytest.raises(NonFiniteError, match=r"document 0: .*logits"):
        lm.loglikelihood(ask("loglikelihood", CLEAN))
    with pytest.raises(NonFiniteError, match=r"document 0: .*logits"):
        lm.generate_until(ask("generate_until", ("abc", {"until": ["."], "max_gen_toks": 3})))


def test_a_target_that_has_no_probability_is_an_error():
    (target,) = tokens("s")
    lm = lm_of(vocabulary(small("llama"), -INF, slice(target, target + 1)))
    with pytest.raises(NonFiniteError, match=r"document 0"):
        lm.loglikelihood(ask("loglikelihood", CLEAN))


def test_rolling_windows_name_their_document():
    lm = lm_of(spoilt(), max_length=8)
    with pytest.raises(NonFiniteError, match=r"^task sums, document 1: "):
        lm.loglikelihood_rolling(ask("loglikelihood_rolling", (CLEAN[0],), (DIRTY[0],), (CLEAN[0],)))
    clean = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (CLEAN[0],), (CLEAN[1],)))
    assert clean == [lm.loglikelihood_rolling(ask("loglikelihood_rolling", (t,)))[0] for t in CLEAN]


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 2}])
def test_generating_names_the_document(settings):
    lm = lm_of(spoilt())
    settings = {"until": ["#"], "max_gen_toks": 4, **settings}
    prompts = [("a long and clean prompt", settings), ("abc", settings), (f"not clean{text(BAD)}", settings)]
    with pytest.raises(NonFiniteError, match=r"^task sums, document 2: .*logits"):
        lm.generate_until(ask("generate_until", *prompts))
    assert len(lm.generate_until(ask("generate_until", *prompts[:2]))) == 2


@pytest.mark.parametrize("sample", [False, True])
def test_generate_stops_where_a_token_depends_on_it(sample):
    model = spoilt()
    chosen = {"max_new_tokens": 5, "do_sample": sample, "eos_token_id": None}
    ids = IDS.clone()
    ids[1, -1] = BAD
    with pytest.raises(NonFiniteError, match=r"logits \(row 1 of the batch\)"):
        model.generate(ids, cache=PrunedCache(model, A2SF(), BUDGET), **chosen)
    with pytest.raises(NonFiniteError, match=r"logits \(row 1 of the batch\)"), pruning(model, A2SF(), BUDGET):
        model.generate(ids, **chosen)
    assert not torch.isfinite(model(ids).logits).all()  # the model by itself is left alone


@pytest.mark.parametrize("keep", [True, False])
def test_a_plain_call_is_an_error_where_a_token_counts(keep):
    model, ids = spoilt(), IDS.clone()
    mask = torch.ones_like(ids)
    ids[2, :3], mask[2, :3] = BAD, 0  # padding
    with torch.no_grad(), pruning(model, A2SF(), BUDGET):
        logits = model(ids, attention_mask=mask, use_cache=keep).logits
        assert logits[mask.bool()].isfinite().all()
        with pytest.raises(NonFiniteError, match="row 2 of the batch"):
            model(ids, attention_mask=torch.ones_like(mask), use_cache=keep)


def test_padding_that_is_spoilt_below_does_not_count():
    model, ids = small("llama"), IDS.clone()
    with torch.no_grad():
        expected = PrunedCache(model, A2SF(), BUDGET)
        mask = torch.ones_like(ids)
        ids[0, :4], mask[0, :4] = BAD, 0
        logits = model(ids, attention_mask=mask, cache=expected).logits
        model.model.embed_tokens.weight[BAD] = NAN
        got = model(ids, attention_mask=mask, cache=PrunedCache(model, A2SF(), BUDGET)).logits
        torch.testing.assert_close(got[mask.bool()], logits[mask.bool()])


def test_a_key_that_only_gets_no_attention_is_found_when_decoding():
    model = small("llama")
    cache = PrunedCache(model, A2SF(), BUDGET)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        model(IDS, cache=cache)
        attention.k_proj.register_forward_hook(lambda module, args, output: output.abs().mul(-INF))
        attention.q_proj.register_forward_hook(lambda module, args, output: output.abs() + 1)
        with pytest.raises(NonFiniteError, match="key of layer 1"):
            model(IDS[:, :1], cache=cache)
