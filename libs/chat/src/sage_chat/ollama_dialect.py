"""Between OpenAI's chat objects and Ollama's. Pure.

Source: Ollama API documentation, "Generate a chat message", "Errors", "Streaming" (docs.ollama.com/api).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sage_chat.backend import ChatCall
from sage_chat.completions import DONE, Completion, error_event, usage
from sage_chat.grounding import text_of
from sage_chat.upstream import error_body
from sage_contracts.errors import InvalidRequestError, UpstreamError

# OpenAI's name → Ollama's, inside `options`. The later names win where both are given.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
}
_SOURCE = "ollama"


def chat_request(call: ChatCall) -> dict[str, Any]:
    """The body of POST /api/chat. Raises: InvalidRequestError for what Ollama cannot do."""
    body = call.body
    if body.get("n") not in (None, 1):
        raise _refusal("Ollama gives one answer per request: leave `n` out.", "n")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise _refusal(
            'Ollama lets the model choose whether it calls a tool: tool_choice is "auto" or "none".',
            "tool_choice",
        )
    if body.get("logit_bias"):
        raise _refusal("Ollama does not take `logit_bias`: leave it out.", "logit_bias")
    request: dict[str, Any] = {
        "model": call.model,
        "messages": _messages(body.get("messages") or []),
        "stream": call.is_stream,
    }
    options = _options(body)
    if options:
        request["options"] = options
    answer_format = _format(body.get("response_format"))
    if answer_format is not None:
        request["format"] = answer_format
    effort = body.get("reasoning_effort")
    if effort is not None:
        request["think"] = False if effort == "none" else effort
    for name in ("tools", "keep_alive", "logprobs", "top_logprobs"):
        if body.get(name) is not None:
            request[name] = body[name]
    if body.get("tool_choice") == "none":
        request.pop("tools", None)
    return request


def embed_request(call: ChatCall) -> dict[str, Any]:
    """The body of POST /api/embed, whose fields have OpenAI's names or none there."""
    names = ("input", "dimensions", "truncate", "options", "keep_alive")
    given = {name: call.body[name] for name in names if call.body.get(name) is not None}
    return {"model": call.model, **given}


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    options = {ours: body[name] for name, ours in _OPTIONS.items() if body.get(name) is not None}
    stop = body.get("stop")
    if stop is not None:
        options["stop"] = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, str | list):
            raise _refusal("stop is a text, or a list of them.", "stop")
    own = body.get("options") or {}
    if not isinstance(own, Mapping):
        raise _refusal("Ollama's options are an object.", "options")
    # Whoever says it in Ollama's own words means Ollama.
    return {**options, **own}


def _format(response_format: Any) -> Any:
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return "json"
        case {"type": "json_schema", "json_schema": {"schema": {**schema}}}:
            return schema
    raise _refusal(
        'Ollama\'s answers are {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", '
        '"json_schema": {"schema": {…}}}.',
        "response_format",
    )


def _refusal(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, source=_SOURCE)


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names: dict[str, Any] = {}
    translated = []
    for message in messages:
        for tool in message.get("tool_calls") or []:
            names[str(tool.get("id"))] = (tool.get("function") or {}).get("name")
        translated.append(_message(message, names))
    return translated


def _message(message: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    translated: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": text_of(message.get("content")),
    }
    images = list(_images(message.get("content")))
    if images:
        translated["images"] = images
    if message.get("tool_calls"):
        translated["tool_calls"] = [_tool_call(tool) for tool in message["tool_calls"]]
    if role == "tool":
        translated["tool_name"] = message.get("name") or names.get(str(message.get("tool_call_id"))) or ""
    return translated


def _images(content: Any) -> Iterator[str]:
    for part in content if isinstance(content, list) else []:
        kind = part.get("type")
        if kind == "image_url":
            yield _image(part)
        elif kind != "text":
            raise _refusal(f"Ollama reads text and images, and no part of type {kind!r}.", "messages")


def _image(part: Mapping[str, Any]) -> str:
    link = part.get("image_url")
    url = str(link.get("url", "") if isinstance(link, Mapping) else link)
    head, _, data = url.partition(";base64,")
    if not head.startswith("data:") or not data:
        raise _refusal(
            "Ollama takes images as data URLs (data:image/png;base64,…), not as links.", "messages"
        )
    return data


