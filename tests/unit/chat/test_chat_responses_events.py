"""What chat answers becomes a Response; streamed or in one piece, it is the same one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from sage_chat.completions import DONE, Completion, error_event, usage
from sage_chat.responses_dialect import opened
from sage_chat.responses_events import ResponseBuilder, StreamTranslator, response_from
from sage_contracts.errors import EngineFailedError, RateLimitedError
from sage_contracts.responses import ResponseRequest

ASKED = ResponseRequest(input="Hello", model="asked", metadata={"a": "b"})  # type: ignore[arg-type]
COUNTED = usage(3, 5) | {
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
Delta = dict[str, Any]

pieces = st.lists(st.text(min_size=1, max_size=6), max_size=5)
calls = st.lists(st.lists(st.text(min_size=1, max_size=4), max_size=3), max_size=3)
reasons = st.sampled_from(["stop", "length", "content_filter", "tool_calls"])


def translator() -> StreamTranslator:
    return StreamTranslator(ResponseBuilder(opened(ASKED)))


def read(content: bytes) -> list[Any]:
    """The events, each as the official SDK's model has it."""
    events = []
    for block in content.decode().strip().split("\n\n"):
        named, data = block.split("\n")
        parsed = EVENT.validate_json(data.removeprefix("data: "))
        assert named == f"event: {parsed.type}"
        events.append(parsed)
    return events


def deltas_of(
    thoughts: list[str], texts: list[str], refusals: list[str], arguments: list[list[str]]
) -> list[Delta]:
    deltas: list[Delta] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning": text, "reasoning_content": text} for text in thoughts]
    deltas += [{"content": text} for text in texts] + [{"refusal": text} for text in refusals]
    for number, parts in enumerate(arguments):
        function = {"name": f"f{number}", "arguments": ""}
        opening = {"index": number, "id": f"call_{number}", "type": "function", "function": function}
        deltas.append({"tool_calls": [opening]})
        deltas += [{"tool_calls": [{"index": number, "function": {"arguments": part}}]} for part in parts]
    return deltas


def message_of(
    thoughts: list[str], texts: list[str], refusals: list[str], arguments: list[list[str]]
) -> Delta:
    called = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": f"f{number}", "arguments": "".join(parts)},
        }
        for number, parts in enumerate(arguments)
    ]
    said = {"content": texts, "reasoning_content": thoughts, "refusal": refusals}
    told = {name: "".join(parts) or None for name, parts in said.items()}
    return {"role": "assistant", **told, "tool_calls": called}


def fed(chunks: list[bytes]) -> list[Any]:
    one = translator()
    return read(b"".join([event for chunk in chunks for event in one.feed(chunk)] + one.close()))


def nameless(response: Response) -> Any:
    """What does not differ by chance or by the clock."""
    plain = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in plain["output"]:
        item["id"] = item["id"].rpartition("_")[2]
    return plain


@given(pieces, pieces, pieces, calls, reasons, st.integers(1, 40), st.booleans())
@example(["Hm"], ["Hallo"], [], [["{", "}"]], "stop", 1, True)
def test_a_stream_tells_the_same_response_as_one_piece(
    thoughts: list[str],
    texts: list[str],
    refusals: list[str],
    arguments: list[list[str]],
    reason: str,
    chunk_bytes: int,
    is_crlf: bool,
) -> None:
    completion = Completion("served")
    events = [completion.chunk(delta) for delta in deltas_of(thoughts, texts, refusals, arguments)]
    content = b"".join([*events, completion.chunk({}, reason), completion.usage_chunk(COUNTED), DONE])
    if is_crlf:
        content = content.replace(b"\n", b"\r\n")
    chunks = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]
    told = fed(chunks)
    message = message_of(thoughts, texts, refusals, arguments)
    answer = json.loads(completion.whole(message, reason, COUNTED))
    whole = Response.model_validate_json(response_from(answer, ASKED))

    assert nameless(told[-1].response) == nameless(whole)
    assert whole.output_text == "".join(texts)
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert {event.response.id for event in told if hasattr(event, "response")} == {told[0].response.id}
    _holds_together(told)


def _holds_together(told: list[Any]) -> None:
    """Deltas add up to what is done, in the place where it was opened, and the end repeats it."""
    final = told[-1].response
    for index, item in enumerate(final.output):
        about = [event for event in told if getattr(event, "output_index", None) == index]
        assert about[0].type == "response.output_item.added" and about[0].item.id == item.id
        assert about[-1].type == "response.output_item.done" and about[-1].item == item
        assert {event.item_id for event in about[1:-1]} <= {item.id}
        for done in (event for event in about if event.type.endswith(".done") and event is not about[-1]):
            if done.type == "response.content_part.done":
                assert done.part.to_dict() == item.content[done.content_index].to_dict()
                continue
            topic = done.type.removesuffix(".done")
            place = getattr(done, "content_index", None)
            grown = [
                event.delta
                for event in about
                if event.type == f"{topic}.delta" and getattr(event, "content_index", None) == place
            ]
            whole = {"text", "refusal", "arguments"} & set(type(done).model_fields)
            assert "".join(grown) == getattr(done, whole.pop())


