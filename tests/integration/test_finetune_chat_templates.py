"""Masks on the templates of well-known model families, held against their own generation markers."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.chat_templates import FAMILIES, Family, make_tokenizer
from tokenizers import AddedToken

from sage.tools.finetune.data import Conversation, Message
from sage.tools.finetune.data.formats import to_conversation
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.rendering import ChatRenderer, TokenisedText
from sage_contracts.errors import InvalidDataError

Turn = tuple[tuple[int, ...], str]
"""All ids up to the end of a learned turn, and the text of what is learned of them."""

SYSTEM: Message = {"role": "system", "content": "Be brief."}
TALK: list[Message] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Two it is."},
]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
TOOL_TALK: list[Any] = [
    {"role": "user", "content": "Is it cold in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Oslo"}},
            }
        ],
    },
    {"role": "tool", "content": "-4", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "It is: -4 degrees."},
]
each_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def tokenizer_of(name: str, **options: bool) -> Any:
    return make_tokenizer(FAMILIES[name], **options)


def tokenised(tokenizer: Any, row: Conversation) -> list[TokenisedText]:
    return list(ChatRenderer(tokenizer, 10_000).tokenised([row]))


def learned_turns(tokenizer: Any, row: Conversation) -> set[Turn]:
    """Found by prefixes, as the product does it."""
    found: set[Turn] = set()
    for text in tokenised(tokenizer, row):
        start = None
        for position, label in enumerate([*text.labels, IGNORED]):
            if label != IGNORED and start is None:
                start = position
            elif label == IGNORED and start is not None:
                ids = tuple(text.ids[:position])
                found.add((ids, tokenizer.decode(ids[start:])))
                start = None
    return found


def marked_turns(tokenizer: Any, family: Family, row: Conversation) -> set[Turn]:
    """The same, as transformers finds it by the template's generation markers, turn by turn."""
    found: set[Turn] = set()
    for turn, message in enumerate(row.messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        shown = [{k: v for k, v in m.items() if k != "weight"} for m in row.messages[: turn + 1]]
        encoded = tokenizer.apply_chat_template(
            shown,
            tools=row.tools,
            chat_template=family.marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = encoded["assistant_masks"]
        end = len(mask) - mask[::-1].index(1)
        start = next(i for i in range(end - 1, -2, -1) if i < 0 or not mask[i]) + 1
        ids = tuple(encoded["input_ids"][:end])
        found.add((ids, tokenizer.decode(ids[start:])))
    return found


def talks(family: Family) -> list[Conversation]:
    rows = [Conversation(TALK, "row 1"), Conversation(TALK[:2], "row 1")]
    rows.append(Conversation([TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]], "row 1"))
    if family.has_system:
        rows.append(Conversation([SYSTEM, *TALK], "row 1"))
    if family.has_tools:
        rows.append(Conversation(TOOL_TALK, "row 1", [WEATHER]))
        rows.append(Conversation([SYSTEM, *TOOL_TALK, *TALK], "row 1", [WEATHER]))
    return rows


@each_family
def test_masks_without_markers_are_those_of_the_markers(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    for row in talks(family):
        assert learned_turns(tokenizer, row) == marked_turns(tokenizer, family, row)


@each_family
def test_a_template_with_markers_gives_the_same_masks(name: str) -> None:
    family = FAMILIES[name]
    marked = make_tokenizer(family)
    marked.chat_template = family.marked
    for row in talks(family):
        assert learned_turns(marked, row) == learned_turns(tokenizer_of(name), row)


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize("name", ["chatml", "llama3", "phi4", "r1", "qwen25", "llama31"])
def test_a_turn_that_only_calls_is_refused_where_the_template_leaves_calls_out(name: str, tools: Any) -> None:
    row = Conversation(TOOL_TALK, "row 7 of rows.jsonl", tools)
    if FAMILIES[name].has_tools:
        assert any("weather" in said for _, said in learned_turns(tokenizer_of(name), row))
        return
    with pytest.raises(
        InvalidDataError, match=r"row 7 of rows\.jsonl: .*leaves tool calls out.*choose another"
    ):
        tokenised(tokenizer_of(name), row)
    answered: list[Any] = [TOOL_TALK[0], TOOL_TALK[1] | {"weight": 0}, *TOOL_TALK[2:]]
    assert tokenised(tokenizer_of(name), Conversation(answered, "row 7", tools))


# Special tokens in people's text are theirs to avoid; the text of one would end a turn within it.
words = st.text(min_size=1, max_size=20).filter(
    lambda text: text.strip() and "<" not in text and "[" not in text
)


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Conversation:
    messages: list[Message] = []
    if family.has_system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    turns = draw(st.integers(1, 3))
    for turn in range(turns):
        messages.append({"role": "user", "content": draw(words)})
        said = draw(words)
        # White space that a special token swallows is nobody's: only we do not count it as the answer's.
        answer: Message = {"role": "assistant", "content": said.strip() if family.is_stripping else said}
        if turn < turns - 1 and draw(st.booleans()):
            answer["weight"] = 0
        messages.append(answer)
    return Conversation(messages, "row 7")


@each_family
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_conversation_is_masked_as_the_markers_say(name: str, data: st.DataObject) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    row = data.draw(conversations(family))
    assert learned_turns(tokenizer, row) == marked_turns(tokenizer, family, row)


@each_family
@pytest.mark.parametrize(
    "options", [{"trims_offsets": True}, {"merges": True}, {"trims_offsets": True, "merges": True}]
)
def test_how_a_tokenizer_cuts_white_space_changes_no_mask(name: str, options: dict[str, bool]) -> None:
    for row in talks(FAMILIES[name]):
        plain = {text for _, text in learned_turns(tokenizer_of(name), row)}
        assert {text for _, text in learned_turns(tokenizer_of(name, **options), row)} == plain


@each_family
@settings(max_examples=15, deadline=None)
@given(data=st.data(), trims=st.booleans())
def test_every_end_of_turn_is_learned_and_no_question(name: str, data: st.DataObject, trims: bool) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name, trims_offsets=trims, merges=True)
    row = data.draw(conversations(family))
    turns = learned_turns(tokenizer, row)
    weighted = [m for m in row.messages if m["role"] == "assistant" and m.get("weight", 1)]
    assert len(turns) == len(weighted)
    assert all(text.rstrip("\n").endswith(family.turn_end) for _, text in turns)
    assert all(text.count(family.turn_end) == 1 for _, text in turns)
    answers = {m["content"].strip() for m in weighted}
    assert all(
        any(text.split(family.turn_end)[0].rstrip().endswith(answer[1:]) for answer in answers)
        for _, text in turns
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
            "<|im_start|>assistant\nYes, one.<|im_end|>",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes, one.<|eot_id|>",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nOne?[/INST] Yes, one.</s>"),
        (
            "qwen3",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nYes, one.<|im_end|>",
        ),
        (
            "phi3",
            "<|system|>\nBe brief.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\nYes, one.<|end|>",
        ),
        (
            "phi4",
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>One?<|im_end|>"
            "<|im_start|>assistant<|im_sep|>Yes, one.<|im_end|>",
        ),
    ],
)
def test_the_text_is_the_familys(name: str, expected: str) -> None:
    (text,) = tokenised(tokenizer_of(name), Conversation([SYSTEM, *TALK[:2]], "row 1"))
    assert text.rendered.text == expected


