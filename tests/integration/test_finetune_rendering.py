"""What carries loss: the assistant's words and the end of its turn, whatever the chat template looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage.tools.finetune.data import Conversation, Message
from sage.tools.finetune.data.text_batch import MOST_CHARACTERS
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.rendering import ChatRenderer
from sage_contracts.errors import InvalidDataError

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The answer trimmed, the turn closed by a token and followed by the end of the text unless it goes on.
TRIMMED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% else %}<|end|>{% endif %}"
)
# No generation prompt at all; the turn of the user opens the answer.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
# Thoughts are shown in the last turn only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

TALK: list[Message] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Two it is."},
]


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_base)
    loaded.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    return loaded


def learned(tokenizer: Any, template: str, messages: list[Message], max_length: int = 500) -> list[str]:
    """The text of each run of label tokens, over all samples."""
    tokenizer.chat_template = template
    runs: list[str] = []
    for sample in ChatRenderer(tokenizer, max_length).samples([Conversation(messages, "row 1")]):
        run: list[int] = []
        for label in [*sample.labels, IGNORED]:
            if label != IGNORED:
                run.append(label)
            elif run:
                runs.append(tokenizer.decode(run))
                run = []
    return runs


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Yes, one.<|im_end|>", "Two it is.<|im_end|>"]),
        (TRIMMED, ["Yes, one.<|im_end|>", "Two it is.<|im_end|>"]),
        (BRACKETS, [" Yes, one.<|im_end|>", " Two it is.<|im_end|>"]),
        (
            THINKING,
            ["<think>\n\n</think>\n\nTwo it is.<|im_end|>", "<think>\n\n</think>\n\nYes, one.<|im_end|>"],
        ),
    ],
)
def test_loss_falls_on_answers_and_their_end(tokenizer: Any, template: str, expected: list[str]) -> None:
    assert learned(tokenizer, template, TALK) == expected


def test_ids_are_those_of_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    (sample,) = ChatRenderer(tokenizer, 500).samples([Conversation(TALK, "row 1")])
    whole = tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert list(sample.ids) == whole[: len(sample.ids)]
    assert tokenizer.decode(whole[len(sample.ids) :]) == "\n"


def test_a_turn_of_weight_zero_is_context(tokenizer: Any) -> None:
    talk = [*TALK[:1], {**TALK[1], "weight": 0}, *TALK[2:]]
    assert learned(tokenizer, CHATML, talk) == ["Two it is.<|im_end|>"]  # type: ignore[arg-type]


def test_a_template_that_never_ends_a_turn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidDataError, match=r"row 1: the chat template ends .* never learn to stop"):
        learned(tokenizer, ENDLESS, TALK)


def test_templates_may_refuse_and_are_quoted(tokenizer: Any) -> None:
    with pytest.raises(InvalidDataError, match=r"row 1: the chat template refuses it .*no systems"):
        learned(tokenizer, "{{ raise_exception('no systems here') }}", TALK)
    with pytest.raises(InvalidDataError, match="no chat template"):
        learned(tokenizer, "", TALK)
    with pytest.raises(InvalidDataError, match="does not repeat"):
        learned(tokenizer, CHATML.replace("m['content']", "m['content'] | upper"), TALK)


def test_long_rows_are_cut_and_those_without_an_answer_left_out(tokenizer: Any) -> None:
    tokenizer.chat_template = BRACKETS
    renderer = ChatRenderer(tokenizer, 20)
    long_answer: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b" * 50},
    ]
    long_question: list[Message] = [
        {"role": "user", "content": "a" * 50},
        {"role": "assistant", "content": "b"},
    ]
    (sample,) = renderer.samples([Conversation(long_answer, "row 1"), Conversation(long_question, "row 2")])
    assert len(sample.ids) == len(sample.labels) == 20
    assert (renderer.stats.truncated, renderer.stats.dropped) == (2, 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=30).filter(str.strip), st.text(max_size=30))
def test_any_text_is_learned_to_the_letter(tokenizer: Any, answer: str, question: str) -> None:
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    assert learned(tokenizer, CHATML, messages) == [f"{answer}<|im_end|>"]


def test_long_texts_are_tokenised_few_at_a_time(tokenizer: Any) -> None:
    seen: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.append(sum(map(len, texts)))
            return tokenizer(texts, **options)

    tokenizer.chat_template = CHATML
    answer = "word " * (MOST_CHARACTERS // 10)
    rows = [Conversation([TALK[0], {"role": "assistant", "content": answer}], "row")] * 5
    assert [len(sample.ids) for sample in ChatRenderer(Watched(), 100).samples(rows)] == [100] * 5
    assert len(seen) == 3
    assert max(seen) < 1.1 * MOST_CHARACTERS
