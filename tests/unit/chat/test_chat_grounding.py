from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_chat.grounding import citations_header, fitting, grounded, question_of
from sage_chat.mock import answer_from
from sage_contracts.chat import Passage

PASSAGES = [
    Passage(id=1, source="presets.md#presets", text="# Presets\n\nThere are six presets.", score=2.5),
    Passage(id=2, source="文档.md#显存不足", text="减小 batch 可以节省显存。", score=1.25),
]


def test_passages_go_in_front_as_a_system_message_with_numbered_sources() -> None:
    messages = [{"role": "user", "content": "Which presets?"}]
    system, *rest = grounded(messages, PASSAGES)
    assert system["role"] == "system" and rest == messages
    assert "[1] presets.md#presets\n# Presets" in system["content"]
    assert "[2] 文档.md#显存不足" in system["content"]


def test_an_existing_system_message_is_extended_not_doubled() -> None:
    plain = grounded([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}], PASSAGES)
    assert [message["role"] for message in plain] == ["system", "user"]
    assert plain[0]["content"].endswith("Be brief.")
    parts = grounded([{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}], PASSAGES)
    assert parts[0]["content"][1] == {"type": "text", "text": "Be brief."}


def test_the_request_itself_is_not_changed() -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    grounded(messages, PASSAGES)
    assert messages == [{"role": "system", "content": "Be brief."}]


def test_no_passage_is_said_to_the_model() -> None:
    assert "No passage" in grounded([{"role": "user", "content": "?"}], [])[0]["content"]


def test_the_question_is_the_users_last_text() -> None:
    parts = [{"type": "text", "text": "now"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    messages: list[Any] = [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    assert question_of(messages) == "now"
    assert question_of([]) == ""


def test_the_header_carries_what_a_client_cites() -> None:
    entries = [Passage.model_validate(entry) for entry in json.loads(citations_header(PASSAGES))]
    assert [(entry.id, entry.source) for entry in entries] == [
        (1, PASSAGES[0].source),
        (2, PASSAGES[1].source),
    ]


def test_passages_fit_into_small_contexts_but_one_always_goes() -> None:
    long = [Passage(id=number, source="a.md", text="字" * 400, score=1) for number in (1, 2, 3)]
    assert [passage.id for passage in fitting(long, 2400)] == [1, 2]
    assert [passage.id for passage in fitting(long, 10)] == [1]
    assert fitting([], 10) == []


passages = st.builds(
    Passage,
    id=st.integers(1, 99),
    source=st.text(max_size=200),
    text=st.text(max_size=2000),
    score=st.floats(0, 99),
)


@given(st.lists(passages, max_size=20))
def test_the_header_is_one_short_ascii_line_for_any_text(found: list[Passage]) -> None:
    header = citations_header(found)
    assert header.isascii() and header.isprintable() and len(header) <= 4096
    assert isinstance(json.loads(header), list)


def test_the_mock_cites_by_number_and_names_the_sources() -> None:
    answer = answer_from("Which presets are there?", PASSAGES, has_index=True)
    assert "There are six presets. [1]" in answer
    assert "Sources:\n[1] presets.md#presets\n[2] 文档.md#显存不足" in answer
    assert "出处：\n[1] presets.md#presets" in answer_from("有哪些预设？", PASSAGES, has_index=True)


@pytest.mark.parametrize(
    ("question", "says"),
    [("Where is Mars?", "Nothing was found in the index for “Where is Mars?”"), ("火星在哪里", "没有找到")],
)
def test_the_mock_says_clearly_that_nothing_was_found(question: str, says: str) -> None:
    assert says in answer_from(question, [], has_index=True)


def test_the_mock_without_an_index_says_what_it_is() -> None:
    assert "no model was asked" in answer_from("hi", [], has_index=False)
    assert "没有调用任何模型" in answer_from("你好", [], has_index=False)


def test_a_long_passage_is_cut_to_the_lines_about_the_question() -> None:
    text = "\n".join(
        [f"Line {number} is about nothing." for number in range(60)] + ["Quantisation saves memory."]
    )
    answer = answer_from("quantisation", [Passage(id=1, source="a.md", text=text, score=1)], has_index=True)
    assert "Quantisation saves memory. [1]" in answer and len(answer) < 600
