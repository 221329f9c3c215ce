"""The parts of a request to OpenAI's Responses API that we read. Everything else is relayed, as in chat.

Source: OpenAI API reference, "Responses", "Create a model response".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    field_validator,
    model_validator,
)

_TEXT_PARTS = ("input_text", "output_text", "text")
_ITEM_FIELDS: dict[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
_NOTHING_STORED = "nothing is stored here. Send the conversation's messages and calls as `input`, each time"
# What a client can do instead of each field that would need a store, a queue or OpenAI's own services.
_INSTEAD = {
    "previous_response_id": _NOTHING_STORED,
    "conversation": _NOTHING_STORED,
    "prompt": "there are no stored prompts here. Send their text as `instructions` and `input`",
    "background": "responses are made while you wait. Leave it out, and set `stream` to see them come",
    "context_management": "nothing is compacted here. Shorten the conversation that you send as `input`",
    "moderation": "nothing is moderated here. Leave it out",
    "top_logprobs": "a response has no logprobs here. Ask /v1/chat/completions for them",
}


class TextPart(BaseModel):
    """A piece of a message's content, or of a function's output."""

    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "refusal":
            return {"text": given.get("refusal")}
        if kind not in _TEXT_PARTS:
            raise ValueError(
                f"a part of type {kind!r} cannot be sent here: only text, as input_text or output_text. "
                "Images go to a vllm/ or ollama/ model through /v1/chat/completions."
            )
        return given


def _as_parts(given: Any) -> Any:
    return [{"type": "input_text", "text": given}] if isinstance(given, str) else given


Texts = Annotated[list[TextPart], BeforeValidator(_as_parts)]


class InputItem(BaseModel):
    """One item of `input`: a message, or a function's call or output. Its type says which fields count."""

    type: str
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: Texts = []
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: Texts = []

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError('an item is an object, for example {"role": "user", "content": "Hello"}')
        kind = given.get("type") or "message"
        if kind == "item_reference":
            raise ValueError(f"an item_reference means nothing: {_NOTHING_STORED}.")
        if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
            raise ValueError(f"an item of type {kind!r} cannot be sent here, only {', '.join(_ITEM_FIELDS)}.")
        missing = [name for name in _ITEM_FIELDS[kind] if given.get(name) is None]
        if missing:
            raise ValueError(f"an item of type {kind!r} needs {' and '.join(missing)}")
        # Earlier output comes back with ids and states: they mean nothing to chat.
        return {"type": kind, **{name: given[name] for name in _ITEM_FIELDS[kind]}}


class FunctionTool(BaseModel):
    """A function of the client's that the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind != "function":
            raise ValueError(
                f"a tool of type {kind!r} runs at OpenAI. Here tools are functions, which you run: "
                '{"type": "function", "name": …, "parameters": …}. To search documents, name an `index`.'
            )
        return given


class TextFormat(BaseModel):
    """`text.format`; what a json_schema needs is left to those who apply it."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextConfig(BaseModel):
    format: TextFormat = TextFormat()
    verbosity: str | None = None


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="allow")

    effort: str | None = None


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponseRequest(BaseModel):
    """POST /v1/responses: OpenAI's fields plus `index`, ours. Fields that are not named here are chat's."""

    model_config = ConfigDict(extra="allow")

    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    context_management: Any = None
    moderation: Any = None
    top_logprobs: Any = None

    model: str = ""
    input: Annotated[list[InputItem], BeforeValidator(_as_items)]
    instructions: str | None = None
    index: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    # Named here so that they are not relayed: chat knows none of them or means something else, and without a
    # store and built-in tools they change nothing.
    store: Any = None
    include: list[str] | None = None
    stream_options: Any = None
    truncation: Any = None
    max_tool_calls: Any = None

    @field_validator(*_INSTEAD)
    @classmethod
    def _not_here(cls, given: Any, about: ValidationInfo) -> Any:
        if given:
            raise ValueError(_INSTEAD[str(about.field_name)] + ".")
        return given

    @field_validator("include")
    @classmethod
    def _no_logprobs(cls, given: list[str] | None) -> list[str] | None:
        if given and "message.output_text.logprobs" in given:
            raise ValueError(_INSTEAD["top_logprobs"] + ".")
        return given

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _one_or_any(cls, given: Any) -> Any:
        is_function = isinstance(given, dict) and given.get("type") == "function" and given.get("name")
        if given not in (None, "none", "auto", "required") and not is_function:
            raise ValueError(
                '"none", "auto", "required" or {"type": "function", "name": …}. '
                "To allow some functions only, send only these as `tools`."
            )
        return given