def test_the_order_of_events_is_openais() -> None:
    completion = Completion("served")
    chunks = [completion.chunk({"content": "Hi"}), completion.chunk({}, "stop"), DONE]
    assert [event.type.removeprefix("response.") for event in fed(chunks)] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_each_chunk_is_told_at_once() -> None:
    one, completion = translator(), Completion("served")
    for word in ("one", " two"):
        assert read(b"".join(one.feed(completion.chunk({"content": word}))))[-1].delta == word


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_how_it_ended(reason: str, status: str, why: str | None) -> None:
    answer = json.loads(Completion("served").whole({"content": "Hi"}, reason, COUNTED))
    response = Response.model_validate_json(response_from(answer, ASKED))
    details = response.incomplete_details
    assert response.status == status == response.output[0].status  # type: ignore[union-attr]
    assert (details.reason if details else None) == why
    assert (response.completed_at is None) is (why is not None)
    assert (response.model, response.metadata) == ("served", {"a": "b"})
    assert response.usage is not None and response.usage.model_dump(exclude_none=True) == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 8,
    }


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    answer = json.loads(Completion("served").whole({"content": ""}, "stop", COUNTED))
    (item,) = Response.model_validate_json(response_from(answer, ASKED)).output
    assert item.type == "message" and [part.type for part in item.content] == ["output_text"]


def test_what_a_model_thinks_is_an_item_before_what_it_says() -> None:
    answer = json.loads(Completion("served").whole({"content": "4", "reasoning": "2+2"}, "stop", COUNTED))
    thought, said = Response.model_validate_json(response_from(answer, ASKED)).output
    assert thought.type == "reasoning" and thought.content is not None and thought.content[0].text == "2+2"
    assert said.type == "message" and said.id != thought.id


def test_comments_of_a_cold_engine_pass_before_anything_is_made() -> None:
    one = translator()
    assert one.feed(b": starting engine 3s\n\n") == [b": starting engine 3s\n\n"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFailedError("the weights are damaged"), "server_error"),
        (RateLimitedError("slow down"), "rate_limit_exceeded"),
    ],
)
def test_an_error_in_the_stream_fails_the_response_and_keeps_what_was_said(error: Any, code: str) -> None:
    one, completion = translator(), Completion("served")
    first = one.feed(completion.chunk({"content": "Hi"}))
    last = one.feed(error_event(error.to_body("engine")))
    assert one.feed(DONE) == [] and one.close() == []
    failed = read(b"".join([*first, *last]))[-1]
    assert failed.type == "response.failed" and failed.response.status == "failed"
    assert (failed.response.error.code, failed.response.error.message) == (code, error.message)
    assert failed.response.output_text == "Hi" and failed.response.output[0].status == "incomplete"


def test_an_error_before_the_first_word_is_told_the_same_way() -> None:
    told = fed([error_event(EngineFailedError("it died").to_body("engine")), DONE])
    assert [event.type for event in told] == ["response.created", "response.in_progress", "response.failed"]


@pytest.mark.parametrize("spoilt", [b"data: {\n\n", b"data: [1]\n\n", b""])
def test_a_stream_that_breaks_off_does_not_look_complete(spoilt: bytes) -> None:
    failed = fed([Completion("served").chunk({"content": "Hi"}), spoilt])[-1]
    assert failed.type == "response.failed" and failed.response.error.message


@pytest.mark.parametrize("index", [{}, {"index": 0}])
def test_whole_calls_of_one_index_are_told_apart_by_their_ids(index: dict[str, int]) -> None:
    completion = Completion("served")
    cities = ['{"city": "Wuhan"}', '{"city": "Berlin"}']
    deltas = [
        {"tool_calls": [{**index, "id": f"id{number}", "function": {"name": "weather", "arguments": city}}]}
        for number, city in enumerate(cities)
    ]
    more: Delta = {"tool_calls": [{**index, "id": "id1", "function": {"name": "weather", "arguments": " "}}]}
    told = fed(
        [*(completion.chunk(delta) for delta in [*deltas, more]), completion.chunk({}, "tool_calls"), DONE]
    )
    called = [(item.call_id, item.arguments) for item in told[-1].response.output]
    assert called == [("id0", cities[0]), ("id1", cities[1] + " ")]
    _holds_together(told)


@pytest.mark.parametrize("more", [{}, {"id": "id0"}, {"id": "another for each piece"}])
def test_a_piece_without_a_name_goes_on_with_the_call(more: dict[str, str]) -> None:
    completion = Completion("served")
    first = {"index": 0, "id": "id0", "function": {"name": "weather", "arguments": "{"}}
    second = {"index": 0, **more, "function": {"arguments": "}"}}
    chunks = [completion.chunk({"tool_calls": [piece]}) for piece in (first, second)]
    (item,) = fed([*chunks, DONE])[-1].response.output
    assert (item.call_id, item.arguments) == ("id0", "{}")


def test_the_data_of_an_event_may_take_several_lines_and_say_that_there_is_no_error() -> None:
    lines = json.dumps(
        {"error": None, "choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}, indent=1
    ).split("\n")
    event = "\n".join(f"data: {line}" for line in lines) + "\n\n"
    assert fed([event.encode(), DONE])[-1].response.output_text == "Hi"


def test_a_missing_end_mark_is_no_error_when_the_model_was_done() -> None:
    completion = Completion("served")
    assert fed([completion.chunk({"content": "Hi"}), completion.chunk({}, "stop")])[-1].type == (
        "response.completed"
    )


def test_of_several_choices_the_first_is_the_response() -> None:
    second = {"choices": [{"index": 1, "delta": {"content": "No"}, "finish_reason": None}]}
    completion = Completion("served")
    told = fed([completion.chunk({"content": "Hi"}), b"data: " + json.dumps(second).encode() + b"\n\n", DONE])
    assert told[-1].response.output_text == "Hi"
