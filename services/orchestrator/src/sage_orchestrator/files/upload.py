"""A multipart upload straight to disk: the body is never held in memory or spooled to a second place."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from sage_contracts.errors import InvalidRequestError, PayloadTooLargeError, SageError, StorageFullError

TEMPORARY_PREFIX = ".upload-"
_FIELD_LIMIT_BYTES = 64 * 1024
_WRITE_BYTES = 1024 * 1024
# EFBIG is what a file system or a quota (ulimit -f) answers when one file may not grow further.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Upload:
    """What arrived: the form's fields, and the file's bytes under a temporary name."""

    path: Path
    filename: str = ""
    size_bytes: int = 0
    fields: dict[str, str] = field(default_factory=dict)


class UploadReader:
    """Feeds a request's body to a multipart parser; the part named `file` goes to `folder` as it comes."""

    def __init__(self, content_type: str | None, folder: Path, max_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidRequestError(
                "Upload files as multipart/form-data with the parts `file` and `purpose`."
            )
        self._max_bytes = max_bytes
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_part_data": self._part_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._pending = bytearray()
        self._is_complete = False
        self._has_file = False
        self._begin_part()
        folder.mkdir(parents=True, exist_ok=True)
        self._stream, self.upload = _open_temporary(folder)

    async def read(self, body: AsyncIterator[bytes]) -> Upload:
        """The whole upload, on disk and synced. On any failure nothing is left there.

        Raises: InvalidRequestError, PayloadTooLargeError, StorageFullError.
        """
        try:
            async for chunk in body:
                self._parser.write(chunk)
                if len(self._pending) >= _WRITE_BYTES:
                    await run_in_threadpool(self._flush)
            await run_in_threadpool(self._finish)
        except BaseException as error:
            self.discard()
            if (known := _in_our_words(error, self.upload.path.parent)) is not None:
                raise known from error
            raise
        return self.upload

    def discard(self) -> None:
        """Forget the upload."""
        with suppress(OSError):
            self._stream.close()
        self.upload.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        self._stream.write(self._pending)
        self._pending.clear()

    def _finish(self) -> None:
        if not self._is_complete or not self._has_file:
            raise InvalidRequestError("The upload has no complete part named `file`.", param="file")
        if self.upload.size_bytes == 0:
            raise InvalidRequestError(f"The file {self.upload.filename!r} is empty.", param="file")
        self._flush()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _begin_part(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._part_name: str | None = None
        self._text = bytearray()

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part_name is None:
            self._name_part()
        if self._part_name != "file":
            self._text += data[start:end]
            if len(self._text) > _FIELD_LIMIT_BYTES:
                raise InvalidRequestError(
                    f"The field {self._part_name!r} is too long.", param=self._part_name
                )
            return
        self._pending += data[start:end]
        self.upload.size_bytes += end - start
        if self.upload.size_bytes > self._max_bytes:
            raise PayloadTooLargeError(too_large(self._max_bytes), param="file")

    def _end_part(self) -> None:
        if self._part_name is None:
            self._name_part()
        if self._part_name and self._part_name != "file":
            self.upload.fields[self._part_name] = self._text.decode(errors="replace")

    def _name_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._part_name = options.get(b"name", b"").decode(errors="replace")
        if self._part_name == "file":
            self._has_file = True
            # Some clients send the whole path; only its last part is a name.
            given = options.get(b"filename", b"upload").decode(errors="replace").replace("\\", "/")
            self.upload.filename = given.rsplit("/", 1)[-1] or "upload"

    def _end(self) -> None:
        self._is_complete = True


def check_room(folder: Path, announced_bytes: int, max_bytes: int) -> None:
    """Refuse what cannot fit before it is sent. Raises: PayloadTooLargeError, StorageFullError."""
    # The form around the file takes some bytes too, so a body slightly over the limit may still be fine.
    if announced_bytes > max_bytes + 2 * _FIELD_LIMIT_BYTES:
        raise PayloadTooLargeError(too_large(max_bytes), param="file")
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if announced_bytes > free_bytes:
        raise StorageFullError(
            f"The upload has {_mib(announced_bytes)} but {folder} has only {_mib(free_bytes)} free: "
            "free space or set SAGE_HOME to another disk."
        )


def too_large(max_bytes: int) -> str:
    return f"The file is larger than the limit of {_mib(max_bytes)} (SAGE_MAX_FILE_BYTES)."


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes} bytes"


def _open_temporary(folder: Path) -> tuple[IO[bytes], Upload]:
    try:
        descriptor, path = tempfile.mkstemp(dir=folder, prefix=TEMPORARY_PREFIX)
    except OSError as error:
        if (known := _in_our_words(error, folder)) is not None:
            raise known from error
        raise
    return os.fdopen(descriptor, "wb"), Upload(path=Path(path))


def _in_our_words(error: BaseException, folder: Path) -> SageError | None:
    if isinstance(error, OSError) and error.errno in _FULL:
        return StorageFullError(
            f"No space left for the file in {folder}: free space or set SAGE_HOME to another disk. "
            "Nothing was kept."
        )
    if isinstance(error, FormParserError):
        return InvalidRequestError(f"The multipart body cannot be read: {error}")
    return None
