"""Which characters the bytes of a text file stand for."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from sage.tools.finetune.data.languages import LANGUAGES
from sage.tools.finetune.data.plausibility import ASCII_BITS, bits_of

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TWO_BYTES = ("gb18030", "big5", "cp932", "cp949", "euc-jp")
_LEGACY = (*LANGUAGES, *_TWO_BYTES)
_UNUSUAL_BITS = {"big5": 3, "cp932": 3, "cp949": 3, "euc-jp": 9} | {
    encoding: bits for encoding, (bits, _) in LANGUAGES.items()
}
"""How much less likely than the first two an encoding is before anything was read."""
_CLEAR_BITS = 7
"""By how much one reading has to be more likely than another to be taken without asking."""
_MOST_BITS = 18
"""Of a character beyond ASCII on average; what costs more is no text in any of the encodings."""
_MOST_BITS_OF_LETTERS, _ODD_BITS = 6.5, 15
"""The same in an encoding of one byte a character, which makes letters of any bytes; and what a few odd
characters may cost more."""
_MOST_BITS_OF_COMMON = 12
_LEAST_BITS_OF_DOUBT = 18
"""On average: frequent characters of another encoding, and what makes UTF-8 doubtful: letters that hardly any
language has, while a lone Cyrillic one may be a slip."""
_FAULT = "\udcff"
_CONTROL_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 12
_RIGHT_PER_FAULT = 4
_LEAST_CHARS_PER_ZERO = 8
_WIDE = (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1))
"""Codec, bytes of a character, and which of them holds an ASCII one."""
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_THREE_BYTES_OR_MORE = re.compile("[\u0800-\U0010ffff]")
# No character of two bytes ends in the signs before the digits, nor in those between them and the letters.
_WORD = re.compile(rb"[0-9@-\xff]+")
_PLAIN_WORD = re.compile(rb"(?<![0-9a-z_\x80-\xff])[a-z]{2,}(?![0-9a-z_\x80-\xff])")
_ASCII = bytes(range(0x80))


class Guess(NamedTuple):
    encoding: str
    bits: float
    text: str
    """What it makes of the sample."""

    @property
    def bits_per_character(self) -> float:
        """Of those beyond ASCII."""
        return (self.bits - ASCII_BITS * (len(self.text) - self.beyond)) / self.beyond

    @property
    def beyond(self) -> int:
        return sum(char >= "\x80" for char in self.text)

    @property
    def is_text(self) -> bool:
        if self.encoding not in LANGUAGES:
            return self.bits_per_character <= _MOST_BITS
        bits = self.bits_per_character * self.beyond - _UNUSUAL_BITS[self.encoding]
        return bits <= _MOST_BITS_OF_LETTERS * self.beyond + _ODD_BITS


def detect_encoding(head: bytes, *, is_whole: bool) -> str | None:
    """A codec that reads `head`, the beginning (or the whole) of a file; None when it is no text, or as
    likely in another encoding."""
    found = possible_encodings(head, is_whole=is_whole)
    return next(iter(found)) if len(found) == 1 else None


def possible_encodings(head: bytes, *, is_whole: bool) -> dict[str, str]:
    """The codecs that may read `head`, the likeliest first: one where it is clear, none where it is no text.
    Where there are several: what each makes of one word, in which they differ."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return {encoding: ""}
    if b"\0" in head:
        wide = _wide_without_mark(head) or _utf8_with_zeros(head, is_whole)
        return {wide: ""} if wide else {}
    may_be_utf8, must_be_utf8 = _utf8(head, is_whole)
    if must_be_utf8:
        return {"utf-8": ""}
    pieces = _pieces(head, is_whole)
    guesses = _utf8_or_other(pieces) if may_be_utf8 else _most_plausible(pieces, _LEGACY, _plain(head))
    is_odd = not guesses[0].is_text or _CONTROL.search(head[:_CONTROL_BYTES].decode("latin_1"))
    if is_odd and not may_be_utf8:
        return {}
    words = zip(*(guess.text.split(" ") for guess in guesses), strict=False)
    differing = max(words, key=lambda found: len(set(found)))
    return {guess.encoding: word for guess, word in zip(guesses, differing, strict=True)}


def encoding_name(encoding: str) -> str:
    """As people write it: `GB18030`, `EUC-JP`."""
    return encoding.upper()


def _wide_without_mark(head: bytes) -> str | None:
    """UTF-32 or UTF-16, told by the first character's zeros."""
    for encoding, width, at in _WIDE:
        # Every format starts with ASCII: a bracket, a brace, a quotation mark or a column's name.
        others = head[:at] + head[at + 1 : width]
        if head[at : at + 1].strip(b"\0") and others == bytes(width - 1) and _can_read(head, encoding, False):
            return encoding
    return None


