"""Overrides that Hydra's grammar does not read become a sentence that shows how to write them."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hypothesis import given
from hypothesis import strategies as st

from a2sf.errors import ConfigError, Notice
from a2sf.policies.renamed import notice
from a2sf.sweep.config.overrides import as_written, check_trackers, explain_override, quote, quoted

AWKWARD = ["/a=b", "/a b(c)", "/x (1)/y", "a[b", "ü x", "C:\\x\\", 'say "hi"', "a,b", "{x}", "ends with \\", '\\"']


def read(override: str) -> str:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    value = parsed.value()
    return str(value)


@pytest.mark.parametrize("value", AWKWARD)
def test_what_it_shows_is_read_as_the_value_that_was_meant(value):
    (word,) = shlex.split(quoted("model.path", value))
    assert read(as_written(word)) == value


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_can_be_quoted(text):
    assert read(f"key={quote(text)}") == text


@pytest.mark.parametrize("value", ["/a=b", "/a b(c)", "/x (1)/y", "a[b", "ü x"])
def test_a_value_with_grammar_in_it_is_shown_quoted(value):
    with pytest.raises(OverrideParseException) as raised:
        read(f"model.path={value}")
    message = explain_override(raised.value)
    assert message is not None
    assert message.startswith(f"model.path={value} cannot be read")
    assert quoted("model.path", value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("limit", "give key=value"),
        ("+foo", "give key=value"),
        ("tasks=[piqa", "a bracket is not closed"),
        ("tasks=[a(b)]", """tasks=["a(b)"]"""),
        ("policy=h2o, budget.ratio=0.2", "as a separate argument"),
    ],
)
def test_other_slips(override, says):
    with pytest.raises(OverrideParseException) as raised:
        read(override)
    assert says in str(explain_override(raised.value))


def test_one_tracker_twice_is_reported():
    check_trackers("tracker=[wandb,tensorboard]")
    check_trackers("tracker=wandb,wandb")  # a grid's
    with pytest.raises(ConfigError, match=r"tracker=\[wandb, wandb\] is not allowed: it names wandb twice"):
        check_trackers("tracker=[wandb, wandb]")


def parsed(override: str) -> Any:
    """What a worker gets: parsed, written as text for it, and parsed again; each value of a sweep."""
    (first,) = OverridesParser.create().parse_overrides([as_written(override)])
    assert as_written(as_written(override)) == as_written(override)  # the command that a result names can be run again
    (points,) = BasicSweeper.split_arguments([first], None)
    again = [OverridesParser.create().parse_overrides([as_written(point[0])])[0].value() for point in points]
    return again if first.is_sweep_override() else again[0]


@pytest.mark.parametrize(
    ("override", "means"),
    [
        ("model.revision=1.10", "1.10"),
        ("model.revision=1.10,2_0,1e3,main", ["1.10", "2_0", "1e3", "main"]),
        ("model.revision=choice(1.10,true)", ["1.10", "true"]),
        ("++model.revision=007", "007"),
        ("model.revision=null", None),
        ("model.name=True", "True"),
        ("sweep_name=2024_11_05", "2024_11_05"),
        ("tasks=[1.10,piqa]", ["1.10", "piqa"]),
        ("early_stopping.pair=[1.0,a2sf]", ["1.0", "a2sf"]),
        ("chat_template=true,1.10", [True, "1.10"]),
        ("limit=1_0", 10),
        ("budget.ratio=0.20,0.4", [0.2, 0.4]),
        ("task_args.number=1.10", 1.1),
        (r'gen_kwargs.until=["\n","\u00e9 \"x\" \\n"]', ["\n", 'é "x" \\n']),
        (r'gen_kwargs={until: ["\n"], max_gen_toks: 3}', {"until": ["\n"], "max_gen_toks": 3}),
        (r'gen_kwargs.until=["\n"],["\t","a"]', [["\n"], ["\t", "a"]]),
        (r"gen_kwargs.until=['\n']", ["\\n"]),  # in YAML, too, single quotes keep the backslash
        (r'task_args.word="a\tb"', "a\tb"),
        (r'system_instruction="Be brief.\n","C:\\x\\"', ["Be brief.\n", "C:\\x\\"]),
        ("system_instruction='it\\'s 1.10'", "it's 1.10"),
        (r"model.path=C:\x", "C:\\x"),
    ],
)
def test_text_is_what_was_written(override, means):
    assert repr(parsed(override)) == repr(means)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_in_double_quotes_is_read_as_json(text):
    assert parsed(f"system_instruction={json.dumps(text)}") == text
    assert parsed(f"gen_kwargs.until=[{json.dumps(text)},x]") == [text, "x"]


def test_an_escape_that_does_not_exist_is_refused():
    with pytest.raises(
        ConfigError, match=r'model\.path="C:\\data" is not allowed: in double quotes \\d is not an escape of JSON'
    ):
        as_written('model.path="C:\\data"')


@pytest.mark.parametrize(
    "override", ["limit", "tasks=[piqa", "~tracker", "-m", "a=b=c", "model.name=", 'model.name="a']
)
def test_what_hydra_is_to_refuse_is_left_to_it(override):
    assert as_written(override) == override


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("until.pair=[1.0,a2sf]", "early_stopping.pair=['1.0',a2sf]"),
        ("++until.verdict=true", "++early_stopping.significant=true"),
        ("until={pair: [h2o,a2sf]}", "early_stopping={pair: [h2o,a2sf]}"),
    ],
)
def test_a_key_of_the_previous_version_works_with_a_notice(old, new):
    notice.cache_clear()
    as_written.cache_clear()
    with pytest.warns(Notice, match="until.* is now called early_stopping"):
        assert as_written(old) == new
    assert as_written(new) == new


@pytest.mark.parametrize("override", ["gen_kwargs.until=['x']", "task_args.until=3", "until_then=3", "hydra.until=1"])
def test_other_keys_keep_their_names(override):
    assert as_written(override) == override
