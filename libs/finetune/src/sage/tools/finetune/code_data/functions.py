"""A function found in some source, whatever the language; and which of them teach nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

Lines = tuple[int, int]
"""Of a text, from 0, the end exclusive."""

MIN_GAP_CHARS = 20
MAX_GAP_CHARS = 600

_REMARK = r"(?:todo|fixme|xxx)\b"
_PLACEHOLDER = re.compile(
    r"(?-i:\b(?:TODO|FIXME|XXX)\b)"
    # In small letters it may be a variable's name: only as the first word of a comment, which `a // todo` and
    # the private field `#todo` are not.
    rf"|#\s+{_REMARK}|#{_REMARK}:|(?:^|[;{{}},])\s*(?://+|/\*+)\s*{_REMARK}|^\s*\*\s+{_REMARK}"
    r"|^\s*\.\.\.\s*(?:#.*)?$"
    r"|raise\s+NotImplementedError\b|return\s+NotImplemented\b"
    r"|\b(?:todo|unimplemented)!\s*[({]|UnsupportedOperationException"
    r"|[\"'`](?:method |function )?(?:is )?(?:not|un)[ -]?(?:yet )?implemented",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is going to be asked, so that nothing else is worked out."""

    gaps: bool = True
    undocumented: bool = True


@dataclass(frozen=True, slots=True)
class SourceFunction:
    """`head` and `body` joined by a line break are the function; `bare_head` is the head without its doc."""

    language: str
    """As people write it."""
    module: str
    name: str
    head: str
    bare_head: str
    doc: str
    """What the documentation says, without its marks; empty where there is none."""
    body: str
    gaps: tuple[Lines, ...]
    """Statements that can be left out, as lines of the whole function."""

    @property
    def whole(self) -> str:
        return f"{self.head}\n{self.body}"

    @property
    def gap(self) -> Lines | None:
        """One of the gaps, always the same one for the same function."""
        if not self.gaps:
            return None
        digest = sha256(self.whole.encode("utf-8", "surrogatepass")).digest()
        return self.gaps[int.from_bytes(digest[:4]) % len(self.gaps)]


def holds_placeholder(code: str) -> bool:
    """Whether somebody left the work for later: the model is not to learn that."""
    return _PLACEHOLDER.search(code) is not None


def at_margin(lines: list[str], indent: int) -> str | None:
    """The lines moved left by `indent` characters; None where one does not reach that far in."""
    for line in lines:
        if line[:indent].strip():
            return None
    return "\n".join(line[indent:].rstrip() if line.isspace() else line[indent:] for line in lines)


def usable_gaps(whole: str, gaps: list[Lines]) -> tuple[Lines, ...]:
    """Those of a size worth asking for."""
    lines = whole.split("\n")
    sizes = ((gap, len("\n".join(lines[slice(*gap)]).strip())) for gap in gaps)
    return tuple(gap for gap, size in sizes if MIN_GAP_CHARS <= size <= MAX_GAP_CHARS)
