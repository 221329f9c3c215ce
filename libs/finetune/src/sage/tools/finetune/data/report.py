"""What a file holds and which of its rows cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from sage.tools.finetune.data.conversation import Conversation, Message, RowError
from sage.tools.finetune.data.fields import tools_of
from sage.tools.finetune.data.formats import Match, match, messages_of, to_conversation
from sage.tools.finetune.data.lengths import LengthCounter, TokenReport
from sage.tools.finetune.data.preferences import (
    PreferenceFormat,
    PreferencePair,
    Tools,
    one_kind_fault,
    to_pair,
    to_preference,
)
from sage.tools.finetune.data.reading import Row, load_rows
from sage.tools.finetune.data.row_keys import Duplicates, row_key
from sage.tools.finetune.data.turn_marks import MarkedRows
from sage_contracts.errors import InvalidDataError

SHOWN_BAD_ROWS = 5
KEPT_BAD_ROWS = 20
SHOWN_NOTES = 5
_SAMPLED_ROWS = 1000

T = TypeVar("T")


class ReadRow(NamedTuple):
    """What of a row is measured, the tools with it, and the key that tells duplicates."""

    messages: list[Message]
    tools: Tools | None
    key: bytes
    other: list[Message] | None = None
    """Of a pair the conversation that is not measured."""
    kinds: Sequence[bool] = ()
    """Of rated answers: wanted ones, unwanted ones."""


class BadRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    row: int
    """From 1; of a table, below its header."""
    field: str
    reason: str
    file: str | None = None
    """Which of a folder's files."""

    def __str__(self) -> str:
        where = f"{self.file}, " if self.file else ""
        return f"{where}row {self.row}, field {self.field}: {self.reason}"


class DataReport(BaseModel):
    """The outcome of reading every row of one file, or of a folder's files."""

    model_config = ConfigDict(extra="forbid")

    name: str
    container: str = ""
    """JSON, JSON Lines, CSV, TSV, Parquet; of a folder all that occur."""
    format: str | None
    """That of most rows."""
    formats: dict[str, int] = Field(default_factory=dict)
    """Rows by format, the most frequent first."""
    rows: int
    good: int
    bad: list[BadRow] = Field(default_factory=list)
    """The first ones; `rows - good` is their number."""
    duplicates: int = 0
    """Good rows that were seen before, as row_key tells."""
    empty_answers: int = 0
    """Bad rows that are so for want of an answer."""
    wanted: int = 0
    """Good rows that hold such an answer, where rated answers are meant."""
    unwanted: int = 0
    tokens: TokenReport | None = None
    refused: int = 0
    """Good rows that the model which counted cannot learn from, where nobody chose it."""
    notes: list[str] = Field(default_factory=list)

    def require_all_good(self) -> None:
        """Raises: InvalidDataError, naming the first bad rows."""
        if self.bad:
            raise InvalidDataError(_bad_rows_message(self.name, self.rows, self.rows - self.good, self.bad))

    def fault(self) -> str | None:
        """Why nothing can be learned from the good rows together; None when something can."""
        if not self.wanted and not self.unwanted:
            return None  # no rated answers are meant
        kinds = [kind for kind, count in ((True, self.wanted), (False, self.unwanted)) if count]
        return one_kind_fault(kinds, "among the rows")

    def require_trainable(self) -> None:
        """Raises: as `require_all_good`, and InvalidDataError for rows that teach nothing together."""
        self.require_all_good()
        if fault := self.fault():
            raise InvalidDataError(f"{self.name}: {fault}")