def test_a_call_of_a_tool_is_learned_with_its_end() -> None:
    expected = {
        "llama31": [
            '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
            "It is: -4 degrees.<|eot_id|>",
        ],
        "mistral": [
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>',
            " It is: -4 degrees.</s>",
        ],
        "qwen25": [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
            "It is: -4 degrees.<|im_end|>",
        ],
        "qwen3": [
            '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n'
            "</tool_call><|im_end|>",
            "<think>\n\n</think>\n\nIt is: -4 degrees.<|im_end|>",
        ],
        "qwq": [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
            "It is: -4 degrees.<|im_end|>",
        ],
    }
    for name, turns in expected.items():
        assert sorted(
            text for _, text in learned_turns(tokenizer_of(name), Conversation(TOOL_TALK, "row 1", [WEATHER]))
        ) == sorted(turns)


@pytest.mark.parametrize("name", ["qwq", "r1"])
@pytest.mark.parametrize("answer", ["<html>Two.</html>", "<thanks>", "Xq7, Xq8"])
def test_an_answer_that_begins_as_an_opened_thought_does_is_learned_whole(name: str, answer: str) -> None:
    row = Conversation([TALK[0], {"role": "assistant", "content": answer}], "row 1")
    assert {text for _, text in learned_turns(tokenizer_of(name), row)} == {answer + FAMILIES[name].turn_end}


