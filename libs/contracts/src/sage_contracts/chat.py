"""The parts of a chat request that we read. Everything else is relayed untouched."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    """As JSON, in a string as OpenAI has it; several servers also take an object."""


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str | None = None
    function: CalledFunction | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    """What an assistant said in place of `content`."""
    tool_calls: list[ToolCall] | None = None


class ChatRequest(BaseModel):
    """POST /v1/chat/completions: OpenAI's fields plus `index`, ours (retrieval before generation)."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage]
    stream: bool | None = False
    index: str | None = None


class Passage(BaseModel):
    """One retrieved piece of a document, as cited in an answer."""

    id: int
    """The number it is cited by, from 1."""
    source: str
    """File within the index, with its heading: `cli.md#sage-chat`."""
    text: str
    score: float
