"""The row formats: which rows are theirs, and what conversation such a row is.

A new one is an object with `matches` and `to_messages`, given to `FORMATS.register("name")`, or an entry
point of the group `sage.finetune.formats`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

from sage.tools.finetune.registry import Registry


class Message(TypedDict):
    """One turn. `weight` 0 keeps an assistant's turn as context without learning it."""

    role: str
    content: str
    weight: NotRequired[int]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row as chat messages, and where it came from, for messages about it."""

    messages: list[Message]
    origin: str


class RowError(Exception):
    """A row that cannot be used: which field, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class RowFormat(Protocol):
    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether the row means to be of this format, even if it is then found wanting."""

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        """Raises: RowError."""


FORMATS: Registry[RowFormat] = Registry("format", "sage.finetune.formats")

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
}


def format_name(row: Any) -> str | None:
    """The first format that claims the row; None when none does."""
    if not isinstance(row, Mapping):
        return None
    return next((name for name, row_format in FORMATS if row_format.matches(row)), None)


def detect_format(rows: Iterable[Any]) -> str | None:
    """The format of most rows; None when no row has one. Rows may differ: each is read by its own."""
    counts = Counter(name for row in rows if (name := format_name(row)) is not None)
    return counts.most_common(1)[0][0] if counts else None


def to_messages(row: Any) -> list[Message]:
    """The conversation in a row, by the row's own format. Raises: RowError."""
    if not isinstance(row, Mapping):
        raise RowError("row", f"is {_kind(row)}, not an object with named fields")
    name = format_name(row)
    if name is None:
        keys = ", ".join(map(str, row)) or "none"
        raise RowError(
            "row",
            f"has the fields {keys}, which is no known format; use instruction/output, question/answer, "
            "messages, conversations, prompt/completion or text",
        )
    return FORMATS.get(name).to_messages(row)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(row: Mapping[str, Any], field: str, *, what: str = "") -> str:
    """A field that must hold text with something in it."""
    value = row.get(field)
    if value is None:
        raise RowError(field, f"is missing{what}")
    if not isinstance(value, str):
        raise RowError(field, f"is {_kind(value)}, not text")
    if not value.strip():
        raise RowError(field, f"is empty{what}")
    return value


def _optional_text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(field, f"is {_kind(value)}, not text")
    return value.strip()


def _pair(user: str, assistant: str, system: str = "") -> list[Message]:
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


_NO_ANSWER = ": the row has no answer to learn"


def _add(name: str) -> Any:
    """Register an instance of the decorated class."""

    def register(cls: type[RowFormat]) -> type[RowFormat]:
        FORMATS.register(name)(cls())
        return cls

    return register


@_add("messages")
class OpenAIMessages:
    """{"messages": [{"role", "content"}, ...]}, OpenAI's fine-tuning format."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "messages" in row

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        return _conversation(row["messages"], "messages")


@_add("conversations")
class Conversations:
    """{"conversations": [...]} with role/content, or with ShareGPT's from/value; `system` beside it."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "conversations" in row or "conversation" in row

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        field = "conversations" if "conversations" in row else "conversation"
        messages = _conversation(row[field], field)
        system = _optional_text(row, "system")
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return messages


@_add("alpaca")
class Alpaca:
    """{"instruction", "input"?, "output", "system"?}."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "instruction" in row

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        instruction = _text(row, "instruction")
        extra = _optional_text(row, "input")
        answer = _text(row, "output", what=_NO_ANSWER)
        asked = f"{instruction}\n\n{extra}" if extra else instruction
        return _pair(asked, answer, _optional_text(row, "system"))


@_add("qa")
class QuestionAnswer:
    """{"question", "answer", "context"?}."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "question" in row

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        question = _text(row, "question")
        context = _optional_text(row, "context")
        answer = _text(row, "answer", what=_NO_ANSWER)
        asked = f"{context}\n\n{question}" if context else question
        return _pair(asked, answer, _optional_text(row, "system"))


@_add("prompt_completion")
class PromptCompletion:
    """{"prompt", "completion"}: text, or messages on both sides."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "prompt" in row

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        if isinstance(row["prompt"], list) and isinstance(row.get("completion"), list):
            return _conversation([*row["prompt"], *row["completion"]], "completion")
        return _pair(_text(row, "prompt"), _text(row, "completion", what=_NO_ANSWER))


@_add("text")
class PlainText:
    """{"text"}: learned whole, as the answer to nothing."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "text" in row

    def to_messages(self, row: Mapping[str, Any]) -> list[Message]:
        return _pair("", _text(row, "text"))


def _conversation(turns: Any, field: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise RowError(field, "must be a list of turns with at least one in it")
    messages = [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]
    # Logs often open with the assistant's greeting; no template can render an answer to nothing.
    start = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if start is None:
        raise RowError(field, "has no turn of the user")
    messages = [m for i, m in enumerate(messages) if i >= start or m["role"] == "system"]
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise RowError(field, "has no turn of the assistant after the user's" + _NO_ANSWER)
    return messages


def _turn(turn: Any, field: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(field, f"is {_kind(turn)}, not a turn with role and content")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    role = _ROLES.get(str(turn.get(role_key, "")).lower())
    if role is None:
        raise RowError(f"{field}.{role_key}", f"is {turn.get(role_key)!r}; use system, user or assistant")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RowError(f"{field}.tool_calls", "tool calls are not supported yet; leave such rows out")
    content = _content(turn.get(content_key), f"{field}.{content_key}")
    if role == "assistant" and not content.strip():
        raise RowError(f"{field}.{content_key}", "is empty" + _NO_ANSWER)
    message: Message = {"role": role, "content": content}
    if "weight" in turn:
        if turn["weight"] not in (0, 1):
            raise RowError(f"{field}.weight", "must be 0 or 1")
        message["weight"] = int(turn["weight"])
    return message


def _content(value: Any, field: str) -> str:
    """Text, or OpenAI's list of content parts when all of them are text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise RowError(field, "is missing" if value is None else "is not text")
