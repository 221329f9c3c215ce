"""Rows of JSON Lines, of JSON lists, and of JSON objects written one after another."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

import orjson

from sage.tools.finetune.data.conversation import RowError

Found = Any | RowError
"""A row's value, or why the row is no JSON."""

MAX_ROW_BYTES = 16 << 20
"""Several times what any model reads at once; parsed, a row can take fifty times its size."""
_CHUNK_CHARS = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_INTEGER = len(str(2**64))
_MAYBE_ROUNDED = re.compile("[0-9]{19}")
_OF_CALLS = ("arguments", "parameters")
_BYTES_OF_CALLS = (b"arguments", b"parameters")
_NO_NUMBER = re.compile("NaN|Infinity")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def line_rows(lines: BinaryIO | TextIO) -> Iterator[Found]:
    """One value per line that is not blank. Lines are UTF-8 bytes, or text."""
    line_number = 0
    while line := lines.readline(MAX_ROW_BYTES + 1):
        line_number += 1
        if len(line) > MAX_ROW_BYTES:
            yield _too_large()
            return
        try:
            yield _with_exact_calls(line, orjson.loads(line))
        except orjson.JSONDecodeError as error:
            if line.strip():
                where = f"in line {line_number}, column {error.colno}"
                yield RowError("row", f"is not valid JSON: {_in_words(error)} {where}")


def list_rows(text: TextIO) -> Iterator[Found]:
    """The elements of one JSON list, without holding the list. A broken one ends the reading."""
    scan = Scanner(text)
    yield from scan.elements()
    if not scan.is_lost and scan.peek():
        yield scan.broken("something follows after the list's end")


def document_rows(text: TextIO) -> Iterator[Found]:
    """Values written one after another, over any number of lines each."""
    scan = Scanner(text)
    while scan.peek():
        value = scan.value()
        yield value
        if scan.is_lost:
            return
        if scan.peek() == ",":
            yield scan.broken("a comma follows an object: put all of them in a list, or take the commas away")
            return


def with_all_digits(text: str, value: Any) -> Any:
    """What orjson has read from the text, but with whole numbers beyond 64 bits, of which it makes floats."""
    try:
        return json.loads(text) if _MAYBE_ROUNDED.search(text) else value
    except RecursionError:
        return value  # which is refused for its depth


def _with_exact_calls(raw: bytes | str, value: Any) -> Any:
    """In rows without calls or tools numbers are not learned, and looking for long ones takes its time."""
    if isinstance(raw, bytes):
        return with_all_digits(raw.decode(), value) if any(word in raw for word in _BYTES_OF_CALLS) else value
    return with_all_digits(raw, value) if any(word in raw for word in _OF_CALLS) else value


class Scanner:
    """Reads JSON values from a text piece by piece; what a piece's end cuts is tried again with more."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._decoder = json.JSONDecoder(
            parse_int=self._integer, parse_float=self._number, parse_constant=self._number
        )
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._left_chars = 0  # of the buffer's first line, those that were let go
        self._is_ended = False
        self._is_beyond = self._is_rounded = False
        self.is_lost = False
        """Whether the last value's end, or the sign after it, was not found: nothing more can be read."""

    def peek(self) -> str:
        """The next sign that is not white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def take(self, sign: str) -> None:
        if self.peek() == sign:
            self._at += 1

    def value(self) -> Found:
        self.peek()
        self.is_lost = True
        while True:
            self._is_beyond = self._is_rounded = False
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                problem = self.broken(error.msg, error.pos)  # now: reading on moves the buffer
                if self._is_cut(error) and self._more():
                    continue
                is_too_large = len(self._buffer) - self._at > MAX_ROW_BYTES
                return _too_large() if is_too_large else problem
            except RecursionError:
                return self.broken("it is nested too deeply")
            if end == len(self._buffer) and not isinstance(value, dict | list | str) and self._more():
                continue  # a number may go on
            start, self._at, self.is_lost = self._at, end, False
            raw = self._buffer[start:end]
            if len(raw) > MAX_ROW_BYTES:
                self.is_lost = True
                return _too_large()
            # The standard library lets through NaN, and halves of characters, which no tokenizer takes.
            if self._is_beyond or _HALF_CHARACTER.search(raw):
                try:
                    orjson.loads(raw)
                except orjson.JSONDecodeError as error:
                    where = self._place(start + error.pos)
                    return RowError("row", f"is not valid JSON: {_in_words(error)} {where}")
            return _with_exact_calls(raw, value) if self._is_rounded else value

    def elements(self) -> Iterator[Found]:
        """Of the list that comes next, without holding it. A broken one ends the reading."""
        self.take("[")
        is_open = self.peek() != "]"
        if not is_open:
            self.take("]")
        while is_open:
            yield self.value()
            if self.is_lost:
                return
            sign = self.peek()
            if sign not in (",", "]"):
                self.is_lost = True
                yield self.broken("a comma or the list's ] is missing")
                return
            self.take(sign)
            is_open = sign == ","
            if is_open and self.peek() == "]":
                self.is_lost = True
                yield self.broken("a comma stands before the list's ]")
                return

    def broken(self, what: str, at: int | None = None) -> RowError:
        """The error of a place in the buffer; by default where the scanner stands."""
        where = self._place(self._at if at is None else at)
        return RowError("row", f"is not valid JSON: {what} {where}; what follows was not read")

    def _place(self, at: int) -> str:
        line = self._line + self._buffer.count("\n", 0, at)
        return f"in line {line}, column {self._chars_before(at) + 1}"

    def _chars_before(self, at: int) -> int:
        """Of the same line."""
        line_end = self._buffer.rfind("\n", 0, at)
        return at - line_end - 1 if line_end >= 0 else self._left_chars + at

    def _integer(self, digits: str) -> int | float:
        """As orjson reads it: one of more than 64 bits as a float, one beyond every float not at all."""
        number = int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)
        self._is_beyond |= math.isinf(number)
        if -(2**63) <= number < 2**64:
            return number
        self._is_rounded = True
        return float(number)

    def _number(self, text: str) -> float:
        """Also of the words for what is no number: orjson knows none of them."""
        number = float(text)
        self._is_beyond |= not math.isfinite(number)
        return number

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        is_within_limit = len(self._buffer) - self._at <= MAX_ROW_BYTES
        is_string = error.msg.startswith("Unterminated string")
        return is_within_limit and (is_string or error.pos >= len(self._buffer) - len("-Infinity"))

    def _more(self) -> bool:
        if self._is_ended:
            return False
        # As much again as is waiting, so that a long row is not tried over and over.
        block = self._text.read(max(_CHUNK_CHARS, len(self._buffer) - self._at))
        self._is_ended = not block
        self._line += self._buffer.count("\n", 0, self._at)
        self._left_chars = self._chars_before(self._at)
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return bool(block)


def _too_large() -> RowError:
    limit = f"{MAX_ROW_BYTES >> 20} MiB, the most that a row may have"
    return RowError("row", f"is larger than {limit}: make several rows of it; what follows was not read")


def _in_words(error: orjson.JSONDecodeError) -> str:
    if error.msg.startswith("Not enough memory"):
        raise MemoryError from error  # which says nothing about the row
    word = _NO_NUMBER.match(error.doc, error.pos)
    return f"{word[0]} is no JSON value" if word else error.msg.split(":")[0]