def _utf8_with_zeros(head: bytes, is_whole: bool) -> str | None:
    """Text in which a program left some zeros. Where there are many the file is no text."""
    is_text = head.count(0) * _LEAST_CHARS_PER_ZERO < len(head) and not _CONTROL.match(head.decode("latin_1"))
    return "utf-8" if is_text and _can_read(head, "utf-8", is_whole) else None


def _utf8(head: bytes, is_whole: bool) -> tuple[bool, bool]:
    """Whether the head may be UTF-8, of whose characters beyond ASCII far more are right than wrong (these
    are faults of rows); and whether it cannot be anything else."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head, is_whole)
    faults = 0 if _can_read(head, "utf-8", is_whole) else text.count("\ufffd")
    right = len(text) - len(text.encode("ascii", "ignore")) - faults
    if faults and right <= _RIGHT_PER_FAULT * faults:
        return False, False
    # Two bytes of another encoding are a character in UTF-8 by chance; three in a row hardly ever are.
    long = len(_THREE_BYTES_OR_MORE.findall(text)) - faults
    return True, not right or long > _RIGHT_PER_FAULT * faults


def _most_plausible(
    pieces: list[bytes], encodings: Iterable[str], plain: frozenset[str] = frozenset()
) -> list[Guess]:
    """The likeliest first; with it those that are nearly as likely and read something else."""
    readings: dict[str, Guess] = {}
    for guess in sorted((_guess(pieces, name, plain) for name in encodings), key=lambda guess: guess.bits):
        readings.setdefault(guess.text, guess)
    best = next(iter(readings.values()))
    return [guess for guess in readings.values() if guess.bits - best.bits < _CLEAR_BITS]


def _utf8_or_other(pieces: list[bytes]) -> list[Guess]:
    """What is UTF-8 by its bytes is something else only where that makes common words of odd letters.

    It is never refused: nearly every file is in UTF-8.
    """
    utf8 = _guess(pieces, "utf-8")
    if utf8.bits_per_character <= _LEAST_BITS_OF_DOUBT:
        return [utf8]
    other = _most_plausible(pieces, _TWO_BYTES)[0]
    if other.bits >= utf8.bits or other.bits_per_character > _MOST_BITS_OF_COMMON:
        return [utf8]
    return [other] if other.bits + 2 * _CLEAR_BITS < utf8.bits else [utf8]


def _guess(pieces: list[bytes], encoding: str, plain: frozenset[str] = frozenset()) -> Guess:
    text = b" ".join(pieces).decode(encoding, "replace")
    bits = bits_of(text, encoding, plain)
    return Guess(encoding, bits + _UNUSUAL_BITS.get(encoding, 0), text)


def _plain(head: bytes) -> frozenset[str]:
    """The words of ASCII alone."""
    return frozenset(map(bytes.decode, _PLAIN_WORD.findall(head[:_CONTROL_BYTES].lower())))


def _pieces(head: bytes, is_whole: bool) -> list[bytes]:
    """The different runs of bytes beyond ASCII, each with what is next to it, up to _SAMPLE_BYTES of them.

    A run that is repeated in every row says no more than once.
    """
    words = _WORD.findall(head)
    if not is_whole and not b"".join(words[:-1]).isascii():
        words.pop()  # it may end within a character
    pieces: dict[bytes, bytes] = {}
    size = 0
    for word in words:
        if word.isascii():
            continue
        first, end = len(word) - len(word.lstrip(_ASCII)), len(word.rstrip(_ASCII))
        # The second byte of a character may be an ASCII one, and is followed by something.
        piece = word[max(0, first - 1) : end + 2][:_SAMPLE_BYTES]
        key = word[first : end + (word[end : end + 1] >= b"@")]
        if key not in pieces:
            pieces[key] = piece
            size += len(piece)
        if size >= _SAMPLE_BYTES:
            break
    return list(pieces.values())


def _can_read(head: bytes, encoding: str, is_whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head, is_whole)
    except UnicodeDecodeError:
        return False
    return True


def marked_faults() -> str:
    """The name of an error handler that puts a mark, half a character, where bytes stand for nothing."""
    codecs.register_error("sage-mark", lambda error: (_FAULT, cast(UnicodeDecodeError, error).end))
    return "sage-mark"


def has_fault(value: Any) -> bool:
    """Whether such a mark is anywhere in a row's value."""
    if isinstance(value, str):
        return _FAULT in value
    if isinstance(value, dict):
        return any(map(has_fault, value)) or any(map(has_fault, value.values()))
    return isinstance(value, list) and any(map(has_fault, value))
