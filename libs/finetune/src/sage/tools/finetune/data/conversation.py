"""What every row becomes, and what is said of a row that cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast


class Message(TypedDict):
    """One turn, in OpenAI's shape.

    `weight` 0 keeps an assistant's turn as context without learning it. In `tool_calls` the arguments are an
    object, as chat templates expect them, even where the row had OpenAI's JSON text. `reasoning_content` is
    what the assistant thought before it answered; some templates show it.
    """

    role: str
    content: str
    weight: NotRequired[int]
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]


CALLS_LEFT_OUT = (
    "this model's chat template leaves tool calls out, so that an empty answer would be learned: choose "
    "another base model or leave such rows out"
)

THOUGHTS_LEFT_OUT = (
    "this model's chat template leaves out what stands before </think>, so that the model would learn not to "
    "think: choose another base model, or take the thoughts out of the rows if that is wanted"
)
_THINK_MARK = re.compile(r"</?think>")


def functions_called(message: Message) -> list[str]:
    """The functions' names of a learned turn that only calls; of any other none."""
    if message["role"] != "assistant" or not message.get("weight", 1) or message["content"].strip():
        return []
    return [call["function"]["name"] for call in message.get("tool_calls") or ()]


def other_spellings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The same turns, their calls as some chat templates want them; of turns without calls there are none.

    Turns that only call have no content at all then, or arguments are JSON text, as OpenAI's API has both.
    """
    if not any(message.get("tool_calls") for message in messages):
        return
    for is_text, is_empty in ((False, True), (True, False), (True, True)):
        yield [_spelt(m, is_text, is_empty) if m.get("tool_calls") else m for m in messages]


def _spelt(message: Message, is_text: bool, is_empty: bool) -> Message:
    spelt: Any = dict(message)
    if is_empty and not message["content"].strip():
        spelt["content"] = None
    if is_text:
        spelt["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return cast(Message, spelt)


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False, default=str)
    return {**call, "function": {**function, "arguments": arguments}}


def thoughts_in(message: Message) -> list[str]:
    """What the content says before its last `</think>`, in pieces without marks and without space around."""
    before, _, _ = message["content"].rpartition("</think>")
    return [piece.strip() for piece in _THINK_MARK.split(before)]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row as chat messages, and where it came from, for messages about it."""

    messages: list[Message]
    origin: str
    tools: list[dict[str, Any]] | None = None
    """The functions the assistant may call, in OpenAI's shape."""


class RowError(Exception):
    """A row that cannot be used: which field, and why."""

    def __init__(self, field: str, reason: str, *, is_empty_answer: bool = False) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
        self.is_empty_answer = is_empty_answer
