"""Documents into passages, along their headings. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sage_contracts.indexes import CODE_SUFFIXES, RST_SUFFIXES

MIN_CHARS = 200
MAX_CHARS = 1200

_MARKDOWN_HEADING = re.compile(r"(#{1,6})(\s.+)")
_RST_UNDERLINE = re.compile(r"^([=\-~^\"'+*#])\1{2,}\s*$")
_DEFINITION = re.compile(r"^(?:async\s+def|def|class|func|fn|function|interface|struct)\s+(\w+)")
_FENCE = re.compile(r"^\s*(```|~~~)")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？；\n])")


@dataclass(frozen=True, slots=True)
class Piece:
    """One passage before it is indexed."""

    source: str
    """`cli.md#sage-chat`: file relative to the indexed folder, then the heading."""
    title: str
    """The headings above it, for the index."""
    text: str


@dataclass(frozen=True, slots=True)
class _Section:
    headings: tuple[str, ...]
    text: str


def split(path: str, content: str) -> list[Piece]:
    """The passages of one file, each `MIN_CHARS`–`MAX_CHARS` long where the file allows it."""
    suffix = path[path.rfind(".") :].lower()
    if suffix in RST_SUFFIXES:
        sections = _rst_sections(content)
    elif suffix in CODE_SUFFIXES:
        sections = _code_sections(content)
    else:
        sections = _markdown_sections(content)
    return [
        Piece(_source(path, section.headings), " › ".join(section.headings)[:MAX_CHARS], text)
        for section in _joined(sections)
        for text in _cut(section.text)
    ]


def slug(heading: str) -> str:
    """A heading as the fragment of its link: lower case, hyphens, letters of any script."""
    kept = re.sub(r"[^\w\s-]", "", heading.replace("_", " ").lower())
    return re.sub(r"[\s-]+", "-", kept).strip("-")


def _source(path: str, headings: tuple[str, ...]) -> str:
    fragment = slug(headings[-1]) if headings else ""
    return f"{path}#{fragment}" if fragment else path


def _markdown_sections(content: str) -> Iterator[_Section]:
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    is_fenced = False
    for line in content.splitlines():
        if _FENCE.match(line):
            is_fenced = not is_fenced
        found = None if is_fenced else _MARKDOWN_HEADING.fullmatch(line)
        if found:
            yield _Section(tuple(title for _, title in headings), "\n".join(lines))
            level = len(found[1])
            headings = [entry for entry in headings if entry[0] < level] + [(level, _title(found[2]))]
            lines = []
        lines.append(line)
    yield _Section(tuple(title for _, title in headings), "\n".join(lines))


def _title(rest: str) -> str:
    """What stands between blanks and closing hashes, which a pattern would look for in cubic time."""
    title = rest.strip().rstrip("#").rstrip()
    # At least one sign is left: of hashes alone the first, of blanks alone the last. And it has an end: every
    # passage below repeats it.
    return title[:MAX_CHARS] or rest.strip()[:1] or rest[-1]


def _rst_sections(content: str) -> Iterator[_Section]:
    lines = content.splitlines()
    starts = [
        number
        for number in range(len(lines) - 1)
        if lines[number].strip()
        and not _RST_UNDERLINE.match(lines[number])
        and _RST_UNDERLINE.match(lines[number + 1])
        and len(lines[number + 1].rstrip()) >= len(lines[number].rstrip())
    ]
    yield _Section((), "\n".join(lines[: starts[0]] if starts else lines))
    for start, end in pairwise([*starts, len(lines)]):
        yield _Section((lines[start].strip(),), "\n".join(lines[start:end]))


def _code_sections(content: str) -> Iterator[_Section]:
    name: tuple[str, ...] = ()
    lines: list[str] = []
    for line in content.splitlines():
        found = _DEFINITION.match(line)
        if found:
            yield _Section(name, "\n".join(lines))
            name, lines = (found[1],), []
        lines.append(line)
    yield _Section(name, "\n".join(lines))


def _joined(sections: Iterator[_Section]) -> list[_Section]:
    """Short sections together with their neighbours; a heading without text goes to what follows it."""
    joined: list[_Section] = []
    for section in sections:
        text = section.text.strip()
        if not text:
            continue
        last = joined[-1] if joined else None
        if last and len(last.text) < MIN_CHARS and len(last.text) + len(text) + 2 <= MAX_CHARS:
            # The longer part names the passage: a bare title above a section must not take its citation.
            headings = section.headings if len(text) >= len(last.text) else last.headings
            joined[-1] = _Section(headings, f"{last.text}\n\n{text}")
        else:
            joined.append(_Section(section.headings, text))
    if len(joined) > 1 and len(joined[-1].text) < MIN_CHARS:
        last, before = joined[-1], joined[-2]
        if len(before.text) + len(last.text) + 2 <= MAX_CHARS:
            joined[-2:] = [_Section(before.headings, f"{before.text}\n\n{last.text}")]
    return joined


def _cut(text: str) -> list[str]:
    """A section in pieces of at most `MAX_CHARS`, cut at paragraphs, else sentences, else anywhere."""
    if len(text) <= MAX_CHARS:
        return [text]
    pieces: list[str] = []
    current = ""
    for part in _parts(text):
        if current and len(current) + len(part) > MAX_CHARS:
            pieces.append(current.strip())
            current = ""
        current += part
    rest = current.strip()
    if pieces and rest and len(rest) < MIN_CHARS and len(pieces[-1]) + len(rest) + 2 <= MAX_CHARS:
        pieces[-1] = f"{pieces[-1]}\n\n{rest}"
    elif rest:
        pieces.append(rest)
    return [piece for piece in pieces if piece]


def _parts(text: str) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n\n)", text):
        if len(paragraph) <= MAX_CHARS:
            yield paragraph
            continue
        for sentence in _SENTENCE_END.split(paragraph):
            for start in range(0, len(sentence), MAX_CHARS):
                yield sentence[start : start + MAX_CHARS]
