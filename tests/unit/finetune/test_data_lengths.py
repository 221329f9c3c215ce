"""Lengths of rows, and what a limit cuts off, by a tokenizer whose tokens are single characters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage.tools.finetune.data import Conversation, Message, RowError, validate_file
from sage.tools.finetune.data.frames import Frames, LearnedText, Rendering, Span
from sage.tools.finetune.data.lengths import LengthCounter
from sage.tools.finetune.data.row_keys import row_key
from sage.tools.finetune.data.text_batch import MOST_CHARACTERS, MOST_TEXTS, TextBatch
from sage.tools.finetune.data.tokenizer_files import Estimate
from sage.tools.finetune.data.training_texts import training_texts


class Characters:
    name = "characters"
    is_estimate = False

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def learned(self, text: str, spans: Sequence[Span]) -> list[range]:
        return [range(*span) for span in spans]


def template(messages: Sequence[Any], tools: Any, add_generation_prompt: bool = False) -> str:
    said = "".join(f"<{m['role'][0]}>{m['content'].strip()}." for m in messages)
    return said + "<a>" * add_generation_prompt


def frames_of(apply: Any, *, is_choosy: bool = False) -> Frames:
    """Of a model whose turns end with a point."""
    return Frames(training_texts("source", apply, {".": 0}, "dots"), is_choosy=is_choosy)


def pair(question: str, answer: str) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_what_lies_beyond_the_limit_is_counted_by_answers() -> None:
    counter = LengthCounter(Characters(), frames_of(template), max_length=20)
    counter.add(pair("q", "short"), None)  # <u>q.<a>short. is 14
    counter.add(pair("q", "0123456789abcdefghij"), None)  # 8 before it: 12 fit, 8 and the point do not
    counter.add(pair("a question that is too long", "lost"), None)
    report = counter.report()
    assert report is not None
    assert (report.total, report.longest, report.too_long) == (14 + 29 + 39, 39, 2)
    assert (report.answer_tokens_cut, report.answers_cut_off) == (9 + 5, 1)
    assert sum(bar.rows for bar in report.histogram) == 3


@given(st.lists(st.integers(0, MOST_CHARACTERS // 3), max_size=20))
def test_a_batch_ends_where_its_texts_are_many_characters(sizes: list[int]) -> None:
    batch, taken = TextBatch[int](), []
    for size in sizes:
        batch.add(size, " " * size)
        if batch.is_full:
            taken.append(batch.take())
    assert all(sum(full) >= MOST_CHARACTERS > sum(full[:-1]) for full in taken)
    rest = batch.take()
    assert sum(rest) < MOST_CHARACTERS
    assert [size for part in (*taken, rest) for size in part] == sizes
    assert batch.take() == []


def test_a_batch_ends_where_its_texts_are_many() -> None:
    batch = TextBatch[None]()
    for _ in range(MOST_TEXTS):
        assert not batch.is_full
        batch.add(None, "short")
    assert batch.is_full


def test_long_rows_are_measured_few_at_a_time() -> None:
    seen: list[int] = []

    class Watched(Characters):
        def count(self, texts: Sequence[str]) -> list[int]:
            seen.append(sum(map(len, texts)))
            return super().count(texts)

    lengths, answer = LengthCounter(Watched(), frames_of(template), 20_000_000), "a" * (MOST_CHARACTERS // 4)
    for _ in range(20):
        lengths.add(pair("q", answer), None)
    report = lengths.report()
    assert report is not None
    assert report.total == sum(seen) == 20 * len(template(pair("q", answer), None))
    assert max(seen) < 1.1 * MOST_CHARACTERS


def test_no_rows_have_no_lengths() -> None:
    assert LengthCounter(Characters(), frames_of(template), 10).report() is None


def test_what_follows_the_last_learned_turn_is_not_counted() -> None:
    thanks, unlearned = pair("thanks", "you are welcome")
    counter = LengthCounter(Characters(), frames_of(template), max_length=20)
    for _ in range(3):
        counter.add([*pair("q", "short"), thanks], None)
        counter.add([*pair("q", "short"), thanks, {**unlearned, "weight": 0}], None)
    report = counter.report()
    assert report is not None
    assert (report.total, report.longest, report.too_long, report.answer_tokens_cut) == (6 * 14, 14, 0, 0)


def rewriting(messages: Sequence[Any], tools: Any, add_generation_prompt: bool = False) -> str:
    """Shows an answer differently where it is the last turn."""
    before, last = template(messages[:-1], tools), template(messages[-1:], tools)
    return before + last.replace("<a>", "<a>now:", 1) + "<a>" * add_generation_prompt


def trimming(trim: Callable[[str], str]) -> Any:
    def apply(messages: Sequence[Any], tools: Any, add_generation_prompt: bool = False) -> str:
        said = "".join(f"<{m['role'][0]}>{trim(m['content'])}." for m in messages)
        return said + "<a>" * add_generation_prompt

    return apply


def test_a_conversation_of_several_rows_is_lost_where_all_of_them_are() -> None:
    counter = LengthCounter(Characters(), frames_of(rewriting), max_length=20)
    for _ in range(3):
        counter.add(pair("q", "short") * 2, None)  # 18 and 32: an answer is kept
        counter.add(pair("a question that is too long", "lost") * 2, None)
    report = counter.report()
    assert report is not None
    assert (report.too_long, report.answers_cut_off) == (3 * (1 + 2), 3)
    assert sum(bar.rows for bar in report.histogram) == 3 * 4


ROLES = st.sampled_from(["system", "user", "assistant"])


TRIMS: list[Callable[[str], str]] = [str, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n")]


@pytest.mark.parametrize("apply", [rewriting, *map(trimming, TRIMS)])
@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(ROLES, st.integers(0, 1)), min_size=1, max_size=5), data=st.data())
def test_frames_give_the_texts_of_training(
    apply: Any, turns: list[tuple[str, int]], data: st.DataObject
) -> None:
    rendering = training_texts("source", apply, {".": 0}, "dots")

    def outcome(render: Rendering, row: Conversation) -> list[LearnedText] | str:
        try:
            return render(row)
        except RowError as error:
            return error.reason

    frames = Frames(rendering)
    for _ in range(4):
        said = data.draw(st.lists(st.text(" \n.<a>xé二"), min_size=len(turns), max_size=len(turns)))
        messages: list[Message] = [
            {"role": role, "content": content, "weight": weight}
            for (role, weight), content in zip(turns, said, strict=True)
        ]
        row = Conversation(messages, "row 1")
        assert outcome(frames.texts, row) == outcome(rendering, row)


@given(st.lists(st.integers(1, 5000), min_size=1), st.integers(1, 3000))
def test_the_histogram_holds_every_row_once(lengths: list[int], max_length: int) -> None:
    frames = Frames(lambda row: [LearnedText(row.messages[0]["content"], [])])
    counter = LengthCounter(Characters(), frames, max_length)
    for length in lengths:
        counter.add([{"role": "user", "content": "x" * length}], None)
    report = counter.report()
    assert report is not None
    bars = report.histogram
    assert sum(bar.rows for bar in bars) == len(lengths)
    assert all(left.most + 1 == right.least for left, right in pairwise(bars))
    assert bars[0].least <= min(lengths) <= max(lengths) <= bars[-1].most
    assert report.median == sorted(lengths)[(len(lengths) + 1) // 2 - 1]


@given(st.text(), st.text())
def test_the_estimate_has_a_place_for_every_token(text: str, more: str) -> None:
    estimate, end = Estimate(), len(text + more)
    first, second = estimate.learned(text + more, [(0, len(text)), (len(text), end)])
    assert (first.start, first.stop, second.stop) == (0, second.start, estimate.count([text + more])[0])


def test_rows_that_the_template_refuses_are_bad_rows_of_a_chosen_model(tmp_path: Path) -> None:
    def strict(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return template(messages, tools, **options)

    path = tmp_path / "rows.jsonl"
    row = {"instruction": "i", "output": "a long answer"}
    path.write_text("\n".join(json.dumps(r) for r in (row, {**row, "system": "S"})))
    told = "cannot be learned by dots: the chat template refuses it (System role not supported)"
    report = validate_file(path, lengths=LengthCounter(Characters(), frames_of(strict), max_length=5))
    assert (report.rows, report.good, report.refused) == (2, 1, 0)
    assert [(bad.row, bad.field, bad.reason) for bad in report.bad] == [(2, "row", told)]
    assert report.tokens is not None
    assert sum(bar.rows for bar in report.tokens.histogram) == 1

    unchosen = LengthCounter(Characters(), frames_of(strict), 5, is_model_chosen=False)
    report = validate_file(path, lengths=unchosen)
    assert (report.good, report.bad, report.refused) == (2, [], 1)
    assert report.notes == [f"training characters would stop at 1 row: row 2 of rows.jsonl {told}"]
    report = validate_file(path, lengths=LengthCounter(Characters(), frames_of(template), 5))
    assert (report.good, report.refused, report.notes) == (2, 0, [])


def test_only_what_training_renders_decides(tmp_path: Path) -> None:
    """A conversation is learned up to its last answer: what follows that no template is shown."""

    def strict(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        roles = [message["role"] for message in messages]
        if ("user", "user") in pairwise(roles):
            raise ValueError("Roles must alternate")
        return template(messages, tools, **options)

    user, says = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    path = tmp_path / "rows.jsonl"
    talks = [[user, says], [user, user, says], [user, says, user, user], [user, says, user, user, says]]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    for is_choosy in (True, False):
        counter = LengthCounter(Characters(), frames_of(strict, is_choosy=is_choosy), 90)
        assert [bad.row for bad in validate_file(path, lengths=counter).bad] == [2, 4]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_what_the_template_refuses_in_either_answer_of_a_pair_is_told(tmp_path: Path, method: str) -> None:
    def strict(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        if any("<image>" in message["content"] for message in messages):
            raise ValueError("No images")
        return template(messages, tools, **options)

    path = tmp_path / "rows.jsonl"
    long, short = "a longer answer", "<image>"
    answers = [(long, "no"), (long, short), (short, long), (short, "<image>?"), ("yes", long)]
    rows = [{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    path.write_text("\n".join(map(json.dumps, rows)))
    counter = LengthCounter(Characters(), frames_of(strict, is_choosy=True), max_length=100)
    report = validate_file(path, method=method, lengths=counter)
    assert [bad.row for bad in report.bad] == [2, 3, 4]
    assert all("refuses it (No images)" in bad.reason for bad in report.bad)
    assert report.tokens is not None
    assert sum(bar.rows for bar in report.tokens.histogram) == 2


CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
ASKED, CALLS = (
    {"role": "user", "content": "Is the weather fine?"},
    {"role": "assistant", "tool_calls": [CALL]},
)
RESULT, SAYS = {"role": "tool", "content": "weather: fine"}, {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("row", "method", "refused"),
    [
        ({"messages": [ASKED, CALLS]}, None, True),
        ({"messages": [ASKED, CALLS, RESULT, SAYS]}, None, True),
        ({"messages": [ASKED, CALLS | {"weight": 0}, RESULT, SAYS]}, None, False),
        ({"messages": [ASKED, CALLS | {"content": "I look."}, RESULT, SAYS]}, None, False),
        ({"prompt": [ASKED], "chosen": [CALLS], "rejected": [SAYS]}, "dpo", True),
        ({"prompt": [ASKED, CALLS, RESULT], "chosen": "Yes.", "rejected": "No."}, "dpo", False),
        ({"prompt": [ASKED, CALLS, RESULT], "completion": "Yes.", "label": True}, "kto", False),
    ],
)
def test_a_template_that_leaves_calls_out_refuses_rows_that_would_teach_silence(
    tmp_path: Path, row: Any, method: str | None, refused: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"tools": [CALL]}) + "\n")

    def silent(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        return json.dumps(tools) + template(messages, tools, **options)

    def telling(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        shown = [m | {"content": m["content"] + str(m.get("tool_calls", ""))} for m in messages]
        return silent(shown, tools, **options)

    bad = [
        validate_file(path, method=method, lengths=LengthCounter(Characters(), frames_of(one), 900)).bad
        for one in (silent, telling)
    ]
    estimated = validate_file(path, method=method, lengths=LengthCounter(Estimate(), Frames(), 900)).bad
    assert (bad[1], estimated) == ([], [])
    assert ["leaves tool calls out" in row.reason for row in bad[0]] == [True] * refused


def test_tools_are_counted_wherever_the_row_has_them(tmp_path: Path) -> None:
    def with_tools(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        return json.dumps(tools) + template(messages, tools, **options)

    tools = [{"type": "function", "function": {"name": "add"}}]
    openai = {
        "input": {"messages": [{"role": "user", "content": "p"}], "tools": tools},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    }
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([openai]))
    for method in ("dpo", "kto"):
        counter = LengthCounter(Characters(), frames_of(with_tools), 10_000)
        tokens = validate_file(path, method=method, lengths=counter).tokens
        assert tokens is not None
        assert tokens.total == len(with_tools(pair("p", "good"), tools))


@pytest.mark.parametrize("is_choosy", [True, False])
@given(st.lists(st.text("as \n"), min_size=2, max_size=6))
def test_without_a_template_answers_are_learned_with_their_ends(is_choosy: bool, said: list[str]) -> None:
    frames = Frames(is_choosy=is_choosy)
    roles = ["user", "assistant"] * 3
    messages: list[Message] = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    for _ in range(3):
        ((text, learned),) = frames.texts(Conversation(messages, "row 1"))
        assert [text[slice(*span)] for span in learned] == [f"{words}<|im_end|>" for words in said[1::2]]
        assert learned[-1][1] == len(text)


def test_thoughts_beside_an_answer_are_counted_and_tell_rows_apart() -> None:
    def thinking(messages: Sequence[Any], tools: Any, **options: Any) -> str:
        return "".join(m.get("reasoning_content", "") + m["content"] + "." for m in messages)

    asked: Message = {"role": "user", "content": "Q"}
    plain: Message = {"role": "assistant", "content": "A"}
    thought: Message = {**plain, "reasoning_content": "because"}
    frames = frames_of(thinking)
    for _ in range(3):
        assert frames.texts(Conversation([asked, plain], "row 1"))[0].text == "Q.A."
        assert frames.texts(Conversation([asked, thought], "row 1"))[0].text == "Q.becauseA."
    assert row_key([asked, plain], None) != row_key([asked, thought], None)
