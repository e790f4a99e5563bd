"""Questions and answers of a conversation: which tokens are read, and which differ."""

from __future__ import annotations

import json
import pickle

import pytest

from a2sf.errors import ConfigError, UserError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.schedule import STEP
from a2sf.scoring.generation.ends import Ends
from a2sf.scoring.generation.row import Row
from a2sf.scoring.generation.turns import TurnQuestion, in_order, places
from a2sf.scoring.passes.sequences import ScoredSequence
from a2sf.tasks.turns import NEXT, TurnAnswers, answers_in, as_chat, check_task, joined, questions_of, with_turns
from tests.unit.scoring.test_thinking import Model, thinking

GOOD = {
    "output_type": "generate_until",
    "generation_kwargs": {"turns": 2},
    "process_results": "utils.process_results",
    "filter_list": [{"name": "none", "filter": [{"function": "take_first"}]}],
}


def test_a_question_does_not_repeat_the_token_that_the_model_ended_with():
    question = TurnQuestion("…", (7, 1, 2), closes=True)
    assert question.after([5, 7]) == (1, 2)
    assert question.after([5, 6]) == (7, 1, 2)  # cut off at the limit: the template ends the answer
    assert TurnQuestion("…", (7, 1, 2)).after([5, 7]) == (7, 1, 2)  # an ordinary token


def test_tokens_are_put_in_the_order_in_which_they_were_read():
    later = [TurnQuestion("a", (7, 1), closes=True), TurnQuestion("b", (8,))]
    tokens, lengths = [5, 7, 6, 6, 6, 9], [2, 3, 1]
    assert in_order(tokens, lengths, later) == [5, 7, 1, 6, 6, 6, 8, 9]
    assert places(tokens, lengths, later) == [0, 3, 7]
    assert in_order([1, 2], [2], []) == [1, 2]


def row_of(limit=3, later=(), end=None):
    ends = Ends(Model(), ["stop"], frozenset({0}), None if end is None else thinking(end))
    sequence = ScoredSequence((5, 5), (0,), (Retention(budget=UNLIMITED),), STEP)
    return Row(None, 0, sequence, limit, ends, "", None, later)


def drive(row, tokens):
    """Give a row the model's tokens as it asks for them; returns what it reads."""
    read, given = [], iter(tokens)
    row.take(next(given))
    while row.finish is None:
        token, position = row.next
        assert position == 2 + len(read)
        read.append(token)
        row.advance()
        if not row.unread:
            row.take(next(given))
    assert next(given, None) is None
    return read


def test_a_row_reads_the_next_question_when_an_answer_has_ended():
    row = row_of(later=(TurnQuestion("b", (6, 6)), TurnQuestion("a", (5,))))
    assert row.follow == 3 * 3 + 3
    # ended by the limit, by the end of a text, by a stop sequence
    read = drive(row, [5, 6, 5, 6, 0, 8])
    assert read == [5, 6, 5, 6, 6, 6, 0, 5]
    assert [*row.done, (row.tokens, row.finish)] == [([5, 6, 5], "length"), ([6, 0], "eos"), ([8], "stop")]
    assert row.text == (5, 5, *read, 8)
    assert row.answer_start == 2 + len(read)
    row.restart()
    assert (row.tokens, row.before, row.done, row.unread, row.read, row.finish) == ([], [], [], [], 0, None)


def test_thinking_begins_again_in_each_turn():
    row = row_of(6, (TurnQuestion("<think>", (1,)), TurnQuestion("b", (6,))), end="</think>")
    drive(row, [1, 5, 5, 5, 5, 5, 5, 8, 2, 5, 8, 6, 8])
    turns = [*row.done, (row.tokens, row.finish)]
    # cut off in its thinking; thinks because the question says so, past a stop sequence; does not think
    texts = [row.ends.finished(q, *t) for q, t in zip(["", "<think>", "b"], turns, strict=True)]
    assert [(t.value, t.finish) for t in texts] == [("", "thinking"), ("a", "stop"), ("b", "stop")]
    assert [t.thinking_tokens for t in texts] == [6, 3, 0]


def test_prompts_are_taken_apart_and_answers_put_together():
    assert questions_of(f"a{NEXT}b", {"turns": 2}) == ["a", "b"]
    assert questions_of("a", {"turns": 2}) == questions_of("a", {}) == ["a"]
    assert answers_in(joined(["x", "", f"y{NEXT}z"])) == ["x", "", "yz"]
    assert answers_in(joined([""])) == [""]
    answers = answers_in("a")
    assert json.dumps(answers) == '["a"]'
    assert pickle.loads(pickle.dumps(answers)) == answers


def test_lm_evals_own_metrics_get_no_number():
    with pytest.raises(UserError, match="give the task process_results"):
        type(answers_in("a"))("the target")  # what lm-eval does with a target of another type
    assert TurnAnswers() == []


def test_a_chat_has_a_turn_for_each_question():
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": f"a{NEXT}b{NEXT}c"}]
    chat = as_chat(history)
    assert [(m["role"], m["content"]) for m in chat] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", NEXT),
        ("user", "b"),
        ("assistant", NEXT),
        ("user", "c"),
    ]
    assert as_chat(chat) == chat
    template = with_turns(lambda chat, end="": "".join(f"[{m['role'][0]} {m['content']}]" for m in chat) + end)
    assert template(history, end="[a ") == f"[s s][u a][a {NEXT}][u b][a {NEXT}][u c][a "
    with pytest.raises(UserError, match="writes 0 of the 2 answers"):
        with_turns(lambda chat: chat[-1]["content"])(history)
    assert with_turns(lambda chat: chat[-1]["content"])([{"role": "user", "content": "a"}]) == "a"


@pytest.mark.parametrize(
    ("change", "shots", "key"),
    [
        ({"process_results": None}, 0, "process_results=none"),
        ({}, 2, "shots=2"),
        ({"gen_prefix": "So"}, 0, "gen_prefix=So"),
        ({"filter_list": [{"name": "n", "filter": [{"function": "regex"}]}]}, 0, "filter_list=regex"),
        ({"generation_kwargs": {"turns": "2"}}, 0, "generation_kwargs.turns='2'"),
        ({"output_type": "multiple_choice"}, 0, "generation_kwargs.turns=multiple_choice"),
    ],
)
def test_a_conversation_that_would_be_scored_wrongly_is_refused(change, shots, key):
    check_task("own", GOOD)
    with pytest.raises(ConfigError) as error:
        check_task("own", GOOD | change, shots)
    assert str(error.value).startswith(key)


def test_other_tasks_pass():
    check_task("own", {"output_type": "multiple_choice"}, 5)
    check_task("own", {"output_type": "generate_until", "generation_kwargs": {"until": ["x"]}}, 5)
