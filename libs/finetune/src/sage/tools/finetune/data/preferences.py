"""Rows that say which of two answers is better, or whether one answer is good: for DPO, ORPO and KTO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sage.tools.finetune.data.conversation import Message, RowError
from sage.tools.finetune.data.fields import json_in, kind_of, optional_text, required_text, tools_of
from sage.tools.finetune.data.formats import FORMATS, Fields, Match, asked, failed, match, messages_of
from sage.tools.finetune.data.turns import holds_turns, parse_turn, parse_turns, with_system

Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt. The prompt ends with a turn of the user or of a tool; the answers hold only
    what follows it."""

    prompt_messages: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    origin: str
    tools: Tools | None = None


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """One answer to a prompt, and whether such an answer is wanted. Source: KTO, arXiv:2402.01306."""

    prompt_messages: list[Message]
    answer: list[Message]
    is_desirable: bool
    origin: str
    tools: Tools | None = None


Preference = PreferencePair | RatedAnswer


def one_kind_fault(kinds: Collection[bool], where: str) -> str | None:
    """Why kto cannot learn from rated answers of these kinds (wanted: True); None when it can."""
    missing = {True, False} - {*kinds}
    if not missing:
        return None
    kind = "wanted" if True in missing else "unwanted"
    return f"There is no {kind} answer {where}, and kto learns from both kinds."


_PROMPTS = ("prompt", "instruction", "question", "messages", "conversations")


class PreferenceFormat(ABC):
    """A row format that supervised training cannot use."""

    @abstractmethod
    def matches(self, row: Fields) -> bool: ...

    @abstractmethod
    def to_preference(self, row: Fields, origin: str) -> Preference:
        """Raises: RowError."""

    def to_messages(self, row: Fields) -> NoReturn:
        raise RowError("row", "holds preference pairs: use method=dpo, orpo or kto")


def to_preference(row: Any, origin: str) -> Preference:
    """The preference in a row, by the row's own format. Raises: RowError."""
    name, row_format, fields = match(row)
    if isinstance(row_format, PreferenceFormat):
        try:
            return row_format.to_preference(fields, origin)
        except RowError:
            raise
        except Exception as error:
            raise failed(name, error) from error
    if name == "prompt_completion" or not _is_whole((name, row_format, fields)):
        for _, meant in FORMATS.latest_first():
            # Empty fields made the row another's: the format that they belong to says which is empty.
            if isinstance(meant, PreferenceFormat) and meant.matches(row):
                return meant.to_preference(row, origin)
    raise RowError("row", f"is of the format {name}, which says no preference: use method=sft")


def _is_whole(matched: Match) -> bool:
    try:
        messages_of(matched)
    except RowError:
        return False
    return True


def to_pair(row: Any, origin: str) -> PreferencePair:
    """The same, but two answers. Raises: RowError."""
    preference = to_preference(row, origin)
    if isinstance(preference, RatedAnswer):
        raise RowError("label", "rates a single answer, and this method compares two: use method=kto")
    return preference


def load_preferences(
    path: Path, display_name: str | None = None, notes: list[str] | None = None
) -> list[PreferencePair]:
    """Every row as a pair of answers, for DPO and ORPO. Raises: InvalidDataError, naming bad rows."""
    from sage.tools.finetune.data.report import load_each

    return load_each(path, to_pair, display_name, notes)


def load_rated_answers(
    path: Path, display_name: str | None = None, notes: list[str] | None = None
) -> list[RatedAnswer]:
    """Every row as rated answers, for KTO; a pair gives two. Raises: InvalidDataError."""
    from sage.tools.finetune.data.report import load_each

    return [r for p in load_each(path, to_preference, display_name, notes) for r in rated(p)]


def rated(preference: Preference) -> Iterator[RatedAnswer]:
    """A pair as a wanted and an unwanted answer; a rated answer as itself."""
    if isinstance(preference, RatedAnswer):
        yield preference
        return
    p = preference
    yield RatedAnswer(p.prompt_messages, p.chosen, True, p.origin, p.tools)
    yield RatedAnswer(p.prompt_messages, p.rejected, False, p.origin, p.tools)


@FORMATS.register("preference")
class Pairs(PreferenceFormat):
    """{"prompt"?, "chosen", "rejected"}: text or turns. Instead of `prompt` also `instruction` with `input`,
    `question` with `context`, `messages` or `conversations`; without any, two whole conversations."""

    def matches(self, row: Fields) -> bool:
        return "chosen" in row or "rejected" in row

    def to_preference(self, row: Fields, origin: str) -> PreferencePair:
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
        if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
            prompt, chosen, rejected = _parted(chosen, rejected)
            prompt = with_system(prompt, row)
        else:
            prompt = _prompt(row)
        return _pair(prompt, chosen, rejected, ("chosen", "rejected"), origin, tools_of(row))


