"""Source trees that people upload as one archive, unpacked without trusting what is in them."""

from __future__ import annotations

import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from sage.tools.finetune.code_data.archives import TarMember
from sage_contracts.errors import InvalidDataError

MAX_BYTES = 2 << 30
"""Unpacked; counted while writing, because an archive's own figures may lie."""
MAX_FILES = 200_000

_Entry = tuple[str, Callable[[], IO[bytes] | None]]


def is_archive(path: Path) -> bool:
    """Whether the file is a .zip or a (compressed) .tar, by its content: uploads have lost their names."""
    return path.is_file() and (zipfile.is_zipfile(path) or _is_tar(path))


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, tarinfo=TarMember):
            return True
    except (tarfile.ReadError, tarfile.CompressionError):
        return False
    except tarfile.TarError:
        return True  # it is one, and unpacking it tells what is wrong


def tree_name(archive: str) -> str:
    """What the tree in an archive is called, by the archive's file name."""
    stem = re.sub(r"(?i)\.(zip|tgz|tar\.gz)$", "", archive)
    return stem if stem.strip(".") else "sources"


def unpack_tree(archive: Path, into: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Path:
    """The regular files of an archive below `into`, which must not exist yet. Links and devices are left out.

    Raises: InvalidDataError for a path that leads outside, too much data, or a damaged archive; nothing is
    left behind then.
    """
    into.mkdir(parents=True)
    try:
        _write_entries(archive.name, _entries(archive), into, max_bytes, max_files)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        shutil.rmtree(into)
        # zipfile asks for a password with a RuntimeError.
        raise InvalidDataError(f"The archive {archive.name} cannot be unpacked: {error}") from error
    except BaseException:
        shutil.rmtree(into)
        raise
    return into


def _write_entries(name: str, entries: Iterator[_Entry], into: Path, max_bytes: int, max_files: int) -> None:
    left_bytes = max_bytes
    for number, (entry, open_entry) in enumerate(entries, 1):
        if number > max_files:
            raise InvalidDataError(f"The archive {name} holds more than {max_files} files. Leave some out.")
        target = into / _inside(name, entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = open_entry()
        if source is None:
            continue
        with source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                left_bytes -= len(block)
                if left_bytes < 0:
                    size = f"{max_bytes / 1e9:.1f} GB"
                    raise InvalidDataError(f"The archive {name} unpacks to more than {size}. Leave some out.")
                sink.write(block)


def _inside(archive: str, entry: str) -> PurePosixPath:
    path = PurePosixPath(entry.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
        raise InvalidDataError(f"The archive {archive} holds {entry!r}, a path that leads out of it.")
    return path


def _entries(archive: Path) -> Iterator[_Entry]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened_zip:
            for info in opened_zip.infolist():
                is_link = stat.S_ISLNK(info.external_attr >> 16)
                if not info.is_dir() and not is_link:
                    yield info.filename, lambda info=info: opened_zip.open(info)  # type: ignore[misc]
    else:
        with tarfile.open(archive, tarinfo=TarMember) as opened_tar:
            for member in opened_tar:
                if member.isreg():
                    yield member.name, lambda member=member: opened_tar.extractfile(member)  # type: ignore[misc]
