"""What was thought and what was answered."""

from __future__ import annotations

import pytest
from lm_eval.models.utils import postprocess_generated_text

from a2sf.errors import ConfigError
from a2sf.policies.base import UNLIMITED, Retention
from a2sf.policies.schedule import STEP
from a2sf.scoring.generation.ends import Ends
from a2sf.scoring.generation.row import Row
from a2sf.scoring.generation.thinking import Thinking
from a2sf.scoring.passes.sequences import ScoredSequence


class Words:
    """A tokenizer of words; the first ones are added tokens."""

    added = ("<eos>", "<think>", "</think>", "<|channel|>", "<|message|>")
    words = (*added, "a", "b", "\n\n", "stop", "final", "</", "think", ">", "<unk>")
    unk_token_id = 13

    def __len__(self):
        return len(self.words)

    def get_added_vocab(self):
        return {w: i for i, w in enumerate(self.added)}

    def encode(self, text, **_):
        found = []
        while text:
            word = max((w for w in self.words if text.startswith(w)), key=len, default=None)
            found.append(self.unk_token_id if word is None else self.words.index(word))
            text = text[len(word or text[0]) :]
        return found

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids)


class Model:
    """As much of an lm-eval model as decodes."""

    tokenizer = Words()

    def tok_decode(self, tokens, skip_special_tokens=True):
        return self.tokenizer.decode([t for t in tokens if t or not skip_special_tokens])


def thinking(given="</think>", enabled=None):
    return Thinking.of(given, Words(), enabled)


def written(text: str, prompt: str = "", end="</think>", stop=("\n\n", "stop"), limit: int = 99):
    """The row after its tokens were taken, and the text that comes of it."""
    ends = Ends(Model(), stop, frozenset({0}), None if end is None else thinking(end))
    sequence = ScoredSequence((5,), (0,), (Retention(budget=UNLIMITED),), STEP)
    row = Row(None, 0, sequence, limit, ends, prompt)
    for token in Words().encode(text):
        row.take(token)
        if row.finish is not None:
            break
    return row, ends.finished(prompt, row.tokens, row.finish or "length")


@pytest.mark.parametrize(
    ("given", "end", "opening"),
    [
        ("</think>", (2,), "<think>"),
        ("2", (2,), "<think>"),
        (2, (2,), "<think>"),
        ("<|channel|>final<|message|>", (3, 9, 4), None),
    ],
)
def test_what_ends_thinking_and_what_begins_it(given, end, opening):
    found = thinking(given)
    assert (found.end, found.opening) == (end, opening)


@pytest.mark.parametrize("given", ["</thought>", "99", "a b", "final<|message|>"])
def test_a_token_that_the_tokenizer_lacks_is_refused(given):
    with pytest.raises(ConfigError, match=r"think_end_token=.* is not allowed: the tokenizer has"):
        thinking(given)


def test_enabled_thinking_needs_an_end():
    assert thinking(None) is thinking("") is thinking(None, enabled=False) is None
    with pytest.raises(ConfigError, match="enable_thinking=true is not allowed: give think_end_token as well"):
        thinking(None, enabled=True)


def test_what_was_thought_is_apart_from_the_answer_and_holds_any_stop_sequence():
    row, text = written("<think>a\n\nbstop</think>\n\nab\n\na")
    assert Words().decode(row.tokens) == "<think>a\n\nbstop</think>\n\nab\n\n"
    assert (row.finish, text.value, text.thinking) == ("stop", "ab", "<think>a\n\nbstop")
    assert text.thinking_tokens == 6
    # as lm-eval cuts the same text
    assert text.value == postprocess_generated_text(Words().decode(row.tokens), ["\n\n", "stop"], "</think>")


def test_the_prompt_may_open_the_thinking_or_close_it():
    _, text = written("ab</think>b<eos>", prompt="a<think>\n\n")
    assert (text.value, text.thinking, text.finish) == ("b", "ab", "eos")
    row, text = written("ab\n\nb", prompt="a<think>\n\n</think>\n\n")
    assert (row.finish, text.value, text.thinking, text.thinking_tokens) == ("stop", "ab", "", 0)


@pytest.mark.parametrize("text", ["<think>ab\n\nab", "<think>ab<eos>"])
def test_an_answer_that_never_came_is_none(text):
    _, found = written(text)
    assert (found.value, found.finish) == ("", "thinking")
    assert found.thinking.startswith("<think>ab")
    assert found.thinking_tokens == len(Words().encode(text))


def test_a_model_that_does_not_think_answers_at_once():
    row, text = written("ab\n\nab")
    assert (row.finish, text.value) == ("stop", "ab")
    row, text = written("ab\n\nab", end="<|channel|>final<|message|>")  # nothing says where it would begin: it thinks
    assert (text.value, text.finish) == ("", "thinking")
    _, text = written("ab", end=None)
    assert (text.value, text.finish) == ("ab", "length")


def test_of_several_thoughts_the_last_end_counts():
    _, text = written("<think>a</think>a<think>b</think>b<eos>")
    assert (text.value, text.thinking) == ("b", "<think>a</think>a<think>b")


def test_a_limit_and_the_end_of_the_model():
    row, text = written("abab", limit=3, end=None)
    assert (len(row.tokens), row.finish, text.value) == (3, "length", "aba")