@FORMATS.register("openai_preference")
class OpenAIPairs(PreferenceFormat):
    """{"input": {"messages", "tools"?}, "preferred_output", "non_preferred_output"}."""

    def matches(self, row: Fields) -> bool:
        return "preferred_output" in row or "non_preferred_output" in row

    def to_preference(self, row: Fields, origin: str) -> PreferencePair:
        given = row.get("input")
        if isinstance(given, str) and given.startswith("{"):
            given = json_in(given, "input")  # in tables
        if not isinstance(given, Mapping):
            raise RowError("input", f"is {kind_of(given)}, not an object with messages")
        prompt = parse_turns(given.get("messages"), "input.messages")
        _require_prompt(prompt, "input.messages")
        names = ("preferred_output", "non_preferred_output")
        answers = [parse_turns(row.get(name), name) for name in names]
        prompt = with_system(prompt, row)
        return _pair(prompt, answers[0], answers[1], names, origin, tools_of(given))


@FORMATS.register("rated")
class Rated(PreferenceFormat):
    """{"prompt", "completion", "label": true or false}, as KTO takes it; instead of `prompt` also the others
    that pairs may have."""

    def matches(self, row: Fields) -> bool:
        return "label" in row and "completion" in row and any(name in row for name in _PROMPTS)

    def to_messages(self, row: Fields) -> NoReturn:
        raise RowError("label", "rates a single answer, which this method cannot use: use method=kto")

    def to_preference(self, row: Fields, origin: str) -> RatedAnswer:
        answer = _turns(row, "completion")
        _require_answer(answer, "completion")
        return RatedAnswer(_prompt(row), answer, _label(row["label"]), origin, tools_of(row))


def _label(value: Any) -> bool:
    # CSV has only text, and of columns with gaps some programs write 1 as 1.0.
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if value is None or value == "":
        raise RowError("label", "is missing; use true for a wanted answer, false for an unwanted one")
    raise RowError("label", f"is {value!r}; use true for a wanted answer, false for an unwanted one")


def _turns(row: Fields, field: str) -> list[Message]:
    """An answer as turns: text, one turn, or a list of turns (in tables: as JSON text)."""
    value = row.get(field)
    if isinstance(value, Mapping):
        return [parse_turn(value, field)]
    if holds_turns(value, field):
        return parse_turns(value, field)
    return [{"role": "assistant", "content": required_text(row, field, is_answer=True)}]


def _prompt(row: Fields) -> list[Message]:
    field = next((name for name in ("prompt", "messages", "conversations") if row.get(name)), "")
    if field and (field != "prompt" or holds_turns(row[field], field)):
        prompt = parse_turns(row[field], field)
        _require_prompt(prompt, field)
    else:
        prompt = [{"role": "user", "content": _question(row)}]
    return with_system(prompt, row)


def _question(row: Fields) -> str:
    names = [name for name in ("instruction", "question", "prompt") if name in row]
    # Tables of several shapes leave the others' columns empty.
    field = next((name for name in names if row[name]), names[0] if names else "prompt")
    if field == "instruction":
        return asked(required_text(row, "instruction"), optional_text(row, "input"))
    if field == "question":
        return asked(optional_text(row, "context"), required_text(row, "question"))
    if row.get("prompt") is None:
        others = (
            "" if "completion" in row else "; without it, chosen and rejected must be whole conversations"
        )
        raise RowError("prompt", f"is missing{others}")
    return required_text(row, "prompt")


def _parted(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    """Two whole conversations as the prompt they share and the two ways it goes on."""
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while shared and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise RowError("rejected", "does not begin with the same prompt as chosen")
    _require_prompt(chosen[:shared], "chosen")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _require_prompt(prompt: list[Message], field: str) -> None:
    if not any(message["role"] == "user" for message in prompt):
        raise RowError(field, "has no turn of the user")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(field, "must end with a turn of the user, so that an answer can follow")


def _require_answer(answer: list[Message], field: str) -> None:
    if not answer or answer[-1]["role"] != "assistant":
        raise RowError(field, "does not end with a turn of the assistant", is_empty_answer=True)
    if any(message["role"] not in ("assistant", "tool") for message in answer):
        raise RowError(field, "holds a turn that is not the assistant's after the prompt")


def _pair(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    fields: tuple[str, str],
    origin: str,
    tools: Tools | None,
) -> PreferencePair:
    _require_answer(chosen, fields[0])
    _require_answer(rejected, fields[1])
    if chosen == rejected:
        raise RowError(fields[1], f"says the same as {fields[0]}: there is nothing to prefer")
    return PreferencePair(prompt, chosen, rejected, origin, tools)
