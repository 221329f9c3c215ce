"""Indexes that chats retrieve passages from: what they are made of, and how they are listed."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sage_contracts.errors import InvalidRequestError

MARKDOWN_SUFFIXES = frozenset({".md", ".markdown", ".txt"})
RST_SUFFIXES = frozenset({".rst"})
CODE_SUFFIXES = frozenset({".py", ".js", ".ts", ".go", ".rs", ".java", ".c", ".h", ".cpp", ".sh"})
TEXT_SUFFIXES = MARKDOWN_SUFFIXES | RST_SUFFIXES | CODE_SUFFIXES
"""Of the files that an index is made of."""
MAX_FILE_BYTES = 2 * 1024 * 1024
"""Larger files are data or generated."""
SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "venv", "dist", "build"})
"""What lies in them was installed or built. Hidden ones are skipped besides."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_index_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name))


def require_index_name(name: str) -> None:
    """Raises: InvalidRequestError."""
    if not is_index_name(name):
        raise InvalidRequestError(
            f"{name!r} is no name for an index: letters, digits, dot, dash and underscore, 64 at most, the "
            "first a letter or a digit.",
            param="name",
        )


def patterns() -> list[str]:
    """The kinds of files, as people write them: `*.md`."""
    return sorted(f"*{suffix}" for suffix in TEXT_SUFFIXES)


class IndexDocument(BaseModel):
    """One file of an index."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=512)]
    """What its passages are cited by; the ending says how it is cut: `guides/start.md`."""
    text: str


class PutIndexRequest(BaseModel):
    """PUT /v1/sage/indexes/{name}: all documents of the index, in place of what it had."""

    model_config = ConfigDict(extra="forbid")

    documents: Annotated[list[IndexDocument], Field(min_length=1)]


class IndexCard(BaseModel):
    """What is known of an index: its manifest on disk, and one entry of the list."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: str = "sage.index"
    created_at: int
    files: int
    passages: int
    source: str
    """The folder it was read from; empty where its documents were sent."""
    generation: str
    """The subfolder with the data of this build."""
    fingerprint: str
    """Of names, sizes and times of that folder's files; another one means that they changed."""
