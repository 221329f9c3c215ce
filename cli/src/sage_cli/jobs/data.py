"""The data a person names with --data: checked before anything is started, and packed for the upload."""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sage.tools.finetune.code_data import SOURCE_SUFFIXES, build_code_pairs
from sage.tools.finetune.code_data import source_files as trees
from sage.tools.finetune.code_data.archives import check_archive, is_archive_name
from sage.tools.finetune.code_data.readings import Readings, look_at
from sage.tools.finetune.data.hub import is_hub_id
from sage.tools.finetune.data.opening import is_columnar
from sage.tools.finetune.storage import temporary_folder_errors
from sage.tools.finetune.task_data import is_source_tree, left_out_rows
from sage_cli.git import ignored_in
from sage_contracts.config import Task
from sage_contracts.errors import InvalidDataError


@dataclass(frozen=True)
class DataFile:
    """What is uploaded, and the name people know it by."""

    path: Path
    filename: str


def check(path: Path, task: Task, method: str = "sft") -> list[str]:
    """Refuse what cannot be trained on, before anything starts; returns what to know of how rows are read.

    Raises: InvalidDataError.
    """
    if is_hub_id(path):
        return _check_rows(path, method)
    if not path.exists():
        raise InvalidDataError(f"There is no {path}. Give --data a file or a folder.")
    if path.is_dir():
        return _check_folder(path, task, method)
    if not path.is_file():
        raise InvalidDataError(f"{path} is neither a file nor a folder.")
    if not os.access(path, os.R_OK):
        allow = f"chmod u+r {shlex.quote(str(path))}"
        raise InvalidDataError(f"{path} cannot be read: you have no permission. Try `{allow}`.")
    if path.stat().st_size == 0:
        raise InvalidDataError(f"{path} is empty: there is nothing to learn from.")
    if is_archive_name(path.name):
        check_archive(path, path.name, task, method)
    elif _means_sources(path, task, method):
        return _check_sources(path, [path])
    else:
        return _check_rows(path, method)
    return []


@contextmanager
def packed(path: Path, task: Task, method: str = "sft") -> Iterator[DataFile]:
    """The file to upload: the path itself; or temporarily the rows of a folder, of a hub's data set or of a
    Parquet or Arrow file, which the server could not read, as JSON Lines; or an archive of a folder's
    sources, or of a single one, as a source tree is an archive to the server. Raises: StorageFullError."""
    is_tree = path.exists() and _means_sources(path, task, method)
    if path.is_file() and not is_tree and not is_columnar(path, path.name):
        yield DataFile(path, path.name)
        return
    with ExitStack() as stack:
        with temporary_folder_errors():
            folder = stack.enter_context(TemporaryDirectory(prefix="sage-data-"))
            file = _archive(path, Path(folder)) if is_tree else _as_lines(path, Path(folder))
        yield DataFile(file, file.name)


def _as_lines(path: Path, folder: Path) -> Path:
    name = path.absolute().name.removesuffix(".parquet").removesuffix(".arrow").replace(":", "-")
    lines = folder / f"{name or 'rows'}.jsonl"
    _write_rows(path, lines)
    return lines


def _archive(path: Path, folder: Path) -> Path:
    archive = folder / f"{path.absolute().name or 'sources'}.zip"
    root, files = (path, uploadable_sources(path)) if path.is_dir() else (path.parent, [path])
    # Not strict: the format knows no time before 1980, which some files are from.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as stream:
        for file in files:
            stream.write(file, file.relative_to(root))
    return archive


def uploadable_sources(folder: Path) -> list[Path]:
    """The sources below a folder, in order; without those that git ignores, where git can be asked."""
    found = sorted(trees.source_files(folder))
    is_ignored = ignored_in(folder)
    return [file for file in found if not is_ignored(file)]


def _means_sources(path: Path, task: Task, method: str) -> bool:
    """Source code says no preference: for the other methods code beside the rows is only that."""
    return method == "sft" and is_source_tree(task, path)


def _check_folder(path: Path, task: Task, method: str) -> list[str]:
    if not os.access(path, os.R_OK | os.X_OK):
        raise InvalidDataError(f"{path} cannot be read: you have no permission.")
    if not _means_sources(path, task, method):
        return _check_rows(path, method)
    sources = uploadable_sources(path)
    if not sources:
        raise InvalidDataError(
            f"{path} holds no source code ({', '.join(sorted(SOURCE_SUFFIXES))}). Give --data a folder with"
            " code in it, or leave it out to learn from Python's own library."
        )
    return [*_check_sources(path, sources), *left_out_rows(path)]


def _check_sources(path: Path, sources: list[Path]) -> list[str]:
    if all(file.suffix == ".py" for file in sources):
        readings = Readings()
        build_code_pairs(path, readings=readings)
        return readings.notes(path, among={*sources})
    # The grammars of other languages are the trainer's: only there it is known what can be learned.
    return look_at(sources).notes(path)


def _check_rows(path: Path, method: str) -> list[str]:
    from sage.tools.finetune.data import validate_file

    report = validate_file(path, method=method)
    report.require_trainable()
    return report.notes


def _write_rows(path: Path, lines: Path) -> None:
    import orjson

    from sage.tools.finetune.data import load_rows

    with lines.open("wb") as stream:
        for row in load_rows(path):
            content = row.content()
            try:
                stream.write(orjson.dumps(content, default=str, option=orjson.OPT_APPEND_NEWLINE))
            except orjson.JSONEncodeError:  # it has no whole numbers beyond 64 bits
                stream.write(json.dumps(content, default=str).encode() + b"\n")
