"""Indexes on disk: `<home>/indexes/<name>/`, each generation written whole before readers see it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from pydantic import BaseModel, ConfigDict, ValidationError

from sage_contracts.chat import Passage
from sage_contracts.errors import InvalidRequestError, NotFoundError
from sage_contracts.home import write_whole
from sage_retrieval import documents
from sage_retrieval.index import Index
from sage_retrieval.splitting import Piece, split

logger = logging.getLogger(__name__)

DOCS_INDEX = "docs-public"
_MANIFEST = "index.json"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class IndexCard(BaseModel):
    """What is known of an index: its manifest on disk, and one entry of the list."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: str = "sage.index"
    created_at: int
    passages: int
    source: str
    """The folder it was read from."""
    generation: str
    """The subfolder with the data of this build."""
    fingerprint: str
    """Of names, sizes and times of the files; another one means that they changed."""


@dataclass(slots=True)
class IndexStore:
    """All indexes of one home. Safe to share between threads."""

    folder: Path
    docs_dir: Path | None = None
    """Where docs-public is read from; None finds the project's own documentation."""
    _loaded: dict[str, tuple[str, Index]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _is_docs_fresh: bool = False

    def cards(self) -> list[IndexCard]:
        """The indexes on disk, by name."""
        folders = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [card for card in (self._card(folder.name) for folder in folders) if card is not None]

    def names(self) -> list[str]:
        """The names `search` knows; docs-public is there before its first use."""
        return sorted({DOCS_INDEX, *(card.id for card in self.cards())})

    def search(self, name: str, question: str, limit: int = 4) -> list[Passage]:
        """The best passages of an index, building docs-public at first use.

        Raises: NotFoundError, listing the names there are; InvalidRequestError when there are no documents.
        """
        with self._lock:
            index = self._open(name)
        return index.search(question, limit)

    def ingest(self, name: str, folder: Path) -> IndexCard:
        """Read a folder into an index, replacing the one of that name.

        Raises: InvalidRequestError when the name is no name or the folder has no text.
        """
        if not _NAME.match(name):
            raise InvalidRequestError(
                f"{name!r} is no name for an index: letters, digits, dot, dash and underscore, 64 at most.",
                param="name",
            )
        if not folder.is_dir():
            raise InvalidRequestError(f"{folder} is no folder that can be read here.", param="path")
        return self._write(name, folder, documents.files_in(folder))

    def _open(self, name: str) -> Index:
        card = self._card(name)
        if name == DOCS_INDEX and (card is None or not self._is_docs_fresh):
            card = self._refresh_docs()
        if card is None:
            raise NotFoundError(
                f"There is no index {name!r}. Indexes: {', '.join(self.names())}.",
                param="index",
                source="retrieval",
            )
        generation, index = self._loaded.get(name, ("", None))
        if index is None or generation != card.generation:
            try:
                index = Index.load(self.folder / name / card.generation)
            except (OSError, ValueError, TypeError, EOFError) as error:
                logger.warning("index %s is damaged (%s): reading %s again", name, error, card.source)
                return self._rebuild(name, Path(card.source))
            self._loaded[name] = (card.generation, index)
        return index

    def _rebuild(self, name: str, source: Path) -> Index:
        if name == DOCS_INDEX:
            root = documents.docs_root(self.docs_dir)
            self._write(name, root, documents.docs_files(root))
        else:
            self.ingest(name, source)
        return self._loaded[name][1]

    def _refresh_docs(self) -> IndexCard:
        """Build docs-public unless what is on disk was made from these very files."""
        root = documents.docs_root(self.docs_dir)
        files = documents.docs_files(root)
        card = self._card(DOCS_INDEX)
        if card is None or card.fingerprint != _fingerprint(root, files):
            card = self._write(DOCS_INDEX, root, files)
        self._is_docs_fresh = True
        return card

    def _write(self, name: str, root: Path, files: list[Path]) -> IndexCard:
        pieces: list[Piece] = []
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            pieces.extend(split(path.relative_to(root).as_posix(), text))
        if not pieces:
            raise InvalidRequestError(
                f"{root} has no text to index: looked for {', '.join(documents.patterns())}.", param="path"
            )
        card = IndexCard(
            id=name,
            created_at=int(time.time()),
            passages=len(pieces),
            source=str(root),
            generation=f"g-{secrets.token_hex(6)}",
            fingerprint=_fingerprint(root, files),
        )
        home = self.folder / name
        index = Index.build(pieces)
        index.save(home / card.generation)
        # The manifest is the switch: until it is renamed into place, readers keep the old generation.
        write_whole(home / _MANIFEST, card.model_dump_json(indent=2))
        for old in home.glob("g-*"):
            if old.name != card.generation:
                shutil.rmtree(old, ignore_errors=True)
        self._loaded[name] = (card.generation, index)
        return card

    def _card(self, name: str) -> IndexCard | None:
        if not _NAME.match(name):
            return None
        try:
            return IndexCard.model_validate_json((self.folder / name / _MANIFEST).read_text())
        except (OSError, ValidationError):
            return None


def _fingerprint(root: Path, files: list[Path]) -> str:
    seen = [
        (path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
        for path in files
        for status in [path.stat()]
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
