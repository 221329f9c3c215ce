"""What every row becomes, and what is said of a row that cannot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


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
