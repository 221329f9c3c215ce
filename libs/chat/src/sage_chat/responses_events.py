"""From chat completions back to OpenAI's Responses API, in one piece or as events. Pure.

Source: OpenAI API reference, "Responses", "Streaming events".
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sage_chat.completions import event, to_json
from sage_chat.events import EventSplitter, data_of
from sage_chat.grounding import text_of
from sage_chat.responses_dialect import opened, usage_of
from sage_chat.upstream import error_body
from sage_contracts.errors import ErrorDetail, UpstreamError
from sage_contracts.responses import ResponseRequest

# finish_reason of chat → incomplete_details.reason.
_CUT_SHORT = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a field of chat's message is called here."""

    prefix: str
    """Of its item's id: texts of one prefix are parts of one item."""
    part_type: str
    text_name: str
    more: dict[str, Any] = field(default_factory=dict)
    """What its part has besides."""


_KINDS = {
    "reasoning": _Kind("rs", "reasoning_text", "text"),
    "content": _Kind("msg", "output_text", "text", {"annotations": [], "logprobs": []}),
    "refusal": _Kind("msg", "refusal", "refusal"),
}
_ITEMS: dict[str, dict[str, Any]] = {
    "rs": {"type": "reasoning", "summary": []},
    "msg": {"type": "message", "role": "assistant"},
}


@dataclass(frozen=True, slots=True)
class _Text:
    """A text under way: a part of a message, or a call's arguments."""

    topic: str
    """Of its events: `response.output_text` has `….delta` and `….done`."""
    holder: dict[str, Any]
    """The part or item that has the text in the end."""
    name: str
    """Of the text in its holder, and in the last event."""
    place: dict[str, Any]
    """Where its events say it is."""
    pieces: list[str] = field(default_factory=list)

    @property
    def is_part(self) -> bool:
        return "content_index" in self.place

    @property
    def more(self) -> dict[str, Any]:
        """What its events need besides: the SDK requires logprobs of a text, and chat's are not asked for."""
        return {"logprobs": []} if self.topic == "response.output_text" else {}

    def settle(self) -> str:
        """Write the whole text where it belongs, and return it."""
        self.holder[self.name] = "".join(self.pieces)
        return str(self.holder[self.name])


