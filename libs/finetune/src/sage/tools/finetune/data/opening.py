"""The bytes of a file with its compression taken off, whatever the file is called."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard

from sage.tools.finetune.hardware import device_memory_bytes
from sage_contracts.errors import InvalidDataError

HEAD_BYTES = 1 << 20
_TOO_LARGE_WINDOW = "too much memory"
_READ_BYTES = 1 << 18
_GZIP = b"\x1f\x8b"
_ZSTD = frozenset(magic.to_bytes(4, "little") for magic in (0xFD2FB528, *range(0x184D2A50, 0x184D2A60)))
"""Of a frame, and of those that hold no data, with which pzstd begins. Source: RFC 8878."""
_SURE_WINDOW_BYTES = 1 << 27  # what every reader of zstd has to take, as the program itself does
_LARGEST_WINDOW_BYTES = 1 << 31
MAGIC_BYTES = 8
_COLUMNAR = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow"}
"""Arrow's streams have no name in them, only the sign before each of their parts."""

_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; save a workbook as CSV, unpack an archive",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV",
    b"%PDF": "a PDF; the rows have to be written out as JSON Lines",
    b"BZh": "compressed with bzip2; use gzip or zstd",
    b"\xfd7zXZ": "compressed with xz; use gzip or zstd",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"SQLite format 3": "a SQLite database; export a table as CSV",
    b"GGUF": "a GGUF model, not data",
    b"version https://git-lfs": "only Git LFS's pointer to the data; fetch it with `git lfs pull`",
    b"<!doctype html": "a web page; perhaps it came in place of the download",
    b"<html": "a web page; perhaps it came in place of the download",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}

_FOREIGN_BYTES = 64
"""Of web pages and pointers, which are text: capitals and white space before it do not matter."""


@contextmanager
def open_plain(path: Path, name: str, max_window_bytes: int | None = None) -> Iterator[BinaryIO]:
    """The file's content, uncompressed. Raises: InvalidDataError where the compressed data is damaged.

    `max_window_bytes` is how much memory a zstd file may ask for; by default a quarter of all there is.
    """
    try:
        with path.open("rb") as raw:
            yield _plain(raw, max_window_bytes)
    except (zlib.error, EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        if _TOO_LARGE_WINDOW in str(error):
            raise InvalidDataError(
                f"{name} takes more memory to unpack than can be spared here: it was packed with a large "
                "window. Unpack it with `zstd -d --long=31` and pack it again without --long."
            ) from error
        raise InvalidDataError(
            f"{name} is damaged or was cut off ({error}). Make or download it anew."
        ) from error


def head_of(path: Path, name: str) -> bytes:
    """Up to HEAD_BYTES from the beginning. Raises: InvalidDataError, also for a file that is no data."""
    with open_plain(path, name) as stream:
        head = stream.read(HEAD_BYTES)
    start = head[:_FOREIGN_BYTES].lstrip().lower()
    for magic, what in _FOREIGN.items():
        if head.startswith(magic) or start.startswith(magic):
            raise InvalidDataError(f"{name} is {what}. Rows go into JSON, JSON Lines, CSV, TSV or Parquet.")
    if head[257:262] == b"ustar":
        raise InvalidDataError(f"{name} is a tar archive. Unpack it and give the folder.")
    return head


def is_plain(path: Path) -> bool:
    """Whether what the file holds takes no more room when it is read: nothing in it is compressed."""
    with path.open("rb") as raw:
        magic = raw.read(MAGIC_BYTES)
    return not magic.startswith(_GZIP) and magic[:4] not in _ZSTD and columnar_kind(magic) is None


def columnar_kind(head: bytes) -> str | None:
    """`Parquet` or `Arrow` where the first MAGIC_BYTES say so."""
    return next((kind for magic, kind in _COLUMNAR.items() if head.startswith(magic)), None)


def is_columnar(path: Path, name: str) -> bool:
    """Whether only pyarrow can read the file, compressed as a whole or not. Raises: InvalidDataError."""
    with open_plain(path, name) as stream:
        return columnar_kind(stream.read(MAGIC_BYTES)) is not None


def _plain(raw: IO[bytes], max_window_bytes: int | None) -> BinaryIO:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(_GZIP):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), _READ_BYTES))
    if magic in _ZSTD:
        stream = _ZstdStream(raw, max_window_bytes or _affordable_window_bytes())
        return cast(BinaryIO, io.BufferedReader(stream, _READ_BYTES))
    return cast(BinaryIO, raw)


def _affordable_window_bytes() -> int:
    """A file may ask for 2 GiB, which would end a server that has less."""
    return max(_SURE_WINDOW_BYTES, min(_LARGEST_WINDOW_BYTES, device_memory_bytes("cpu") // 4))


class _ZstdStream(io.RawIOBase):
    """Frames one after another, like gzip's members. The library's reader takes a cut frame for the end."""

    def __init__(self, raw: IO[bytes], max_window_bytes: int) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)
        self._frame = self._decompressor.decompressobj()
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            block = self._frame.unused_data if self._frame.eof else b""
            block = block or self._raw.read(_READ_BYTES)
            if not block:
                if not self._frame.eof:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(block))
        size = min(len(target), len(self._plain))
        target[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size
