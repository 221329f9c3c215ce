"""Which characters the bytes of a text file stand for."""

from __future__ import annotations

import codecs
import re
from typing import Any, cast

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEGACY = ("gb18030", "big5", "cp932", "cp949", "cp1252", "cp1251", "latin_1")
_FAULT = "\udcff"
_SAMPLE_BYTES = 1 << 16
_RIGHT_PER_FAULT = 4
_LEAST_CHARS_PER_ZERO = 8
_WIDE = (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1))
"""Codec, bytes of a character, and which of them holds an ASCII one."""
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
# Two bytes of GB 2312's first level: the 3,755 characters of everyday Chinese, and its punctuation.
_EVERYDAY_CHINESE = re.compile(rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]")
_KOREAN_ENDS_BEFORE = 0xC9
"""Korean's two bytes begin within the first half of those; Chinese, in the order of its sounds, in both."""


def detect_encoding(head: bytes, *, is_whole: bool) -> str | None:
    """A codec that reads `head`, the beginning (or the whole) of a file; None when it is no text at all."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        return _wide_without_mark(head) or _utf8_with_zeros(head, is_whole)
    if _can_read(head, "utf-8", is_whole) or _is_utf8_with_faults(head):
        return "utf-8"
    return _legacy(head, is_whole)


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


def _is_utf8_with_faults(head: bytes) -> bool:
    """Whether far more characters beyond ASCII are right than wrong: these are then faults of rows."""
    text = head.decode("utf-8", "replace")
    faults = text.count("\ufffd")
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    return beyond_ascii - faults > _RIGHT_PER_FAULT * faults


def _legacy(head: bytes, is_whole: bool) -> str | None:
    if _can_read(head, "gb18030", is_whole) and _is_everyday_chinese(head):
        return "gb18030"
    from charset_normalizer import from_bytes

    best = from_bytes(head[:_SAMPLE_BYTES], cp_isolation=list(_LEGACY)).best()
    if best is None or _CONTROL.search(str(best)):
        return None
    return best.encoding if _can_read(head, best.encoding, is_whole) else None


def _is_everyday_chinese(head: bytes) -> bool:
    high = len(re.findall(rb"[\x80-\xff]", head))
    pairs = _EVERYDAY_CHINESE.findall(head)
    late = sum(pair[0] >= _KOREAN_ENDS_BEFORE for pair in pairs)
    return 2 * len(pairs) >= 0.9 * high and late >= 0.1 * len(pairs)


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
