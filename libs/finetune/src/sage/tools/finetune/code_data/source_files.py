"""Which files below a folder are source that a person wrote."""

from __future__ import annotations

import os
import re
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO, TextIOWrapper
from pathlib import Path, PurePath
from typing import NamedTuple

from sage.tools.finetune.data.encodings import encoding_name, possible_encodings

LANGUAGES = {
    ".py": "Python",
    ".js": "JavaScript",
    ".mjs": "JavaScript",
    ".jsx": "JavaScript",
    ".ts": "TypeScript",
    ".tsx": "TSX",
    ".go": "Go",
    ".rs": "Rust",
    ".java": "Java",
}
SOURCE_SUFFIXES = frozenset(LANGUAGES)
MAX_FILE_BYTES = 1_000_000  # larger files are data or generated

_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idle_test", "venv",
    "build", "dist", "lib2to3", "encodings", "pydoc_data", "turtledemo", "_vendor", "vendor", "target",
    "third_party",
}  # fmt: skip
_GENERATED_NAME = re.compile(r"(_pb2(_grpc)?\.py|\.pb\.go|[._]gen(erated)?\.\w+|\.min\.m?js|\.d\.ts)$")
_GENERATED_HEAD = re.compile(
    r"do not edit|@generated|(?:auto|automatically|code|file)[- ]?generated\b", re.IGNORECASE
)
_HEAD_CHARS = 600
_MAX_LINE_CHARS = 1000  # longer lines are a minifier's


def source_files(source: Path) -> Iterator[Path]:
    """In no order. A single file is its own tree. What cannot be read is passed over."""
    if source.is_file():
        if _is_source_name(source.name):
            yield source
        return
    yield from (path for path in own_files(source) if _is_source_name(path.name) and _is_own_file(path))


def own_files(tree: Path) -> Iterator[Path]:
    """All files of a tree but for what was installed, vendored or built in it. In no order."""
    for root, folders, names in os.walk(tree):
        folder = Path(root)
        if "pyvenv.cfg" in names and folder != tree:
            folders.clear()  # a virtual environment, whatever it is called
            continue
        folders[:] = [name for name in folders if not _is_skipped(name)]
        yield from (folder / name for name in names)


def is_source_path(inside: PurePath) -> bool:
    """Whether a path within a tree is that of a file to learn from, as far as its name tells."""
    return _is_source_name(inside.name) and not any(map(_is_skipped, inside.parts[:-1]))


def _is_skipped(folder_name: str) -> bool:
    return folder_name.startswith(".") or folder_name in _SKIPPED_FOLDERS


def _is_source_name(name: str) -> bool:
    is_source = PurePath(name).suffix in SOURCE_SUFFIXES and not name.startswith(".")
    return is_source and not _GENERATED_NAME.search(name)


def _is_own_file(path: Path) -> bool:
    try:
        return not path.is_symlink() and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
    except OSError:
        return False


class UnreadableSourceError(Exception):
    """Of which nothing can be learned; the message says why, in few words."""


class SourceText(NamedTuple):
    text: str
    guessed: str | None
    """The encoding, where the file is in neither UTF-8 nor the one that it names."""


def read_source(path: Path) -> SourceText | None:
    """The text of a file that a person wrote; None for anything else.

    Raises: UnreadableSourceError.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        source = _source_text(path.read_bytes(), may_name_encoding=path.suffix == ".py")
    except OSError as error:
        raise UnreadableSourceError(error.strerror or str(error)) from error
    if _GENERATED_HEAD.search(source.text, 0, _HEAD_CHARS):
        return None
    if path.suffix != ".py" and max(map(len, source.text.split("\n"))) > _MAX_LINE_CHARS:
        return None
    return source


def _source_text(content: bytes, *, may_name_encoding: bool) -> SourceText:
    with suppress(ValueError, SyntaxError, LookupError):
        encoding = (
            tokenize.detect_encoding(BytesIO(content).readline)[0] if may_name_encoding else "utf-8-sig"
        )
        return SourceText(_decoded(content, encoding), None)
    found = possible_encodings(content, is_whole=True)
    if len(found) > 1:
        raise UnreadableSourceError(f"may be {' or '.join(map(encoding_name, found))}")
    for encoding in found:
        with suppress(UnicodeDecodeError):
            return SourceText(_decoded(content, encoding), encoding_name(encoding))
    raise UnreadableSourceError("no text in an encoding that is known")


def _decoded(content: bytes, encoding: str) -> str:
    """With line breaks as Python's readers give them."""
    return TextIOWrapper(BytesIO(content), encoding).read()
