"""Single fields of a row: text that must be there, text that may be, tools."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from typing import Any

import orjson

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.json_rows import with_all_digits

NO_ANSWER = ": the row has no answer to learn"

_ANSWERS = ("response", "answer", "output", "completion")


def kind_of(value: Any) -> str:
    """`value`'s JSON type, or what only Parquet has, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    more = {
        bytes: "bytes",
        date: "a date",
        datetime: "a date and time",
        time: "a time",
        timedelta: "a duration",
    }
    return names.get(type(value)) or more.get(type(value), "a number")


def required_text(row: Mapping[str, Any], field: str, *, is_answer: bool = False) -> str:
    """A field that must hold text with something in it. Raises: RowError."""
    value = row.get(field)
    if isinstance(value, str) and (value and not value.isspace()):
        return value
    what = NO_ANSWER if is_answer else ""
    if value is None:
        meant = [name for name in _ANSWERS if isinstance(row.get(name), str)] if is_answer else []
        hint = f"; rename its field {meant[0]} if that is the answer" if meant else ""
        raise RowError(field, f"is missing{what}{hint}", is_empty_answer=is_answer)
    if not isinstance(value, str):
        raise RowError(field, f"is {kind_of(value)}, not text")
    raise RowError(field, f"is empty{what}", is_empty_answer=is_answer)


def optional_text(row: Mapping[str, Any], field: str) -> str:
    """A field's text, stripped; empty where there is none. Raises: RowError."""
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(field, f"is {kind_of(value)}, not text")
    return value.strip()


def system_field(row: Mapping[str, Any]) -> str:
    """`system`, or its other name where that one is empty."""
    return "system_prompt" if row.get("system") in (None, "") else "system"


def system_of(row: Mapping[str, Any]) -> str:
    """The system message beside the rest; empty where there is none. Raises: RowError."""
    return optional_text(row, system_field(row))


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The row's `tools` (or OpenAI's older `functions`), also where they are JSON text. Raises: RowError."""
    field = "tools" if row.get("tools") else "functions"
    value = row.get(field)
    if not value:
        return None
    if isinstance(value, str):
        value = json_in(value, field)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(field, "is not a list of objects, one for each function")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for index, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{field}[{index}]", "has no function with a name")
    require_shallow(tools, field)
    return tools or None


def require_shallow(value: Any, field: str) -> None:
    """Raises: RowError where something is nested deeper than can be written again (254 times), or is a whole
    number that readers of JSON take for one nearby."""
    try:
        orjson.dumps(value, default=str)
    except orjson.JSONEncodeError as error:
        if "64-bit" in str(error):
            raise RowError(
                field,
                "holds a whole number beyond 64 bits, of which most programs lose digits: write it as text",
            ) from error
        raise RowError(field, f"cannot be written as JSON ({error})") from error


def json_in(text: str, field: str) -> Any:
    """JSON inside a text field. Raises: RowError."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(field, f"is not valid JSON ({error.msg} at character {error.pos + 1})") from error
    return with_all_digits(text, value)
