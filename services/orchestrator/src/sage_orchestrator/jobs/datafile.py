"""Whether a training file can be trained on, before anything is queued. No torch, nothing is extracted."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from sage_contracts.config import Task
from sage_contracts.errors import InvalidDataError

_ARCHIVES = (".zip", ".tar.gz", ".tgz")


def is_archive(filename: str) -> bool:
    return filename.lower().endswith(_ARCHIVES)


def check_data(path: Path, filename: str, task: Task, method: str) -> None:
    """Rows as JSON, JSON Lines, CSV or TSV, also compressed, that suit the training method. For the task
    `code` also a source tree as *.zip, *.tar.gz or *.tgz, uploaded with the purpose fine-tune: only the list
    of names in it is read here, the trainer extracts it.

    Raises: InvalidDataError, naming rows and fields, or what is wrong with the file as a whole.
    """
    if not is_archive(filename):
        from sage.tools.finetune.data import validate_file

        validate_file(path, filename, method=method).require_all_good()
        return
    if method != "sft":
        raise InvalidDataError(
            f"{filename} is an archive, which says no preference: for {method} upload rows of pairs."
        )
    if task is not Task.CODE:
        raise InvalidDataError(
            f"{filename} is an archive, which only the task `code` takes (a source tree): upload rows as "
            f"JSON, JSON Lines or CSV, or say sage.task = code instead of {task.value}."
        )
    try:
        names = _zip_names(path) if filename.lower().endswith(".zip") else _tar_names(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InvalidDataError(f"{filename} cannot be read as an archive: {error}. Make it anew.") from error
    outside = next((name for name in names if _points_outside(name)), None)
    if outside is not None:
        raise InvalidDataError(f"{filename} holds {outside!r}, which points outside of it: leave that out.")
    from sage.tools.finetune.code_data import SOURCE_SUFFIXES

    if not any(PurePosixPath(name).suffix in SOURCE_SUFFIXES for name in names):
        known = ", ".join(sorted(SOURCE_SUFFIXES))
        raise InvalidDataError(f"{filename} holds no source file ({known}) to learn from.")


def _zip_names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _tar_names(path: Path) -> list[str]:
    with tarfile.open(path, "r:gz") as archive:
        return [member.name for member in archive if member.isfile()]


def _points_outside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts
