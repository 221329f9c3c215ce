"""Source trees as archives: the same rule for who sends one and for who takes it. Nothing is extracted."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Self

from sage.tools.finetune.code_data.source_files import SOURCE_SUFFIXES, is_source_path
from sage_contracts.config import Task
from sage_contracts.errors import InvalidDataError

MAX_HEADER_BYTES = 1 << 20
_SUFFIXES = (".zip", ".tar.gz", ".tgz")
_READ_WHOLE = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


class TarMember(tarfile.TarInfo):
    """A member whose headers do not fill the memory: tarfile reads what extends a header whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Raises: tarfile.TarError."""
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise tarfile.TarError(f"{member.name!r} has a size below nothing")
        if member.type in _READ_WHOLE and member.size > MAX_HEADER_BYTES:
            raise tarfile.TarError(
                f"a header in it takes {member.size / 2**20:,.1f} MiB, where the longest path with all its "
                f"attributes needs less than {MAX_HEADER_BYTES >> 20} MiB"
            )
        return member


def is_archive_name(filename: str) -> bool:
    """Whether a file of that name is meant as a source tree."""
    return filename.lower().endswith(_SUFFIXES)


def check_archive(path: Path, filename: str, task: Task, method: str) -> None:
    """Only the list of names is read. Raises: InvalidDataError, saying what is wrong with it."""
    if method != "sft":
        raise InvalidDataError(
            f"{filename} is an archive, which says no preference: for {method} give rows of pairs."
        )
    if task is not Task.CODE:
        raise InvalidDataError(
            f"{filename} is an archive, which only the task `code` takes (a source tree): give rows as JSON, "
            f"JSON Lines or CSV, or choose the task code instead of {task.value}."
        )
    try:
        names = _zip_names(path) if filename.lower().endswith(".zip") else _tar_names(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, RecursionError) as error:
        raise InvalidDataError(f"{filename} cannot be read as an archive: {error}. Make it anew.") from error
    outside = next((name for name in names if _points_outside(name)), None)
    if outside is not None:
        raise InvalidDataError(f"{filename} holds {outside!r}, which points outside of it: leave that out.")
    if not any(is_source_path(PurePosixPath(name)) for name in names):
        known = ", ".join(sorted(SOURCE_SUFFIXES))
        raise InvalidDataError(
            f"{filename} holds no source file ({known}) to learn from; tests, hidden and generated ones do "
            "not count."
        )


def _zip_names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _tar_names(path: Path) -> list[str]:
    with tarfile.open(path, "r:gz", tarinfo=TarMember) as archive:
        return [member.name for member in archive if member.isfile()]


def _points_outside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts
