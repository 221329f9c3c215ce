"""Between the objects of OpenAI's Responses API and those of chat completions. Pure.

Source: OpenAI API reference, "Responses" and "Chat completions".
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sage_chat.grounding import instructed
from sage_contracts.errors import InvalidRequestError
from sage_contracts.responses import InputItem, ResponseRequest, TextFormat, TextPart

_CALLED_HERE = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",  # servers blame either
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
}
_IN_TEXT = re.compile(rf"\b({'|'.join(name for name in _CALLED_HERE if '_' in name)})\b")
"""Those that are no words of a sentence."""

_ECHOED = ("instructions", "max_output_tokens", "reasoning", "temperature", "top_p", "user")


def chat_body(asked: ResponseRequest) -> dict[str, Any]:
    """The body of POST /v1/chat/completions. Raises: InvalidRequestError when there is no message."""
    messages = _messages(asked.input)
    if not messages:
        raise InvalidRequestError("input: at least one message is needed", param="input")
    if asked.instructions:
        messages = instructed(messages, asked.instructions)
    text = asked.text
    translated = {
        "model": asked.model,
        "messages": messages,
        "index": asked.index,
        "stream": asked.stream,
        "stream_options": {"include_usage": True} if asked.stream else None,
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "response_format": _response_format(text.format) if text else None,
        "verbosity": text.verbosity if text else None,
        "reasoning_effort": asked.reasoning.effort if asked.reasoning else None,
        "user": asked.user,
        **_tools(asked),
    }
    return {
        **(asked.model_extra or {}),
        **{key: value for key, value in translated.items() if value is not None},
    }


def called_here(param: str | None, message: str, asked: ResponseRequest) -> tuple[str | None, str]:
    """A refusal of chat_body()'s request: the field it blames, and its text, in the words of `asked`."""

    def translate(name: str) -> str:
        # What was sent by chat's own name is told of by it.
        return name if name in (asked.model_extra or {}) else _CALLED_HERE.get(name, name)

    field = re.split(r"[.\[]", param or "")[0]  # what is within it is arranged differently here
    if field in _CALLED_HERE and translate(field) != field:
        param = translate(field)
    return param, _IN_TEXT.sub(lambda found: translate(found[0]), message)


def _tools(asked: ResponseRequest) -> dict[str, Any]:
    if not asked.tools:
        return {}  # OpenAI's chat refuses the other two without tools
    choice = asked.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    known = {"name", "description", "parameters", "strict"}
    functions = [tool.model_dump(include=known, exclude_none=True) for tool in asked.tools]
    return {
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": choice,
        "parallel_tool_calls": asked.parallel_tool_calls,
    }


def _response_format(wanted: TextFormat) -> dict[str, Any] | None:
    if wanted.type == "json_schema":
        return {"type": "json_schema", "json_schema": dict(wanted.model_extra or {})}
    return None if wanted.type == "text" else {"type": wanted.type}


def _messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    # What was said with a call, and calls made together, are one message in chat.
    messages: list[dict[str, Any]] = []
    for item in items:
        if item.type == "message" and item.role == "assistant" and _is_silent_call(messages):
            messages[-1]["content"] = _content(item.content)
        elif item.type == "message":
            messages.append({"role": item.role, "content": _content(item.content)})
        elif item.type == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            answer = {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
            messages.append(answer)
    return messages


def _is_silent_call(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last of them is a call, not answered yet, with which nothing was said."""
    return bool(messages and messages[-1].get("tool_calls") and messages[-1]["content"] is None)


def _content(parts: Sequence[TextPart]) -> str | list[dict[str, Any]]:
    # A string where it can be one: every chat template takes that.
    if len(parts) <= 1:
        return parts[0].text if parts else ""
    return [{"type": "text", "text": part.text} for part in parts]


def opened(asked: ResponseRequest) -> dict[str, Any]:
    """A Response of which nothing has been made yet. What was left to the backend is null."""
    given = asked.model_dump(mode="json", include={"text", "tools", *_ECHOED})
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": asked.model,
        "metadata": asked.metadata or {},
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "text": given["text"] or {"format": {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": given["tools"] or [],
        "truncation": "disabled",
        "usage": None,
        **{name: given[name] for name in _ECHOED},
    }


def usage_of(counted: Mapping[str, Any]) -> dict[str, Any]:
    """Chat's count of tokens by the names it has here."""
    read = counted.get("prompt_tokens_details") or {}
    written = counted.get("completion_tokens_details") or {}
    input_tokens, output_tokens = counted.get("prompt_tokens") or 0, counted.get("completion_tokens") or 0
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {
            "cached_tokens": read.get("cached_tokens") or 0,
            "cache_write_tokens": read.get("cache_write_tokens") or 0,
        },
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": written.get("reasoning_tokens") or 0},
        "total_tokens": counted.get("total_tokens") or input_tokens + output_tokens,
    }
