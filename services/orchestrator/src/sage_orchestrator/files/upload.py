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
# Of all the fields beside the bytes, which are held in memory; no client of ours sends more than three.
_FIELD_LIMIT_BYTES = 64 * 1024
_MOST_FIELDS = 16
_WRITE_BYTES = 1024 * 1024
# EFBIG is what a file system or a quota (ulimit -f) answers when one file may not grow further.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Expected:
    """The part of the form that carries the bytes: at most so many, and what is said of more."""

    name: str
    max_bytes: int
    refusal: SageError


@dataclass
class Upload:
    """What arrived: the form's fields, and the file's bytes under a temporary name."""

    path: Path
    filename: str = ""
    size_bytes: int = 0
    fields: dict[str, str] = field(default_factory=dict)


class UploadReader:
    """Feeds a request's body to a multipart parser; the expected part goes to `folder` as it comes."""

    def __init__(self, content_type: str | None, folder: Path, expected: Expected) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidRequestError(
                f"Send the bytes as multipart/form-data, in a part named `{expected.name}`."
            )
        self._expected = expected
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
        self._fields = self._field_bytes = 0
        self._begin_part()
        folder.mkdir(parents=True, exist_ok=True)
        self._stream, self.upload = open_temporary(folder)

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
        name = self._expected.name
        if not self._is_complete or not self._has_file:
            raise InvalidRequestError(f"The upload has no complete part named `{name}`.", param=name)
        if self.upload.size_bytes == 0:
            raise InvalidRequestError(f"The {name} {self.upload.filename!r} is empty.", param=name)
        self._flush()
        close_synced(self._stream)

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
        if self._part_name != self._expected.name:
            self._text += data[start:end]
            self._field_bytes += end - start
            if self._field_bytes > _FIELD_LIMIT_BYTES:
                raise InvalidRequestError(
                    f"The field {self._part_name!r} is too long: all fields beside the {self._expected.name}"
                    f" have {_FIELD_LIMIT_BYTES} bytes together.",
                    param=self._part_name,
                )
            return
        self._pending += data[start:end]
        self.upload.size_bytes += end - start
        if self.upload.size_bytes > self._expected.max_bytes:
            raise self._expected.refusal

    def _end_part(self) -> None:
        if self._part_name is None:
            self._name_part()
        if self._part_name and self._part_name != self._expected.name:
            self.upload.fields[self._part_name] = self._text.decode(errors="replace")

    def _name_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._part_name = options.get(b"name", b"").decode(errors="replace")
        if self._part_name != self._expected.name:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise InvalidRequestError(
                    f"The form has more than {_MOST_FIELDS} fields beside the {self._expected.name}:"
                    " send only those of OpenAI's API."
                )
        else:
            self._has_file = True
            self.upload.filename = plain_name(options.get(b"filename", b"upload").decode(errors="replace"))

    def _end(self) -> None:
        self._is_complete = True


def plain_name(given: str) -> str:
    """A file's name alone: some clients send the whole path, and PostgreSQL cannot store a NUL."""
    return given.replace("\x00", "").replace("\\", "/").rsplit("/", 1)[-1] or "upload"


def whole_file(max_bytes: int) -> Expected:
    return Expected("file", max_bytes, too_large(max_bytes, "file"))


def too_large(max_bytes: int, param: str) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The file is larger than the limit of {size_text(max_bytes)} (SAGE_MAX_FILE_BYTES).", param=param
    )


def check_announced(folder: Path, content_length: str | None, expected: Expected) -> None:
    """Refuse what cannot fit before it is sent. Raises: `expected.refusal`, StorageFullError."""
    announced_bytes = int(content_length) if content_length and content_length.isdecimal() else 0
    # The form around the file takes some bytes too, so a body slightly over the limit may still be fine.
    if announced_bytes > expected.max_bytes + 2 * _FIELD_LIMIT_BYTES:
        raise expected.refusal
    check_room(folder, announced_bytes, "The upload has")


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises: StorageFullError, saying that `what` has so many bytes, but the folder has not."""
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise StorageFullError(
            f"{what} {size_text(needed_bytes)} but {folder} has only {size_text(free_bytes)} free: "
            "free space or set SAGE_HOME to another disk."
        )


def is_full(error: BaseException) -> bool:
    """Whether the disk, or a quota on it, has no room for what was written."""
    return isinstance(error, OSError) and error.errno in _FULL


def open_temporary(folder: Path) -> tuple[IO[bytes], Upload]:
    """An empty file under a temporary name in `folder`. Raises: StorageFullError."""
    try:
        descriptor, path = tempfile.mkstemp(dir=folder, prefix=TEMPORARY_PREFIX)
    except OSError as error:
        if (known := _in_our_words(error, folder)) is not None:
            raise known from error
        raise
    return os.fdopen(descriptor, "wb"), Upload(path=Path(path))


def close_synced(stream: IO[bytes]) -> None:
    """Close a file that a power cut must not take back."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def size_text(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes} bytes"


def _in_our_words(error: BaseException, folder: Path) -> SageError | None:
    if is_full(error):
        return StorageFullError(
            f"No space left for the file in {folder}: free space or set SAGE_HOME to another disk. "
            "Nothing was kept."
        )
    if isinstance(error, FormParserError):
        return InvalidRequestError(f"The multipart body cannot be read: {error}")
    return None
