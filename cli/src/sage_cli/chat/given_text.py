"""Text that a person gave as an argument, through a pipe or at the prompt, whatever encoding it is in."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from sage_cli import render
from sage_contracts.errors import InvalidRequestError


def from_pipe() -> str:
    """All of standard input. Raises: InvalidRequestError."""
    content = sys.stdin.buffer.read()
    for encoding in ("utf-8-sig", sys.stdin.encoding):
        with suppress(UnicodeDecodeError):
            return _with_plain_ends(content.decode(encoding))
    return _guessed(content, "message")


def from_words(text: str, what: str) -> str:
    """The text of an argument or a typed line, in which bytes that are not UTF-8 are half characters.

    Raises: InvalidRequestError naming `what` it is.
    """
    with suppress(UnicodeEncodeError):
        text.encode()
        return text
    try:
        content = os.fsencode(text)
    except UnicodeEncodeError:
        raise refusal(what) from None
    return _guessed(content, what)


def refusal(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The {what} is not UTF-8: set the terminal to UTF-8, or convert the text: iconv -f gbk -t utf-8."
    )


def _guessed(content: bytes, what: str) -> str:
    from sage.tools.finetune.data.encodings import detect_encoding, encoding_name

    encoding = detect_encoding(content, is_whole=True)
    with suppress(UnicodeDecodeError):
        if encoding is not None:
            text = _with_plain_ends(content.decode(encoding))
            told = f"The {what} is read as {encoding_name(encoding)}."
            render.line(render.error_console(), "wait", told)
            return text
    raise refusal(what)


def _with_plain_ends(text: str) -> str:
    return text.replace("\r\n", "\n")
