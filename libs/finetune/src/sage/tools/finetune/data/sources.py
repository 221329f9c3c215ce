"""The files behind what a person named: one file, the data files of a folder, or a hub's data set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sage.tools.finetune.data.hub import fetch_dataset, is_hub_id
from sage_contracts.errors import InvalidDataError

_DATA_NAME = re.compile(r"(?i)\.(json|jsonl|ndjson|csv|tsv|parquet)(\.gz|\.zst)?$")


def files_of(path: Path, name: str, notes: list[str]) -> Iterator[tuple[Path, str]]:
    """Each file with its name for people, in the order of their paths. Raises: InvalidDataError."""
    if path.is_file():
        yield path, name
        return
    if path.is_dir():
        folder, files = path, data_files(path)
        kind = "folder"
    elif is_hub_id(path) and not is_data_name(path.name):
        name = str(path)
        folder, names = fetch_dataset(name, _DATA_NAME)
        files = [folder / file for file in names]
        kind = "data set"
    else:
        raise InvalidDataError(f"There is no file {path}. Give the path of a JSON, CSV or Parquet file.")
    if not files:
        raise InvalidDataError(
            f"The folder {name} holds no data: no file ends in .json, .jsonl, .csv, .tsv or .parquet (also "
            "with .gz or .zst)."
        )
    how_many = "1 file" if len(files) == 1 else f"{len(files)} files"
    notes.append(f"{how_many} of the {kind} {name}, in the order of their names")
    for file in files:
        yield file, f"{name}/{file.relative_to(folder).as_posix()}"


def data_files(folder: Path) -> list[Path]:
    """Files below a folder that are named like data; hidden ones are left out."""
    found = (file for file in folder.rglob("*") if is_data_name(file.name) and file.is_file())
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def is_data_name(name: str) -> bool:
    return bool(_DATA_NAME.search(name))