def validate_file(
    path: Path,
    display_name: str | None = None,
    *,
    method: str | None = None,
    lengths: LengthCounter | None = None,
    marks: MarkedRows | None = None,
    on_bad: Callable[[BadRow], None] = lambda bad: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> DataReport:
    """Read every row, one at a time, and say which cannot be used for the training method.

    Without a method the first rows decide whether preferences are meant. What the model of `lengths` cannot
    learn from is bad too, where a person chose it; rows with the `marks` of its template are only noted.
    `on_bad` is told every bad row, of which the report keeps the first KEPT_BAD_ROWS; `on_rows` now and then
    how many rows have been read.
    Raises: InvalidDataError when the file as a whole cannot be read (missing, empty, no data).
    """
    source = load_rows(path, display_name)
    rows = iter(source)
    sample = list(islice(rows, _SAMPLED_ROWS))
    read = _reader(method, sample)
    formats: Counter[str] = Counter()
    bad: list[BadRow] = []
    seen = Duplicates()
    kinds: Counter[bool] = Counter()
    count = bad_count = empty_answers = 0
    for row in chain(sample, rows):
        count += 1
        if count % _SAMPLED_ROWS == 0:
            on_rows(count)
        try:
            matched = match(row.content())
            formats[matched[0]] += 1
            found = read(matched, row.value)
            if lengths is not None:
                lengths.add(found.messages, found.tools, row.origin, found.other)
        except RowError as error:
            bad_count += 1
            empty_answers += error.is_empty_answer
            told = bad_row(row, error, source.name)
            on_bad(told)
            if len(bad) < KEPT_BAD_ROWS:
                bad.append(told)
            continue
        if marks is not None:
            marks.add([*found.messages, *(found.other or ())], row.origin)
        seen.add(found.key)
        kinds.update(found.kinds)
    noted = [
        *(lengths.notes() if lengths is not None else []),
        *filter(None, [marks.note() if marks else ""]),
    ]
    return DataReport(
        name=source.name,
        container=", ".join(dict.fromkeys(source.containers)),
        format=formats.most_common(1)[0][0] if formats else None,
        formats=dict(formats.most_common()),
        rows=count,
        good=count - bad_count,
        bad=bad,
        duplicates=seen.count(),
        empty_answers=empty_answers,
        wanted=kinds[True],
        unwanted=kinds[False],
        tokens=lengths.report() if lengths is not None else None,
        refused=lengths.refused if lengths is not None else 0,
        notes=[*source.notes, *noted],
    )


def load_conversations(
    path: Path, display_name: str | None = None, notes: list[str] | None = None
) -> list[Conversation]:
    """Every row as chat messages. Raises: InvalidDataError, naming the first bad rows."""
    return load_each(path, to_conversation, display_name, notes)


def load_each(
    path: Path,
    read: Callable[[Any, str], T],
    display_name: str | None = None,
    notes: list[str] | None = None,
) -> list[T]:
    """What `read(row, origin)` makes of every row; what to know of how they were read goes into `notes`.

    Raises: InvalidDataError, naming the first bad rows.
    """
    source = load_rows(path, display_name)
    good: list[T] = []
    bad: list[BadRow] = []
    bad_count = 0
    for row in source:
        try:
            good.append(read(row.content(), row.origin))
        except RowError as error:
            bad_count += 1
            if len(bad) < KEPT_BAD_ROWS:
                bad.append(bad_row(row, error, source.name))
    if notes is not None:
        notes += source.notes
    if bad:
        raise InvalidDataError(_bad_rows_message(source.name, len(good) + bad_count, bad_count, bad))
    return good


def _reader(method: str | None, sample: Iterable[Row]) -> Callable[[Match, Any], ReadRow]:
    if method is None:
        method = "kto" if _are_preferences(sample) else "sft"
    return {"sft": _read_conversation, "kto": _read_preference}.get(method, _read_pair)


def _are_preferences(sample: Iterable[Row]) -> bool:
    votes: Counter[bool] = Counter()
    for row in sample:
        try:
            votes[isinstance(match(row.content())[1], PreferenceFormat)] += 1
        except RowError:
            continue
    return votes[True] > votes[False]


def _read_conversation(matched: Match, row: Any) -> ReadRow:
    messages, tools = messages_of(matched), tools_of(matched[2])
    return ReadRow(messages, tools, row_key(messages, tools))


def _read_pair(matched: Match, row: Any) -> ReadRow:
    return _longer(to_pair(row, ""))


def _read_preference(matched: Match, row: Any) -> ReadRow:
    preference = to_preference(row, "")
    if isinstance(preference, PreferencePair):
        return _longer(preference)._replace(kinds=(True, False))
    prompt, answer = preference.prompt_messages, preference.answer
    rating: Message = {"role": str(preference.is_desirable), "content": ""}
    key = row_key([rating, *prompt, *answer], preference.tools)
    turns = [*_unlearned(prompt), *answer]
    return ReadRow(turns, preference.tools, key, kinds=(preference.is_desirable,))


def _longer(pair: PreferencePair) -> ReadRow:
    """The longer of the two conversations in a pair, for its length, and the key of both."""
    shorter, longer = sorted(
        (pair.rejected, pair.chosen), key=lambda turns: sum(len(m["content"]) for m in turns)
    )
    prompt = pair.prompt_messages
    key = row_key([*prompt, *pair.chosen, *pair.rejected], pair.tools)
    prompt = _unlearned(prompt)
    return ReadRow([*prompt, *longer], pair.tools, key, [*prompt, *shorter])


def _unlearned(prompt: list[Message]) -> list[Message]:
    """As preferences are trained: what the assistant said in the prompt carries no loss."""
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]


def with_notes(description: str, notes: Sequence[str]) -> str:
    """What is said of data, and after it the first of the notes on how they were read."""
    more = [f"and {len(notes) - SHOWN_NOTES} more such notes"] if len(notes) > SHOWN_NOTES else []
    return "; ".join([description, *notes[:SHOWN_NOTES], *more])


def bad_row(row: Row, error: RowError, name: str) -> BadRow:
    """`name` is that of the whole: only of a folder's rows the file is told."""
    file = None if row.file == name else row.file
    return BadRow(row=row.number, field=error.field, reason=error.reason, file=file)


def _bad_rows_message(name: str, rows: int, bad_count: int, bad: Sequence[BadRow]) -> str:
    """With each reason once. Where it is the same for all rows, it says what is wrong, and not with which."""
    told: dict[tuple[str | None, str, str], list[BadRow]] = {}
    for each in bad[:SHOWN_BAD_ROWS]:
        told.setdefault((each.file, each.field, each.reason), []).append(each)
    shown = "; ".join(map(_of_one_reason, told.values()))
    more = f"; and {bad_count - SHOWN_BAD_ROWS} more" if bad_count > SHOWN_BAD_ROWS else ""
    advice = "" if bad_count == rows > 1 == len(told) else " Correct or remove them."
    return f"{name}: {bad_count} of {rows} rows cannot be used: {shown}{more}.{advice}"


def _of_one_reason(bad: Sequence[BadRow]) -> str:
    first, *others = bad
    if not others:
        return str(first)
    where = f"{first.file}, " if first.file else ""
    rows = ", ".join(str(each.row) for each in bad)
    return f"{where}rows {rows}, field {first.field}: {first.reason}"
