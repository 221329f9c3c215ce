"""Uploaded files: bytes under `<home>/files`, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from sqlalchemy.orm import Session

from sage_contracts.errors import ConflictError, InvalidRequestError, NotFoundError
from sage_contracts.files import FileObject, FilePurpose
from sage_contracts.home import Home, sync_path
from sage_contracts.paging import Deleted, ListPage
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.files import repository as files
from sage_orchestrator.files.upload import TEMPORARY_PREFIX, Upload
from sage_orchestrator.ids import new_id
from sage_orchestrator.paging import PageOrder, list_page
from sage_orchestrator.rows import FileRow

# Kept on disk after the id, so that whoever reads the file by path alone can tell its format.
_KNOWN_SUFFIXES = (
    ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz", ".tar.gz", ".tgz", ".zip",
    ".jsonl.zst", ".json.zst", ".csv.zst", ".tsv.zst",
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst",
)  # fmt: skip
_STALE_UPLOAD_S = 24 * 3600.0
_ANCHOR_FIELD, _SECONDS_FIELD = "expires_after[anchor]", "expires_after[seconds]"


class FileService:
    def __init__(self, database: Database, home: Home, clock: Clock) -> None:
        self._database = database
        self._home = home
        self._clock = clock

    @property
    def folder(self) -> Path:
        return self._home.files

    def keep(
        self, upload: Upload, also: Callable[[Session, str], None] = lambda _session, _file_id: None
    ) -> FileObject:
        """Give an upload its id and its row; `also` writes in the same transaction, or refuses it.

        Raises: InvalidRequestError, StorageFullError, and what `also` does; then the bytes are gone.
        """
        purpose = purpose_of(upload.fields.get("purpose"))
        seconds = _lifetime_said(upload.fields)
        now = self._clock()
        file_id = new_id("file")
        path = self.folder / f"{file_id}{_suffix(upload.filename)}"
        upload.path.chmod(0o644)
        upload.path.replace(path)
        try:
            sync_path(path.parent)
            row = FileRow(
                id=file_id,
                filename=upload.filename,
                purpose=purpose.value,
                size_bytes=upload.size_bytes,
                path=self._home.relative(path),
                created_at=now,
                expires_at=None if seconds is None else now + seconds,
            )
            with self._database.write() as session:
                also(session, file_id)
                session.add(row)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return to_object(row)

    def get(self, file_id: str) -> FileObject:
        with self._database.read() as session:
            return to_object(files.get(session, file_id))

    def content(self, file_id: str) -> tuple[Path, str]:
        """Where the bytes are, and the name they were uploaded under. Raises: NotFoundError."""
        with self._database.read() as session:
            row = files.get(session, file_id)
        path = self._home.resolve(row.path)
        if not path.is_file():
            raise NotFoundError(f"The bytes of {file_id} are gone from {path}: upload the file again.")
        return path, row.filename

    def list_files(
        self, *, purpose: str | None, after: str | None, limit: int, order: PageOrder
    ) -> ListPage[FileObject]:
        with self._database.read() as session:
            rows, has_more = files.page(session, purpose=purpose, after=after, limit=limit, order=order)
            return list_page([to_object(row) for row in rows], has_more)

    def delete(self, file_id: str) -> Deleted:
        """Raises: NotFoundError; ConflictError while an unfinished job needs the file."""
        with self._database.write() as session:
            row = files.get(session, file_id)
            user = files.unfinished_user(session, file_id)
            if user is not None:
                raise ConflictError(f"{file_id} is needed by the job {user}: cancel that first.")
            path = self._home.resolve(row.path)
            files.forget(row, self._clock())
        # The row goes first: a crash in between leaves bytes without a row, never a row without bytes.
        path.unlink(missing_ok=True)
        return Deleted(id=file_id, object="file")

    def delete_expired(self) -> None:
        """Remove files whose `expires_after` has passed, but not from under a job."""
        with self._database.read() as session:
            expired = [row.id for row in files.expired(session, self._clock())]
        for file_id in expired:
            with suppress(ConflictError, NotFoundError):
                self.delete(file_id)
        with self._database.write() as session:
            files.give_up_places(session, self._clock())

    def remove_stale_uploads(self) -> None:
        """Remove what a crash left half-sent, once nobody can still be sending it."""
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            with suppress(OSError):
                if self._clock() - path.stat().st_mtime > _STALE_UPLOAD_S:
                    path.unlink()


def to_object(row: FileRow) -> FileObject:
    return FileObject(
        id=row.id,
        bytes=row.size_bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=FilePurpose(row.purpose),
        expires_at=None if row.expires_at is None else int(row.expires_at),
    )


def purpose_of(given: str | None) -> FilePurpose:
    """What a file may be uploaded for. Raises: InvalidRequestError."""
    uploadable = [purpose for purpose in FilePurpose if purpose is not FilePurpose.FINE_TUNE_RESULTS]
    names = ", ".join(purpose.value for purpose in uploadable)
    if not given:
        raise InvalidRequestError(f"The upload says no `purpose`: one of {names}.", param="purpose")
    if given not in uploadable:
        raise InvalidRequestError(
            f"Files are not taken here for {given!r}, but for {names}.", param="purpose"
        )
    return FilePurpose(given)


def lifetime_fields(seconds: int) -> dict[str, str]:
    """How a form says after how long its file goes."""
    return {_ANCHOR_FIELD: "created_at", _SECONDS_FIELD: str(seconds)}


def _lifetime_said(fields: Mapping[str, str]) -> int | None:
    # Whoever says a part of it does not mean a file that stays for ever.
    said = {name: value for name, value in fields.items() if name.startswith("expires_after")}
    if not said:
        return None
    if set(said) != {_ANCHOR_FIELD, _SECONDS_FIELD} or said[_ANCHOR_FIELD] != "created_at":
        raise InvalidRequestError(
            f"A file's lifetime is said by two fields: {_ANCHOR_FIELD}=created_at and {_SECONDS_FIELD}=3600.",
            param="expires_after",
        )
    return lifetime_s(said[_SECONDS_FIELD])


def lifetime_s(given: str | None) -> int | None:
    """After how long a file goes; None: never. Raises: InvalidRequestError."""
    if given is None:
        return None
    # int() itself refuses thousands of digits.
    if not given.isdecimal() or len(given) > 9 or not 3600 <= int(given) <= 2_592_000:
        raise InvalidRequestError(
            "The seconds of expires_after are a number from 3600 (an hour) to 2592000 (30 days).",
            param="expires_after",
        )
    return int(given)


def _suffix(filename: str) -> str:
    lowered = filename.lower()
    return next((suffix for suffix in _KNOWN_SUFFIXES if lowered.endswith(suffix)), "")