@dataclass(slots=True)
class ResponseBuilder:
    """One Response as it grows, each step told as an event. Streamed and whole answers both grow here."""

    response: dict[str, Any]
    _told: int = 0
    _places: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where the items with parts are in the output, by the prefix of their ids."""
    _texts: dict[str, _Text] = field(default_factory=dict)
    """By what they are in chat: "reasoning", "content", "refusal", "call 0"."""

    def start(self, model: str | None) -> list[bytes]:
        self.response["model"] = model or self.response["model"]
        return [self._lifecycle("created"), self._lifecycle("in_progress")]

    def add(self, delta: Mapping[str, Any]) -> list[bytes]:
        """What a delta of chat brings; a whole message is all of it in one."""
        events: list[bytes] = []
        # Servers have two names for a model's thoughts, and some send both.
        given = {**delta, "reasoning": delta.get("reasoning") or delta.get("reasoning_content")}
        for name in _KINDS:
            if text := text_of(given.get(name)):
                events += [*self._open_part(name), self._grow(name, text)]
        for number, call in enumerate(delta.get("tool_calls") or []):
            function = call.get("function") or {}
            key = f"call {call.get('index', number)}"
            if function.get("name"):
                self._make_way(key, call.get("id"))
            events += self._open_call(key, call.get("id"), function.get("name"))
            if function.get("arguments"):
                events.append(self._grow(key, function["arguments"]))
        return events

    def finish(self, finish_reason: str | None, counted: Mapping[str, Any] | None) -> list[bytes]:
        """The end of every text, part and item, then of the response."""
        output = self.response["output"]
        events = [] if output else self._open_part("content")
        reason = _CUT_SHORT.get(finish_reason or "")
        status = "incomplete" if reason else "completed"
        for index, item in enumerate(output):
            # Only the last one can have been cut short.
            item["status"] = status if item is output[-1] else "completed"
            events += self._close_item(index, item)
        if reason:
            self.response["incomplete_details"] = {"reason": reason}
        else:
            self.response["completed_at"] = int(time.time())
        self.response |= {"status": status, "usage": usage_of(counted) if counted else None}
        return [*events, self._lifecycle(status)]

    def fail(self, error: ErrorDetail) -> list[bytes]:
        """The end by an error; what came before it is kept."""
        for text in self._texts.values():
            text.settle()
        for item in self.response["output"]:
            item["status"] = "incomplete"
        # The code is one of a closed list, which has no better word for most of ours.
        code = error.code if error.code == "rate_limit_exceeded" else "server_error"
        told = {"code": code, "message": error.message, "param": error.param, "type": error.type}
        self.response |= {"status": "failed", "error": told}
        return [self._lifecycle("failed")]

    def _open_part(self, name: str) -> list[bytes]:
        if name in self._texts:
            return []
        kind = _KINDS[name]
        events: list[bytes] = []
        if kind.prefix not in self._places:
            item = {**_ITEMS[kind.prefix], "content": []}
            self._places[kind.prefix], events = self._open_item(kind.prefix, item)
        item_place = self._places[kind.prefix]
        parts = self.response["output"][item_place["output_index"]]["content"]
        place = {**item_place, "content_index": len(parts)}
        part = {"type": kind.part_type, kind.text_name: "", **kind.more}
        parts.append(part)
        self._texts[name] = _Text(f"response.{kind.part_type}", part, kind.text_name, place)
        return [*events, self._event("response.content_part.added", **place, part=part)]

    def _open_call(self, key: str, call_id: str | None, name: str | None) -> list[bytes]:
        if key in self._texts:
            return []
        called = {"call_id": call_id or f"call_{secrets.token_hex(12)}", "name": name or "", "arguments": ""}
        item = {"type": "function_call", **called}
        place, events = self._open_item("fc", item)
        self._texts[key] = _Text("response.function_call_arguments", item, "arguments", place)
        return events

    def _make_way(self, key: str, call_id: str | None) -> None:
        """Servers that tell a call in one piece may count each as the first."""
        begun = self._texts.get(key)
        if begun and call_id and call_id != begun.holder["call_id"]:
            self._texts[f"{key} {begun.holder['call_id']}"] = self._texts.pop(key)

    def _open_item(self, prefix: str, item: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        output = self.response["output"]
        index = len(output)
        item["id"] = self.response["id"].replace("resp", prefix, 1) + f"_{index}"
        item["status"] = "in_progress"
        output.append(item)
        added = self._event("response.output_item.added", output_index=index, item=item)
        return {"item_id": item["id"], "output_index": index}, [added]

    def _grow(self, key: str, piece: str) -> bytes:
        text = self._texts[key]
        text.pieces.append(piece)
        return self._event(f"{text.topic}.delta", **text.place, delta=piece, **text.more)

    def _close_item(self, index: int, item: dict[str, Any]) -> list[bytes]:
        events: list[bytes] = []
        for text in self._texts.values():
            if text.place["output_index"] == index:
                whole = {text.name: text.settle()}
                events.append(self._event(f"{text.topic}.done", **text.place, **whole, **text.more))
                if text.is_part:
                    events.append(self._event("response.content_part.done", **text.place, part=text.holder))
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _lifecycle(self, state: str) -> bytes:
        return self._event(f"response.{state}", response=self.response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._told, **fields}
        self._told += 1
        return b"event: " + kind.encode() + b"\n" + event(data)


def response_from(answer: Mapping[str, Any], asked: ResponseRequest) -> bytes:
    """The Response of a chat completion in one piece. Raises: LookupError, TypeError when it is none."""
    choice = answer["choices"][0]
    builder = ResponseBuilder(opened(asked))
    builder.start(answer.get("model"))
    builder.add(choice["message"])
    builder.finish(choice.get("finish_reason"), answer.get("usage"))
    return to_json(builder.response)


@dataclass(slots=True)
class StreamTranslator:
    """Chat's server-sent events in any chunking → those of the Responses API. One per answer."""

    builder: ResponseBuilder
    is_done: bool = False
    _splitter: EventSplitter = field(default_factory=EventSplitter)
    _has_begun: bool = False
    _finish_reason: str | None = None
    _counted: Mapping[str, Any] | None = None

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that this chunk completes."""
        return [told for given in self._splitter.feed(chunk) for told in self._event(given)]

    def close(self) -> list[bytes]:
        """The last events, if the end mark was missing: an error unless the model had said it was done."""
        events = [told for given in self._splitter.close() for told in self._event(given)]
        if self.is_done:
            return events
        if self._finish_reason:
            return [*events, *self._finish()]
        return [*events, *self._fail(_broken("the connection ended before the model did"))]

    def _event(self, given: bytes) -> list[bytes]:
        if self.is_done:
            return []
        # What a cold engine is doing.
        comments = [line + b"\n\n" for line in given.splitlines() if line.startswith(b":")]
        data = data_of(given)
        return comments if data is None else [*comments, *self._read(data)]

    def _read(self, data: bytes) -> list[bytes]:
        if data == b"[DONE]":
            return self._finish()
        try:
            chunk = json.loads(data)
        except ValueError:
            return self._fail(_broken(f"an event was no JSON: {data[:80].decode(errors='replace')}"))
        if not isinstance(chunk, dict) or chunk.get("error"):
            return self._fail(error_body(500, data, "upstream").error)
        return self._chunk(chunk)

    def _chunk(self, chunk: dict[str, Any]) -> list[bytes]:
        events = self._begin(chunk.get("model"))
        self._counted = chunk.get("usage") or self._counted
        for choice in chunk.get("choices") or []:
            if not choice.get("index"):  # a response is one answer
                events += self.builder.add(choice.get("delta") or {})
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
        return events

    def _begin(self, model: str | None) -> list[bytes]:
        if self._has_begun:
            return []
        self._has_begun = True
        return self.builder.start(model)

    def _finish(self) -> list[bytes]:
        self.is_done = True
        return [*self._begin(None), *self.builder.finish(self._finish_reason, self._counted)]

    def _fail(self, error: ErrorDetail) -> list[bytes]:
        self.is_done = True
        return [*self._begin(None), *self.builder.fail(error)]


def _broken(how: str) -> ErrorDetail:
    return UpstreamError(f"The answer broke off: {how}.").to_body("gateway").error
