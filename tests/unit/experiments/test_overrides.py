"""Overrides that Hydra's grammar does not read become a sentence that shows how to write them."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hypothesis import given
from hypothesis import strategies as st

from a2sf.errors import ConfigError
from a2sf.experiments.overrides import check_trackers, explain_override, quote, quoted

AWKWARD = ["/a=b", "/a b(c)", "/x (1)/y", "a[b", "ü x", "C:\\x\\", 'say "hi"', "a,b", "{x}", "ends with \\", '\\"']


def read(override: str) -> str:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    value = parsed.value()
    return str(value)


@pytest.mark.parametrize("value", AWKWARD)
def test_what_it_shows_is_read_as_the_value_that_was_meant(value):
    (word,) = shlex.split(quoted("model.path", value))
    assert read(word) == value


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_can_be_quoted(text):
    assert read(f"key={quote(text)}") == text


@pytest.mark.parametrize("value", ["/a=b", "/a b(c)", "/x (1)/y", "a[b", "ü x"])
def test_a_value_with_grammar_in_it_is_shown_quoted(value):
    with pytest.raises(OverrideParseException) as raised:
        read(f"model.path={value}")
    told = explain_override(raised.value)
    assert told is not None
    assert told.startswith(f"model.path={value} cannot be read")
    assert quoted("model.path", value) in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("limit", "give key=value"),
        ("+foo", "give key=value"),
        ("tasks=[piqa", "a bracket is not closed"),
        ("tasks=[a(b)]", """tasks=["a(b)"]"""),
        ("policy=h2o, budget.ratio=0.2", "an argument of its own"),
    ],
)
def test_other_slips(override, says):
    with pytest.raises(OverrideParseException) as raised:
        read(override)
    assert says in str(explain_override(raised.value))


def test_one_tracker_twice_is_told():
    check_trackers("tracker=[wandb,tensorboard]")
    check_trackers("tracker=wandb,wandb")  # a grid's
    with pytest.raises(ConfigError, match=r"tracker=\[wandb, wandb\] is not allowed: it names wandb twice"):
        check_trackers("tracker=[wandb, wandb]")
