"""Files that come in parts: bytes under `<home>/files/parts`, one row for each upload and part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from sage_contracts.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    SageError,
)
from sage_contracts.files import FileObject
from sage_contracts.home import Home, sync_path
from sage_contracts.uploads import (
    PART_LIMIT_BYTES,
    UPLOAD_LIFE_S,
    CompleteUploadRequest,
    CreateUploadRequest,
    UploadObject,
    UploadPart,
    UploadStatus,
)
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.files.service import FileService, lifetime_fields, lifetime_s, purpose_of
from sage_orchestrator.files.upload import (
    Expected,
    Upload,
    check_room,
    plain_name,
    size_text,
    too_large,
)
from sage_orchestrator.ids import new_id
from sage_orchestrator.rows import UploadPartRow, UploadRow
from sage_orchestrator.uploads import repository as uploads
from sage_orchestrator.uploads.join import join_parts


@dataclass(frozen=True)
class UploadService:
    database: Database
    home: Home
    clock: Clock
    files: FileService
    max_file_bytes: int

    @property
    def folder(self) -> Path:
        return self.home.file_parts

    def create(self, request: CreateUploadRequest) -> UploadObject:
        """Raises: InvalidRequestError, PayloadTooLargeError, StorageFullError."""
        purpose = purpose_of(request.purpose)
        given = request.expires_after
        lifetime = lifetime_s(None if given is None else str(given.seconds))
        if request.bytes > self.max_file_bytes:
            raise too_large(self.max_file_bytes, "bytes")
        check_room(self.folder, 2 * request.bytes, "The parts and the file made of them have")
        now = self.clock()
        row = UploadRow(
            id=new_id("upload"),
            filename=plain_name(request.filename),
            purpose=purpose.value,
            size_bytes=request.bytes,
            status=UploadStatus.PENDING.value,
            created_at=now,
            expires_at=now + UPLOAD_LIFE_S,
            file_lifetime_s=lifetime,
        )
        with self.database.write() as session:
            session.add(row)
        return to_object(row)

    def expected_part(self, upload_id: str) -> Expected:
        """What may be sent to this upload now. Raises: NotFoundError, ConflictError."""
        with self.database.read() as session:
            row = self._pending(session, upload_id)
        if row.size_bytes > PART_LIMIT_BYTES:
            limit = PayloadTooLargeError(
                f"A part has at most {size_text(PART_LIMIT_BYTES)}: send smaller ones.", param="data"
            )
            return Expected("data", PART_LIMIT_BYTES, limit)
        return Expected("data", row.size_bytes, _no_room(row))

    def keep_part(self, upload_id: str, received: Upload) -> UploadPart:
        """Give a part its id and its row.

        Bytes that the upload has already are the same part again: a client that has lost an answer repeats
        its request, and the whole must still fit.
        Raises: InvalidRequestError for more than the upload's `bytes`; NotFoundError, ConflictError.
        """
        with received.path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        # Where the commit fails, the bytes lie under a name that nobody knows, until they are swept.
        with self.database.write() as session:
            upload = self._pending(session, upload_id, lock=True)
            part = uploads.part_with(session, upload_id, sha256)
            if part is not None:
                part.times_sent += 1
            elif received.size_bytes > upload.size_bytes - upload.received_bytes:
                raise _no_room(upload)
            else:
                part = UploadPartRow(
                    id=new_id("part"),
                    upload_id=upload_id,
                    sha256=sha256,
                    size_bytes=received.size_bytes,
                    created_at=self.clock(),
                )
                session.add(part)
                upload.received_bytes += received.size_bytes
            received.path.replace(self.folder / part.id)
            sync_path(self.folder)
        return UploadPart(id=part.id, created_at=int(part.created_at), upload_id=upload_id)

    def complete(self, upload_id: str, request: CompleteUploadRequest) -> UploadObject:
        """Join the parts to a file like any other; who asks again, for a lost answer, is told of that file.

        Raises: as `_join`.
        """
        try:
            return self._join(upload_id, request)
        except ConflictError:
            with self.database.read() as session:
                row = uploads.get(session, upload_id)
            if row.file_id is None:
                raise
            return to_object(row, self.files.get(row.file_id))

    def _join(self, upload_id: str, request: CompleteUploadRequest) -> UploadObject:
        """The first time.

        Raises: InvalidRequestError for other parts, sizes or bytes than announced; NotFoundError;
        ConflictError for an upload that has ended; StorageFullError, after which it may be tried again.
        """
        with self.database.read() as session:
            # In this order: parts vanish with the end of their upload, and that is what has to be said then.
            known = uploads.parts_of(session, upload_id)
            row = self._pending(session, upload_id)
        chosen = _in_order(row, known, request.part_ids)
        check_room(self.files.folder, row.size_bytes, "The joined file has")
        sizes = [(self.folder / part.id, part.size_bytes) for part in chosen]
        try:
            joined = join_parts(sizes, self.files.folder, request.md5)
        except NotFoundError:
            with self.database.read() as session:
                self._pending(session, upload_id)  # where it has ended meanwhile, that is why
            raise
        joined.filename = row.filename
        joined.fields["purpose"] = row.purpose
        if row.file_lifetime_s is not None:
            joined.fields |= lifetime_fields(row.file_lifetime_s)
        removed: list[str] = []

        def end(session: Session, file_id: str) -> None:
            removed.extend(self._end(session, upload_id, UploadStatus.COMPLETED, file_id))

        try:
            file = self.files.keep(joined, also=end)
        except BaseException:
            joined.path.unlink(missing_ok=True)
            raise
        self._remove(removed)
        row.status = UploadStatus.COMPLETED.value
        return to_object(row, file)

    def cancel(self, upload_id: str) -> UploadObject:
        """Raises: NotFoundError; ConflictError for an upload that has ended."""
        with self.database.write() as session:
            row = self._pending(session, upload_id, lock=True)
            removed = self._end(session, upload_id, UploadStatus.CANCELLED)
            session.refresh(row)
        self._remove(removed)
        return to_object(row)

    def delete_expired(self) -> None:
        """End uploads whose hour has passed, and remove bytes that a crash has left without a row."""
        now = self.clock()
        with self.database.read() as session:
            overdue = uploads.overdue(session, now)
        for upload_id in overdue:
            with suppress(ConflictError):
                with self.database.write() as session:
                    removed = self._end(session, upload_id, UploadStatus.EXPIRED)
                self._remove(removed)
        self._remove_orphans(now)

    def _remove_orphans(self, now: float) -> None:
        # Younger ones may be on their way to a row; whoever sends for an hour has no upload any more.
        old = [path for path in self.folder.glob("*") if _age_s(path, now) > UPLOAD_LIFE_S]
        if old:
            with self.database.read() as session:
                known = uploads.all_part_ids(session)
            self._remove(path.name for path in old if path.name not in known)

    def _pending(self, session: Session, upload_id: str, *, lock: bool = False) -> UploadRow:
        """Raises: NotFoundError; ConflictError for an upload that has ended, or whose hour has passed."""
        row = uploads.get(session, upload_id, lock=lock)
        status = UploadStatus(row.status)
        if status is UploadStatus.PENDING and row.expires_at <= self.clock():
            status = UploadStatus.EXPIRED
        if status.is_terminal:
            raise _ended(row, status)
        return row

    def _end(
        self, session: Session, upload_id: str, status: UploadStatus, file_id: str | None = None
    ) -> list[str]:
        """The ids of the parts that it had. Raises: ConflictError where somebody else ended it before."""
        uploads.get(session, upload_id, lock=True)
        part_ids = list(uploads.parts_of(session, upload_id))
        if not uploads.end(session, upload_id, status, file_id=file_id):
            row = uploads.get(session, upload_id)
            raise _ended(row, UploadStatus(row.status))
        return part_ids

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                (self.folder / name).unlink()


def to_object(row: UploadRow, file: FileObject | None = None) -> UploadObject:
    return UploadObject(
        id=row.id,
        bytes=row.size_bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        status=UploadStatus(row.status),
        expires_at=int(row.expires_at),
        file=file,
    )


def _in_order(
    row: UploadRow, known: dict[str, UploadPartRow], part_ids: Sequence[str]
) -> list[UploadPartRow]:
    """The parts that are named, if they make the whole file. Raises: InvalidRequestError."""
    for part_id, times in Counter(part_ids).items():
        if part_id not in known:
            raise InvalidRequestError(f"{row.id} has no part {part_id!r}.", param="part_ids")
        sent = known[part_id].times_sent
        if times > sent:
            raise InvalidRequestError(
                f"{part_id} is named {times} times, but its bytes were sent only {sent} times.",
                param="part_ids",
            )
    chosen = [known[part_id] for part_id in part_ids]
    if (total := sum(part.size_bytes for part in chosen)) != row.size_bytes:
        raise InvalidRequestError(
            f"The parts in `part_ids` have {total} bytes together, but {row.id} was created for "
            f"{row.size_bytes} `bytes`: name all parts of the file.",
            param="part_ids",
        )
    return chosen


def _no_room(row: UploadRow) -> SageError:
    return InvalidRequestError(
        f"The part does not fit: {row.id} was created for {row.size_bytes} `bytes` and has "
        f"{row.received_bytes} of them.",
        param="data",
    )


def _ended(row: UploadRow, status: UploadStatus) -> ConflictError:
    into = f": its file is {row.file_id}" if row.file_id else ": create another one (POST /v1/uploads)"
    return ConflictError(f"{row.id} is {status.value}{into}.", param="upload_id")


def _age_s(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
