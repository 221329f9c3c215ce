"""Which files below a folder are source that a person wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

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
    """In no order. A single file is its own tree."""
    if source.is_file():
        if source.suffix in SOURCE_SUFFIXES:
            yield source
        return
    for entry in source.iterdir():
        if entry.is_symlink() or entry.name.startswith("."):
            continue
        if entry.is_dir() and entry.name not in _SKIPPED_FOLDERS:
            yield from source_files(entry)
        elif entry.suffix in SOURCE_SUFFIXES and not _GENERATED_NAME.search(entry.name) and entry.is_file():
            yield entry


def read_source(path: Path) -> str | None:
    """The text of a file that a person wrote; None for anything else."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if _GENERATED_HEAD.search(text, 0, _HEAD_CHARS):
        return None
    if path.suffix != ".py" and max(map(len, text.split("\n"))) > _MAX_LINE_CHARS:
        return None
    return text
