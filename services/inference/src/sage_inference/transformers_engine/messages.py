"""OpenAI's messages as chat templates take them, spelt as training spells such turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sage_contracts.chat import ChatMessage
from sage_contracts.errors import InvalidRequestError

Message = dict[str, Any]


def render(messages: Sequence[ChatMessage], template: str, apply: Callable[[list[Message]], str]) -> str:
    """What `apply` makes of the messages; `template` is the source of what it applies.

    Raises: InvalidRequestError for messages that cannot be shown, or that the template refuses.
    """
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    if '"developer"' not in template and "'developer'" not in template:
        plain = _without_developers(plain)
    texts: list[str] = []
    refusals: list[Exception] = []
    for spelt in _spellings(plain):
        try:
            texts.append(apply(spelt))
        except Exception as error:
            # Templates are programs: they raise what they like, and it is about the messages.
            refusals.append(error)
            continue
        if _shows_calls(texts[-1], plain):
            return texts[-1]
    if texts:
        return texts[0]
    raise InvalidRequestError(
        f"The model's chat template refuses these messages: {refusals[0]}", param="messages"
    ) from refusals[0]


def _plain(message: ChatMessage, index: int) -> Message:
    """Its content as text and arguments as objects: the dialect also has parts, null and JSON in text."""
    plain = message.model_dump(exclude_none=True, exclude={"refusal"})
    plain["content"] = _text(message, f"messages[{index}].content")
    calls = plain.pop("tool_calls", [])
    if calls:
        plain["tool_calls"] = [_call(call) for call in calls]
    return plain


def _text(message: ChatMessage, place: str) -> str:
    """What was said; an assistant's refusal is what it said, too."""
    is_assistant = message.role == "assistant"
    if message.content is None:
        if is_assistant:
            return message.refusal or ""
        raise InvalidRequestError(f"{place}: a message of the {message.role} needs one", param=place)
    if isinstance(message.content, str):
        return message.content
    # A part has its text in the field that is named as its type is.
    known = ("text", "refusal") if is_assistant else ("text",)
    if any(part.get("type") not in known for part in message.content):
        raise InvalidRequestError("This model reads text only.", param="messages")
    return "".join(str(part.get(part["type"]) or "") for part in message.content)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", {})
    return {**call, "type": "function", "function": {**function, "arguments": _arguments(function)}}


def _arguments(function: dict[str, Any]) -> Any:
    given = function.get("arguments") or {}
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return given
    return parsed if isinstance(parsed, dict) else given


def _without_developers(messages: list[Message]) -> list[Message]:
    """A developer's words as the system's, and then all of the system's in one message, as vLLM has them."""
    if all(message["role"] != "developer" for message in messages):
        return messages
    told = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    rest = [m for m in messages if m["role"] not in ("system", "developer")]
    return [{"role": "system", "content": "\n\n".join(filter(None, told))}, *rest]


def _spellings(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages, then their calls as some templates want them, in the order that training tries."""
    yield messages
    if any("tool_calls" in message for message in messages):
        for is_text, is_empty in ((False, True), (True, False), (True, True)):
            yield [_spelt(m, is_text, is_empty) if "tool_calls" in m else m for m in messages]


def _spelt(message: Message, is_text: bool, is_empty: bool) -> Message:
    spelt = dict(message)
    if is_empty and not message["content"].strip():
        spelt["content"] = None
    if is_text:
        spelt["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return spelt


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _shows_calls(text: str, messages: list[Message]) -> bool:
    """Whether no call was left out silently, as some templates do; so far as functions' names tell."""
    only_calls = [m["tool_calls"] for m in messages if "tool_calls" in m and not m["content"].strip()]
    return all(any(call["function"].get("name", "") in text for call in calls) for calls in only_calls)
