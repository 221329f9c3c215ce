"""The documents of a file or a folder: which files are text, and what their bytes say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sage.tools.finetune.data.encodings import encoding_name, possible_encodings
from sage_cli.git import ignored_in
from sage_cli.render import bytes_text
from sage_contracts.errors import InvalidRequestError
from sage_contracts.indexes import MAX_FILE_BYTES, SKIPPED_FOLDERS, TEXT_SUFFIXES, IndexDocument, patterns

_MAX_PATH_CHARS = 512


@dataclass
class Documents:
    """What was read, and what was not."""

    read: list[IndexDocument] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """`picture.png: …`, each with the reason; hidden files are not worth a word."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how files were read."""


class _LeftOutError(Exception):
    """Says why a file is none of the documents."""


def read_documents(path: Path) -> Documents:
    """Raises: InvalidRequestError: nothing there, or no text in it; the message names what was left out."""
    if not path.exists():
        raise InvalidRequestError(f"There is no {path}. Give a file or a folder with documents.")
    found = Documents()
    root = path if path.is_dir() else path.parent
    for file in _files_below(root, found) if path.is_dir() else [path]:
        name = os.fsencode(file.relative_to(root).as_posix()).decode("utf-8", "replace")
        try:
            found.read.append(IndexDocument(path=name, text=_text_of(file, name, found)))
        except _LeftOutError as reason:
            found.left_out.append(f"{name}: {reason}")
    if not found.read:
        left_out = f" Left out: {'; '.join(shortened(found.left_out))}." if found.left_out else ""
        raise InvalidRequestError(
            f"{path} has no text to index: looked for {', '.join(patterns())}.{left_out}"
        )
    return found


def shortened(lines: list[str], most: int = 10) -> list[str]:
    """The first of them, and how many more there are."""
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most:,} more"]


def _files_below(root: Path, found: Documents) -> Iterator[Path]:
    """In order of their names; folders of what was installed, built or ignored are left out whole."""
    is_ignored = ignored_in(root)

    def cannot_enter(error: OSError) -> None:
        found.left_out.append(f"{_inside(root, error.filename)}/: {error.strerror}")

    for place, folders, names in os.walk(root, onerror=cannot_enter):
        folder = Path(place)
        if "pyvenv.cfg" in names and folder != root:
            folders.clear()  # a virtual environment, whatever it is called
            names = []
            found.left_out.append(f"{_inside(root, folder)}/: installed packages")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [name for name in folders if name in SKIPPED_FOLDERS]:
            folders.remove(name)
            found.left_out.append(f"{_inside(root, folder / name)}/: what was installed or built")
        names = sorted(name for name in names if not name.startswith("."))
        for entries, reason in ((folders, "/: git ignores all of it"), (names, ": git ignores it")):
            for name in [name for name in entries if is_ignored(folder / name)]:
                entries.remove(name)
                found.left_out.append(_inside(root, folder / name) + reason)
        yield from (folder / name for name in names)


def _inside(root: Path, folder: str | Path) -> str:
    return os.fsencode(Path(folder).relative_to(root).as_posix()).decode("utf-8", "replace")


def _text_of(file: Path, name: str, found: Documents) -> str:
    if file.suffix.lower() not in TEXT_SUFFIXES:
        raise _LeftOutError("no kind of text that can be indexed")
    if len(name) > _MAX_PATH_CHARS:
        raise _LeftOutError(f"its path has more than {_MAX_PATH_CHARS} characters")
    try:
        if not file.is_file():
            raise _LeftOutError("no file, or a link to none")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise _LeftOutError(f"larger than {bytes_text(MAX_FILE_BYTES)}")
        content = file.read_bytes()
    except OSError as error:
        raise _LeftOutError(error.strerror or str(error)) from error
    encodings = possible_encodings(content, is_whole=True)
    if not encodings:
        raise _LeftOutError("text in no encoding that is known; save it as UTF-8")
    if len(encodings) > 1:
        readings = " or ".join(f"{encoding_name(encoding)} ({word})" for encoding, word in encodings.items())
        raise _LeftOutError(f"it may be {readings}; save it as UTF-8")
    (encoding,) = encodings
    text = content.decode(encoding, "replace")
    if not text.strip():
        raise _LeftOutError("empty")
    if not encoding.startswith("utf-8"):
        found.notes.append(f"{name} is read as {encoding_name(encoding)}")
    return text