def _tool_call(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function") or {}
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise _refusal("A tool call's arguments are no JSON.", "messages") from error
    return {"function": {"name": function.get("name"), "arguments": arguments}}


def _openai_tool_calls(message: Mapping[str, Any], first_index: int) -> list[dict[str, Any]]:
    return [
        {
            "index": first_index + number,
            "id": tool.get("id") or f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": tool.get("function", {}).get("name"),
                "arguments": json.dumps(tool.get("function", {}).get("arguments") or {}, ensure_ascii=False),
            },
        }
        for number, tool in enumerate(message.get("tool_calls") or [])
    ]


def _finish(answer: Mapping[str, Any], has_tool_calls: bool) -> str:
    if has_tool_calls:
        return "tool_calls"
    return "length" if answer.get("done_reason") == "length" else "stop"


def _counted(answer: Mapping[str, Any]) -> dict[str, int]:
    # Ollama leaves prompt_eval_count out when the whole prompt came from its cache.
    return usage(int(answer.get("prompt_eval_count") or 0), int(answer.get("eval_count") or 0))


def _logprobs(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    told = answer.get("logprobs")
    if not told:
        return None
    content = [
        _logprob(token) | {"top_logprobs": [_logprob(other) for other in token.get("top_logprobs") or []]}
        for token in told
    ]
    return {"content": content, "refusal": None}


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    return {name: token.get(name) for name in ("token", "logprob", "bytes")}


def completion_from(answer: Mapping[str, Any], model: str) -> bytes:
    """The one object of a non-streamed answer as OpenAI's."""
    given = answer.get("message") or {}
    tools = _openai_tool_calls(given, 0)
    message: dict[str, Any] = {"role": "assistant", "content": given.get("content") or "", "refusal": None}
    if given.get("thinking"):
        message["reasoning"] = given["thinking"]
    if tools:
        message["tool_calls"] = [{key: tool[key] for key in ("id", "type", "function")} for tool in tools]
    finish = _finish(answer, bool(tools))
    return Completion(model).whole(message, finish, _counted(answer), _logprobs(answer))


@dataclass(slots=True)
class StreamTranslator:
    """NDJSON in any chunking → OpenAI's events. One per answer."""

    completion: Completion
    wants_usage: bool
    is_done: bool = False
    _rest: bytes = b""
    _tool_calls: int = 0
    _has_role: bool = False
    _answer: dict[str, Any] = field(default_factory=dict)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that this chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines for event in self._line(line)]

    def close(self) -> list[bytes]:
        """The events of a last line without its newline; an error when the answer never said it was done."""
        events = self._line(self._rest)
        self._rest = b""
        if not self.is_done:
            broken = UpstreamError("ollama ended its answer before it was done.", source=_SOURCE)
            events.append(error_event(broken.to_body(_SOURCE)))
        return events

    def _line(self, line: bytes) -> list[bytes]:
        if not line.strip() or self.is_done:
            return []
        try:
            answer = json.loads(line)
        except ValueError:
            answer = {"error": f"a line that is no JSON: {line[:80].decode(errors='replace')}"}
        if not isinstance(answer, dict) or answer.get("error"):
            self.is_done = True
            return [error_event(error_body(500, line if isinstance(answer, dict) else b"", _SOURCE))]
        return self._events(answer)

    def _events(self, answer: dict[str, Any]) -> list[bytes]:
        given = answer.get("message") or {}
        delta: dict[str, Any] = {}
        if not self._has_role:
            self._has_role = True
            delta["role"] = "assistant"
        if given.get("content") or "role" in delta:
            delta["content"] = given.get("content") or ""
        if given.get("thinking"):
            delta["reasoning"] = given["thinking"]
        tools = _openai_tool_calls(given, self._tool_calls)
        if tools:
            self._tool_calls += len(tools)
            delta["tool_calls"] = tools
        logprobs = _logprobs(answer)
        events = [self.completion.chunk(delta, logprobs=logprobs)] if delta or logprobs else []
        if answer.get("done"):
            self.is_done = True
            events.append(self.completion.chunk({}, _finish(answer, self._tool_calls > 0)))
            if self.wants_usage:
                events.append(self.completion.usage_chunk(_counted(answer)))
            events.append(DONE)
        return events
