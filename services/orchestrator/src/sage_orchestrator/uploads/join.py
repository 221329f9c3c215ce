"""One file of an upload's parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sage_contracts.errors import InvalidRequestError, NotFoundError, StorageFullError
from sage_orchestrator.files.upload import Upload, close_synced, is_full, open_temporary

_COPY_BYTES = 2**20


def join_parts(parts: Sequence[tuple[Path, int]], folder: Path, md5: str | None) -> Upload:
    """A synced file in `folder`, under a temporary name, of parts given with their sizes in bytes.

    No more than a mebibyte of them is in memory. On any failure nothing is left in `folder`.
    Raises: InvalidRequestError for another md5; NotFoundError for a part that is gone; StorageFullError.
    """
    stream, upload = open_temporary(folder)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        for path, size_bytes in parts:
            for piece in _pieces(path, size_bytes):
                stream.write(piece)
                if md5 is not None:
                    digest.update(piece)
                upload.size_bytes += len(piece)
        if md5 is not None and digest.hexdigest() != md5.lower():
            raise InvalidRequestError(
                f"The parts joined in this order have the md5 {digest.hexdigest()}, not {md5.lower()}: "
                "check the order of `part_ids`. The parts are kept.",
                param="md5",
            )
        close_synced(stream)
    except BaseException as error:
        with suppress(OSError):
            stream.close()
        upload.path.unlink(missing_ok=True)
        if is_full(error):
            raise StorageFullError(
                f"No space left for the joined file in {folder}: free space and complete the upload again. "
                "Its parts are kept."
            ) from error
        raise
    return upload


def _pieces(path: Path, size_bytes: int) -> Iterator[memoryview]:
    """The part's bytes in one buffer that is used again and again. Raises: NotFoundError."""
    buffer = memoryview(bytearray(min(_COPY_BYTES, size_bytes)))
    read_bytes = 0
    try:
        with path.open("rb", buffering=0) as part:
            while count := part.readinto(buffer):
                read_bytes += count
                yield buffer[:count]
    except FileNotFoundError:
        read_bytes = 0
    if read_bytes != size_bytes:
        raise NotFoundError(
            f"The bytes of {path.name} are gone from {path}: send that part again.", param="part_ids"
        )
