"""Lists of turns: role/content, ShareGPT's from/value, OpenAI's messages with tool calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from sage.tools.finetune.data.conversation import Message, RowError
from sage.tools.finetune.data.fields import (
    NO_ANSWER,
    json_in,
    kind_of,
    require_shallow,
    system_field,
    system_of,
)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_CALL_IN_TEXT = "function_call"
"""ShareGPT's role of a turn whose text is the call itself, as JSON."""
_LIST = re.compile(r"\s*\[\s*\{")
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")


def conversation(turns: Any, field: str) -> list[Message]:
    """Turns with something to learn: an assistant's after a user's. Raises: RowError."""
    return learnable(parse_turns(turns, field), field)


def learnable(messages: list[Message], field: str) -> list[Message]:
    """The same of messages already parsed. Raises: RowError."""
    # Logs often open with the assistant's greeting; no template can render an answer to nothing.
    start = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if start is None:
        raise RowError(field, "has no turn of the user")
    if start:
        messages = [m for i, m in enumerate(messages) if i >= start or m["role"] == "system"]
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise RowError(
            field, "has no turn of the assistant after the user's" + NO_ANSWER, is_empty_answer=True
        )
    return messages


def with_system(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The turns after the row's `system` text, which a first system turn may repeat.

    Raises: RowError, also where the two say different things: to learn from either would be a guess.
    """
    system = system_of(row)
    if not system:
        return messages
    first: Message = {"role": "system", "content": system}
    if messages[0]["role"] != "system":
        return [first, *messages]
    said = messages[0]["content"].strip()
    if not said:
        return [first, *messages[1:]]
    if said != system:
        raise RowError(
            system_field(row),
            "says something else than the system turn of the conversation: keep one of them",
        )
    return messages


def holds_turns(value: Any, field: str) -> bool:
    """Whether a field is a list of turns, or such a list as text, even if turns in it are then found wanting.
    Other lists in JSON or Python, as an answer may be, are text. Raises: RowError for Python's spelling."""
    if not isinstance(value, str):
        return isinstance(value, list)
    if not _LIST.match(value):
        return False
    _refuse_python(value, field)
    try:
        turns = orjson.loads(value)
    except orjson.JSONDecodeError:
        return False
    return all(isinstance(turn, dict) and _means_turn(turn) for turn in turns)


def _means_turn(turn: Mapping[str, Any]) -> bool:
    """Data may have a `role` or a `from` of its own: a person's rights, where a flight starts."""
    if "role" not in turn:
        return "from" in turn and "value" in turn
    is_role = isinstance(turn["role"], str) and turn["role"].lower() in _ROLES
    return is_role or "content" in turn or "tool_calls" in turn


def _refuse_python(text: str, field: str) -> None:
    if _PYTHON_LIST.match(text) and (
        ("'role'" in text and "'content'" in text) or ("'from'" in text and "'value'" in text)
    ):
        raise RowError(field, "is Python's spelling of a list, not JSON: write it with json.dumps")


def parse_turns(turns: Any, field: str) -> list[Message]:
    """Every turn as a message. Raises: RowError."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        _refuse_python(turns, field)
        turns = json_in(turns, field)  # in CSV and in some Parquet files the list is text
    if isinstance(turns, Mapping):
        turns = _turns_of_columns(turns)
    if not isinstance(turns, list) or not turns:
        raise RowError(field, "must be a list of turns with at least one in it")
    return [parse_turn(turn, field, index) for index, turn in enumerate(turns)]


def _turns_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns in a list of each field, which `datasets` makes of a sequence of objects; otherwise none."""
    lists = [column for column in columns.values() if isinstance(column, list)]
    if len(lists) < len(columns) or len({len(column) for column in lists}) != 1:
        return []
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*lists, strict=True)]


def parse_turn(turn: Any, field: str, index: int | None = None) -> Message:
    """One turn; `index` is its place in the list `field`. Raises: RowError."""
    if not isinstance(turn, Mapping):
        raise RowError(_at(field, index), f"is {kind_of(turn)}, not a turn with role and content")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    given = turn.get(role_key)
    said = given.lower() if isinstance(given, str) else ""
    role = _ROLES.get(said)
    if role is None:
        raise RowError(_at(field, index, role_key), f"is {given!r}; use system, user or assistant")
    content = turn.get(content_key)
    has_more = len(turn) > 2 or content is None
    calls = _tool_calls(turn, _at(field, index)) if has_more else None
    if said == _CALL_IN_TEXT:
        calls, content = _call_in_text(content, _at(field, index, content_key)), ""
    if not isinstance(content, str):
        content = "" if content is None and calls else _parts(content, _at(field, index, content_key))
    if role == "assistant" and not calls and (not content or content.isspace()):
        raise RowError(_at(field, index, content_key), "is empty" + NO_ANSWER, is_empty_answer=True)
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if has_more:
        _copy_extras(turn, message, _at(field, index))
    return message


def _at(field: str, index: int | None, key: str = "") -> str:
    place = field if index is None else f"{field}[{index}]"
    return f"{place}.{key}" if key else place


def _copy_extras(turn: Mapping[str, Any], message: Message, field: str) -> None:
    weight = turn.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise RowError(f"{field}.weight", "must be 0 or 1")
        message["weight"] = int(weight)
    for key in ("name", "tool_call_id", "reasoning_content"):
        value = turn.get(key)
        if value is None or (not value and key == "reasoning_content"):
            continue
        if not isinstance(value, str):
            raise RowError(f"{field}.{key}", f"is {kind_of(value)}, not text")
        message[key] = value


def _parts(value: Any, field: str) -> str:
    """OpenAI's list of content parts when all of them are text."""
    if isinstance(value, list):
        texts = [p.get("text") for p in value if isinstance(p, Mapping) and p.get("type") == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise RowError(field, "holds parts that are not text, such as pictures; only text can be learned")
    raise RowError(field, "is missing" if value is None else f"is {kind_of(value)}, not text")


def _tool_calls(turn: Mapping[str, Any], field: str) -> list[dict[str, Any]] | None:
    if turn.get("tool_calls"):
        field, calls = f"{field}.tool_calls", turn["tool_calls"]
    elif turn.get("function_call"):
        field, calls = f"{field}.function_call", [{"function": turn["function_call"]}]
    else:
        return None
    if not isinstance(calls, list):
        raise RowError(field, f"is {kind_of(calls)}, not a list of calls")
    return [_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(field, "has no function with a name")
    arguments = function.get("arguments") or {}
    if not arguments and function.get("parameters"):
        raise RowError(field, "is a call with `parameters`: name them `arguments`")
    if isinstance(arguments, str):
        arguments = json_in(arguments, f"{field}.function.arguments")
    if not isinstance(arguments, Mapping):
        raise RowError(f"{field}.function.arguments", f"is {kind_of(arguments)}, not an object")
    require_shallow(arguments, f"{field}.function.arguments")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _call_in_text(content: Any, field: str) -> list[dict[str, Any]]:
    value = json_in(content, field) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    return [_call({"function": call}, field) for call in calls]
