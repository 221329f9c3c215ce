"""Indexes on disk: `<home>/indexes/<name>/`, each generation written whole before readers see it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, RLock

from pydantic import ValidationError

from sage_contracts.chat import Passage
from sage_contracts.errors import ConflictError, InvalidRequestError, NotFoundError, StorageFullError
from sage_contracts.home import sync_path, write_whole
from sage_contracts.indexes import (
    IndexCard,
    IndexDocument,
    PutIndexRequest,
    is_index_name,
    patterns,
    require_index_name,
)
from sage_retrieval import documents
from sage_retrieval.build import DOCUMENTS, build
from sage_retrieval.index import Index

logger = logging.getLogger(__name__)

DOCS_INDEX = "docs-public"
_MANIFEST = "index.json"
# Where a generation is written before it is complete; no index can have these names.
_INCOMING = ".incoming"
_REBUILT = ".rebuilt"


@dataclass(slots=True)
class IndexStore:
    """All indexes of one home. Safe to share between threads."""

    folder: Path
    docs_dir: Path | None = None
    """Where docs-public is read from; None finds the project's own documentation."""
    _loaded: dict[str, tuple[str, Index]] = field(default_factory=dict)
    _lock: RLock = field(default_factory=RLock)
    _put_lock: Lock = field(default_factory=Lock)
    """Held for as long as an index takes to build; searches go on meanwhile."""
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

        Raises: NotFoundError, listing the names there are; InvalidRequestError when there are no documents;
        ConflictError: damaged beyond repair.
        """
        with self._lock:
            index = self._open(name)
        return index.search(question, limit)

    def put(self, name: str, sent: Sequence[IndexDocument]) -> IndexCard:
        """Make an index of documents, in place of the one of that name, which answers until this is whole.

        Raises: InvalidRequestError: no name, or no text; ConflictError: docs-public; StorageFullError.
        """
        _require_own(name)
        with self._put_lock:
            return self._write(name, sent, self.folder / _INCOMING)

    def remove(self, name: str) -> None:
        """Raises: InvalidRequestError: no name; ConflictError: docs-public; NotFoundError."""
        _require_own(name)
        with self._lock:
            if not (self.folder / name).is_dir():
                raise self._unknown(name)
            (self.folder / name / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self._loaded.pop(name, None)

    def _open(self, name: str) -> Index:
        card = self._card(name)
        if name == DOCS_INDEX and (card is None or not self._is_docs_fresh):
            card = self._refresh_docs()
        if card is None:
            raise self._unknown(name)
        generation, index = self._loaded.get(name, ("", None))
        if index is None or generation != card.generation:
            try:
                index = Index.load(self.folder / name / card.generation)
            except (OSError, ValueError, TypeError, EOFError) as error:
                logger.warning("index %s cannot be used (%s): building it again", name, error)
                card = self._rebuild(name, card.generation)
                index = Index.load(self.folder / name / card.generation)
            self._loaded[name] = (card.generation, index)
        return index

    def _rebuild(self, name: str, generation: str) -> IndexCard:
        if name == DOCS_INDEX:
            root = documents.docs_root(self.docs_dir)
            return self._write_docs(root, documents.docs_files(root))
        try:
            kept = (self.folder / name / generation / DOCUMENTS).read_bytes()
            sent = PutIndexRequest.model_validate_json(kept).documents
        except (OSError, ValidationError) as error:
            raise ConflictError(
                f"The index {name!r} is damaged or of another version, and the documents it was made of "
                "cannot be read: add them again, or remove it.",
                param="index",
                source="retrieval",
            ) from error
        return self._write(name, sent, self.folder / _REBUILT)

    def _refresh_docs(self) -> IndexCard:
        """Build docs-public unless what is on disk was made from these very files."""
        root = documents.docs_root(self.docs_dir)
        files = documents.docs_files(root)
        card = self._card(DOCS_INDEX)
        if card is None or card.fingerprint != _fingerprint(root, files):
            card = self._write_docs(root, files)
        self._is_docs_fresh = True
        return card

    def _write_docs(self, root: Path, files: list[Path]) -> IndexCard:
        read = [
            IndexDocument(
                path=path.relative_to(root).as_posix(),
                text=path.read_text(encoding="utf-8", errors="replace"),
            )
            for path in files
        ]
        return self._write(
            DOCS_INDEX, read, self.folder / _REBUILT, source=str(root), fingerprint=_fingerprint(root, files)
        )

    def _write(
        self,
        name: str,
        read: Sequence[IndexDocument],
        unfinished: Path,
        *,
        source: str = "",
        fingerprint: str = "",
    ) -> IndexCard:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            # Kept: where they were sent, there is no folder to read again when the scores are damaged.
            write_whole(unfinished / DOCUMENTS, PutIndexRequest(documents=list(read)).model_dump_json())
            passages = build(unfinished)
            if not passages:
                where = f"{source} has" if source else "The documents have"
                raise InvalidRequestError(
                    f"{where} no text to index: looked for {', '.join(patterns())}.", param="documents"
                )
            card = IndexCard(
                id=name,
                created_at=int(time.time()),
                files=len(read),
                passages=passages,
                source=source,
                generation=f"g-{secrets.token_hex(6)}",
                fingerprint=fingerprint,
            )
            self._switch(card, unfinished)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(f"There is no room for the index {name!r}: {error}") from error
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return card

    def _switch(self, card: IndexCard, complete: Path) -> None:
        home = self.folder / card.id
        with self._lock:
            home.mkdir(exist_ok=True)
            complete.rename(home / card.generation)
            sync_path(home)
            # The manifest is the switch: until it is renamed into place, readers keep the old generation.
            write_whole(home / _MANIFEST, card.model_dump_json(indent=2))
            for old in home.glob("g-*"):
                if old.name != card.generation:
                    shutil.rmtree(old, ignore_errors=True)
            self._loaded.pop(card.id, None)

    def _card(self, name: str) -> IndexCard | None:
        if not is_index_name(name):
            return None
        try:
            return IndexCard.model_validate_json((self.folder / name / _MANIFEST).read_text())
        except (OSError, ValidationError):
            return None

    def _unknown(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"There is no index {name!r}. Indexes: {', '.join(self.names())}.",
            param="index",
            source="retrieval",
        )


def _require_own(name: str) -> None:
    require_index_name(name)
    if name == DOCS_INDEX:
        raise ConflictError(
            f"{DOCS_INDEX} is the project's own documentation, and can be neither replaced nor removed: "
            "choose another name.",
            param="name",
        )


def _fingerprint(root: Path, files: list[Path]) -> str:
    seen = [
        (path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
        for path in files
        for status in [path.stat()]
    ]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
