"""The row formats: which rows are theirs, and what conversation such a row is.

A new one is a class with `matches` and `to_messages` under `@FORMATS.register("name")`, or an entry point of
the group `sage.finetune.formats`. The one that was registered last is asked first, so that a format of one's
own wins over those here, and the more special of these over the more general.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from sage.tools.finetune.data.conversation import Conversation, Message, RowError
from sage.tools.finetune.data.fields import (
    json_in,
    kind_of,
    optional_text,
    required_text,
    system_of,
    tools_of,
)
from sage.tools.finetune.data.turns import conversation, holds_turns, learnable, parse_turns, with_system
from sage.tools.finetune.registry import Registry

Fields = Mapping[str, Any]


class RowFormat(Protocol):
    def matches(self, row: Fields) -> bool:
        """Whether the row means to be of this format, even if it is then found wanting."""

    def to_messages(self, row: Fields) -> list[Message]:
        """Raises: RowError."""


FORMATS: Registry[RowFormat] = Registry("format", "sage.finetune.formats", keeps_instances=True)


_ANSWERS_TO_TEXT = {
    "answer": "rename text to question",
    "output": "rename text to instruction",
    "completion": "rename text to prompt",
    "response": "rename text to question and response to answer",
    "summary": "rename text to question and summary to answer",
}
"""What to do with a row whose field holds the answer to its `text`."""


Match = tuple[str, RowFormat, Fields]
"""A row's format with its name, and the row as that format is to see it."""


def match(row: Any, *, is_probe: bool = False) -> Match:
    """A probe is a row made up to ask for its format: one that fails on it does not claim it.

    Raises: RowError when there is none, or when one fails.
    """
    if not isinstance(row, Mapping):
        raise RowError("row", f"is {kind_of(row)}, not an object with named fields")
    claimed = _claimant(row, is_probe)
    values = row.values()
    if None in values or "" in values:
        # Tables that hold several formats leave the other formats' columns empty.
        filled = {key: value for key, value in row.items() if value is not None and value != ""}
        other = _claimant(filled, is_probe)
        if other is not None and (claimed is None or other[0] != claimed[0]):
            return (*other, filled)
    if claimed is None and "custom_id" in row:
        raise RowError(
            "row",
            "is a line of an OpenAI batch, which holds a question or an answer alone: write the messages of "
            "both into one row, as their custom_id joins them",
        )
    if claimed is None:
        keys = ", ".join(map(str, row)) or "none"
        raise RowError(
            "row",
            f"has the fields {keys}, which is no known format; use instruction/output, question/answer, "
            "messages, conversations, prompt/completion, text, or prompt/chosen/rejected",
        )
    return (*claimed, row)


def _claimant(row: Fields, is_probe: bool) -> tuple[str, RowFormat] | None:
    for pair in FORMATS.latest_first():
        try:
            if pair[1].matches(row):
                return pair
        except Exception as error:  # a format of one's own raises what its author overlooked
            if not is_probe:
                raise failed(pair[0], error) from error
    return None


def failed(format_name: str, error: Exception) -> RowError:
    """What is said of a row on which a format's own code fails."""
    return RowError("row", f"the format {format_name} failed on it ({type(error).__name__}: {error})")


def format_name(row: Any) -> str | None:
    """The first format that claims the row; None when none does."""
    try:
        return match(row, is_probe=True)[0]
    except RowError:
        return None


def detect_format(rows: Iterable[Any]) -> str | None:
    """The format of most rows; None when no row has one. Rows may differ: each is read by its own."""
    counts = Counter(name for row in rows if (name := format_name(row)) is not None)
    return counts.most_common(1)[0][0] if counts else None


def to_messages(row: Any) -> list[Message]:
    """The conversation in a row, by the row's own format. Raises: RowError."""
    return messages_of(match(row))


def to_conversation(row: Any, origin: str) -> Conversation:
    """The same, with the tools the row offers. Raises: RowError."""
    matched = match(row)
    return Conversation(messages_of(matched), origin, tools_of(matched[2]))


def messages_of(matched: Match) -> list[Message]:
    """What the format makes of the row. Raises: RowError, also where the format's own code fails."""
    name, row_format, fields = matched
    try:
        messages = row_format.to_messages(fields)
        for message in () if type(row_format) in _OURS else messages:
            if not isinstance(message["content"], str):
                said = f"the format {name} made a turn of it whose content is {kind_of(message['content'])}"
                raise RowError("row", f"{said}, not text")
    except RowError:
        raise
    except Exception as error:
        raise failed(name, error) from error
    return messages


def asked(question: str, material: str) -> str:
    """A user's message of two parts, material that may be empty first or last as given."""
    return f"{question}\n\n{material}" if question and material else question or material


def _pair(user: str, assistant: str, system: str = "") -> list[Message]:
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


@FORMATS.register("text")
class PlainText:
    """{"text"}: learned whole, as the answer to nothing."""

    def matches(self, row: Fields) -> bool:
        return "text" in row

    def to_messages(self, row: Fields) -> list[Message]:
        for field, remedy in _ANSWERS_TO_TEXT.items():
            if isinstance(row.get(field), str) and row[field].strip():
                said = f"stands beside {field}, and text is learned whole, as the answer to nothing"
                raise RowError(
                    "text", f"{said}: if {field} is the answer to it, {remedy}; else remove {field}"
                )
        return _pair("", required_text(row, "text"))


@FORMATS.register("prompt_completion")
class PromptCompletion:
    """{"prompt", "completion"}: text or turns (in tables: as JSON text)."""

    def matches(self, row: Fields) -> bool:
        return "prompt" in row

    def to_messages(self, row: Fields) -> list[Message]:
        prompt, completion = row["prompt"], row.get("completion")
        if not (_is_plain(prompt) and _is_plain(completion)) and (
            holds_turns(prompt, "prompt") or holds_turns(completion, "completion")
        ):
            turns = [*_turns(row, "prompt", "user"), *_turns(row, "completion", "assistant")]
            return with_system(learnable(turns, "completion"), row)
        prompt = required_text(row, "prompt")
        return _pair(prompt, required_text(row, "completion", is_answer=True), system_of(row))


def _is_plain(value: Any) -> bool:
    """Of most rows, at once: text whose first character begins no list."""
    return type(value) is str and value[:1] not in "[ \t\r\n"


def _turns(row: Fields, field: str, role: str) -> list[Message]:
    if holds_turns(row.get(field), field):
        return parse_turns(row[field], field)
    return [{"role": role, "content": required_text(row, field, is_answer=role == "assistant")}]


@FORMATS.register("qa")
class QuestionAnswer:
    """{"question", "answer", "context"?}."""

    def matches(self, row: Fields) -> bool:
        return "question" in row

    def to_messages(self, row: Fields) -> list[Message]:
        question = asked(optional_text(row, "context"), required_text(row, "question"))
        answer = required_text(row, "answer", is_answer=True)
        return _pair(question, answer, system_of(row))


@FORMATS.register("alpaca")
class Alpaca:
    """{"instruction", "input" or "context"?, "output", "history"?, "system"?}."""

    def matches(self, row: Fields) -> bool:
        return "instruction" in row

    def to_messages(self, row: Fields) -> list[Message]:
        material = optional_text(row, "input") or optional_text(row, "context")
        instruction = asked(required_text(row, "instruction"), material)
        answer = required_text(row, "output", is_answer=True)
        turns = [*_history(row), *_pair(instruction, answer)]
        return with_system(turns, row)


def _history(row: Fields) -> list[Message]:
    """Earlier turns, [[question, answer], ...]; in tables as JSON text. Raises: RowError."""
    pairs = row.get("history") or []
    if isinstance(pairs, str):
        pairs = json_in(pairs, "history") if pairs.lstrip().startswith("[") else None
    turns: list[Message] = []
    for pair in pairs if isinstance(pairs, list) else [None]:
        texts = pair if isinstance(pair, list) and len(pair) == 2 else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise RowError("history", "is not a list of pairs, [[question, answer], ...]")
        turns += _pair(*texts)
    return turns


@FORMATS.register("conversations")
class Conversations:
    """{"conversations": [...]} with role/content, or with ShareGPT's from/value; `system` beside it."""

    def matches(self, row: Fields) -> bool:
        return "conversations" in row or "conversation" in row

    def to_messages(self, row: Fields) -> list[Message]:
        field = "conversations" if "conversations" in row else "conversation"
        return with_system(conversation(row[field], field), row)


@FORMATS.register("messages")
class OpenAIMessages:
    """{"messages": [{"role", "content"}, ...], "tools"?}, OpenAI's fine-tuning format; `system` beside it."""

    def matches(self, row: Fields) -> bool:
        return "messages" in row

    def to_messages(self, row: Fields) -> list[Message]:
        return with_system(conversation(row["messages"], "messages"), row)


_OURS = frozenset({PlainText, PromptCompletion, QuestionAnswer, Alpaca, Conversations, OpenAIMessages})
"""Whose messages need no second look."""
