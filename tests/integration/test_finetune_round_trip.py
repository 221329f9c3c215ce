"""Rows of every format: the accepted become the ids of the tokenizer's own template, the others are named."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.chat_templates import FAMILIES, make_tokenizer

from sage.tools.finetune.data import FORMATS, Conversation, RowError, load_conversations, load_rows
from sage.tools.finetune.data.formats import to_conversation
from sage.tools.finetune.data.preferences import rated, to_preference
from sage.tools.finetune.rendering import ChatRenderer
from sage_contracts.errors import InvalidDataError

words = st.text(max_size=12)
tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def turns(first: str = "user") -> st.SearchStrategy[list[dict[str, Any]]]:
    """Turns that may be wanting: of unknown roles, without text, without an answer."""
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abcdefghi", "function": {"name": "look", "arguments": '{"at": "é"}'}}],
    }
    turn = st.one_of(
        st.builds(lambda role, text: {"role": role, "content": text}, st.just(first), words),
        st.builds(
            lambda text, weight: {"role": "assistant", "content": text, **({} if weight else {"weight": 0})},
            words,
            st.booleans(),
        ),
        st.just(call),
        st.builds(lambda text: {"role": "tool", "content": text, "tool_call_id": "abcdefghi"}, words),
        st.sampled_from(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "nobody", "content": "x"},
                {"role": "user"},
                7,
            ]
        ),
    )
    asked = st.builds(lambda text: {"role": "user", "content": text}, words)
    answered = st.builds(lambda text: {"role": "assistant", "content": text}, words)
    plain = st.lists(st.tuples(asked, answered), min_size=1, max_size=3).map(
        lambda p: [t for pair in p for t in pair]
    )
    return plain | st.lists(turn, max_size=5)


def share_gpt(chat: list[Any]) -> list[Any]:
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names.get(t["role"], t["role"]), "value": t["content"]}
        if isinstance(t, dict) and set(t) == {"role", "content"}
        else t
        for t in chat
    ]


def fields(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of which one may be wrong, and any but the first may be missing."""
    wrong = st.sampled_from([None, 3, "", " \n", [], {}])
    first = next(iter(strategies))
    optional = {name: value | wrong for name, value in strategies.items() if name != first}
    return st.fixed_dictionaries({first: strategies[first] | wrong}, optional=optional)


answer = st.builds(lambda text: [{"role": "assistant", "content": text}], words) | words
ROWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "alpaca": fields(instruction=words, input=words, output=words, system=words),
    "qa": fields(question=words, answer=words, context=words),
    "prompt_completion": fields(prompt=words, completion=words)
    | st.fixed_dictionaries({"prompt": turns(), "completion": turns("assistant")}),
    "text": fields(text=words),
    "messages": fields(messages=turns(), tools=st.just(tools)),
    "conversations": fields(conversations=turns() | turns().map(share_gpt), system=words),
    "preference": fields(chosen=answer, rejected=answer, prompt=words),
    "openai_preference": fields(
        input=st.fixed_dictionaries({"messages": turns()}),
        preferred_output=answer,
        non_preferred_output=answer,
    ),
    "rated": st.fixed_dictionaries({"prompt": words, "completion": answer, "label": st.booleans()}),
}


@functools.cache
def tokenizer_of(family: str) -> Any:
    return make_tokenizer(FAMILIES[family], merges=True)


def conversations_in(value: Any, origin: str) -> Iterator[Conversation]:
    """What a row is trained on: itself, or each answer of a preference."""
    try:
        yield to_conversation(value, origin)
    except RowError:
        for one in rated(to_preference(value, origin)):
            yield Conversation([*one.prompt_messages, *one.answer], origin, one.tools)


def assert_same_ids(tokenizer: Any, row: Conversation) -> None:
    """Every text is `apply_chat_template(messages[: k + 1])` for a learned turn k, cut behind its end."""

    def own(turn: int) -> list[int]:
        shown = [{k: v for k, v in m.items() if k != "weight"} for m in row.messages[: turn + 1]]
        return list(tokenizer.apply_chat_template(shown, tools=row.tools)["input_ids"])

    learned = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("weight", 1)]
    texts = list(ChatRenderer(tokenizer, 10_000).tokenised([row]))
    wholes = {turn: own(turn) for turn in learned}
    ends = 0
    for text in texts:
        size = len(text.ids)
        of = [turn for turn, ids in wholes.items() if ids[:size] == text.ids]
        assert of, "a text that the tokenizer's own template does not give"
        assert any(_is_between_turns(tokenizer, wholes[turn][size:]) for turn in of)
        assert text.labels[-1] == text.ids[-1]
        ends += len(text.rendered.turn_ends)
    assert texts[0].ids == wholes[learned[-1]][: len(texts[0].ids)]
    assert ends == len(learned)


def _is_between_turns(tokenizer: Any, ids: list[int]) -> bool:
    added = set(tokenizer.get_added_vocab().values())
    return not tokenizer.decode([token for token in ids if token not in added]).strip()


def test_every_format_has_rows_here() -> None:
    assert set(ROWS) == {name for name, _ in FORMATS}


@pytest.mark.parametrize("family", ["chatml", "llama31", "mistral", "gemma", "qwen3", "phi3"])
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.one_of(*ROWS.values()), min_size=1, max_size=6))
def test_rows_render_as_the_tokenizer_would_or_are_named(
    family: str, rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = tokenizer_of(family)
    not_supervised = []
    for row in load_rows(path):
        try:
            to_conversation(row.content(), row.origin)
        except RowError:
            not_supervised.append(row.number)
        try:
            found = list(conversations_in(row.content(), row.origin))
        except RowError as error:
            assert error.field
            assert error.reason
            continue
        for conversation in found:
            try:
                assert_same_ids(tokenizer, conversation)
            except InvalidDataError as error:
                assert f"row {row.number} of rows.json" in error.message
    if not_supervised:
        with pytest.raises(InvalidDataError) as refused:
            load_conversations(path)
        named = re.findall(r"rows? (\d+(?:, \d+)*), field ", refused.value.message)
        assert set(not_supervised[:5]) <= {int(number) for each in named for number in each.split(", ")}
    else:
        assert len(load_conversations(path)) == len(rows)