@pytest.mark.parametrize("is_nothing_needed", [True, False])
@pytest.mark.parametrize(
    "arguments", ["call['function']['arguments']", "call['function']['arguments'] | tojson"]
)
def test_calls_are_learned_however_the_template_wants_them(is_nothing_needed: bool, arguments: str) -> None:
    tokenizer = make_tokenizer(FAMILIES["r1calls"])
    wanted = tokenizer.chat_template.replace("call['function']['arguments']", arguments)
    if not is_nothing_needed:  # an empty content will do
        wanted = wanted.replace("m['content'] is none", "m['content'] == '' and m['tool_calls']")
    tokenizer.chat_template = wanted
    oslo = deepcopy(TOOL_TALK)
    oslo[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Ørsta", "days": [1]}
    turns = learned_turns(tokenizer, Conversation(oslo, "row 1", [WEATHER]))
    assert {text for _, text in turns} == {
        '<|tool_call|>weather\n{"city": "Ørsta", "days": [1]}<|end_of_sentence|>',
        "It is: -4 degrees.<|end_of_sentence|>",
    }


def test_thoughts_in_an_answer_are_learned_as_the_template_shows_them() -> None:
    answer = "<think>\nOne and one.\n</think>\n\nTwo."
    row = Conversation([TALK[0], {"role": "assistant", "content": answer}, *TALK[2:]], "row 1")
    assert {text for _, text in learned_turns(tokenizer_of("qwen3"), row)} == {
        f"{answer}<|im_end|>",
        "<think>\n\n</think>\n\nTwo it is.<|im_end|>",
    }


@pytest.mark.parametrize("name", ["qwq", "r1"])
def test_an_answer_whose_thoughts_the_template_cuts_out_is_refused(name: str) -> None:
    thinks = {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\nTwo."}
    answer_last: list[Any] = [*TALK[:2], TALK[2], thinks]
    answer_first: list[Any] = [TALK[0], thinks, *TALK[2:]]
    for messages in (answer_last, answer_first):
        with pytest.raises(InvalidDataError, match=r"row 4 of rows\.jsonl: .*</think>.*choose another"):
            tokenised(tokenizer_of(name), Conversation(messages, "row 4 of rows.jsonl"))
    context: list[Any] = [TALK[0], thinks | {"weight": 0}, *TALK[2:]]
    assert tokenised(tokenizer_of(name), Conversation(context, "row 4"))
    empty: list[Any] = [TALK[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nTwo."}]
    assert tokenised(tokenizer_of(name), Conversation(empty, "row 4"))


@pytest.mark.parametrize(
    "answer",
    [
        "<think>One and one.</think>Two.",
        "<think>\n\n  One and one.\t\n\n</think>Two.",
        "One and one.\n</think>\nTwo.",
        "Two. It thinks between <think> and a mark of its end.",
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "chatml", "llama3"])
def test_a_template_may_space_thoughts_as_it_likes(name: str, answer: str) -> None:
    row = Conversation([TALK[0], {"role": "assistant", "content": answer}], "row 1")
    ((_, learned),) = learned_turns(tokenizer_of(name), row)
    assert ("One and one." in learned) == ("One and one." in answer)


def test_thoughts_beside_an_answer_are_learned_as_the_template_shows_them() -> None:
    turn = {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."}
    row = to_conversation({"messages": [{"role": "user", "content": "1+1?"}, turn]}, "row 1")
    for name, thoughts in (("qwen3", "<think>\nOne and one.\n</think>\n\n"), ("qwen25", "")):
        learned = {text for _, text in learned_turns(tokenizer_of(name), row)}
        assert learned == {f"{thoughts}Two.<|im_end|>"}


def test_a_system_turn_that_a_family_refuses_names_its_row() -> None:
    with pytest.raises(
        InvalidDataError, match=r"row 3: the chat template refuses it \(System role not supported\)"
    ):
        tokenised(tokenizer_of("gemma"), Conversation([SYSTEM, *TALK], "row 3"))


def test_markers_that_leave_out_the_end_of_turn_stop_the_run() -> None:
    family = FAMILIES["chatml"]
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = family.marked.replace(
        "{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert tokenizer.chat_template != family.marked
    with pytest.raises(InvalidDataError, match=r"row 9: .* markers leave out the token that ends"):
        tokenised(tokenizer, Conversation(TALK, "row 9"))


def test_markers_may_leave_out_what_the_author_would_not_teach() -> None:
    family = FAMILIES["chatml"]
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = family.marked.replace("{% generation %}", "{{ 'Well: ' }}{% generation %}")
    turns = learned_turns(tokenizer, Conversation(TALK[:2], "row 1"))
    assert {text for _, text in turns} == {"Yes, one.<|im_end|>"}


def test_an_end_of_turn_that_the_tokenizer_takes_apart_stops_the_run() -> None:
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    # Found beside a full stop, not beside a letter.
    tokenizer.add_tokens([AddedToken("<turn_end>", single_word=True)])
    tokenizer.chat_template = FAMILIES["chatml"].unmarked.replace("<|im_end|>", "<turn_end>")
    rows = [
        Conversation([TALK[0], {"role": "assistant", "content": answer}], f"row {row}")
        for row, answer in ((1, "Yes."), (2, "Yes"))
    ]
    with pytest.raises(InvalidDataError, match=r"row 2: the token that ends .* carries no loss"):
        ChatRenderer(tokenizer, 100).samples(rows)


def test_a_cut_row_may_lose_its_end_and_is_counted() -> None:
    renderer = ChatRenderer(tokenizer_of("chatml"), 40)
    (sample,) = renderer.samples(
        [Conversation([TALK[0], {"role": "assistant", "content": "x" * 99}], "row 1")]
    )
    assert len(sample.ids) == 40
    assert sample.labels[-1] == sample.ids[-1]
    assert (renderer.stats.truncated, renderer.stats.dropped) == (1, 0)
