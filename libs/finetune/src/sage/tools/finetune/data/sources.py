"""The files behind what a person named: one file, the data files of a folder, or a hub's data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sage.tools.finetune.data.hub import fetch_dataset, is_hub_id
from sage.tools.finetune.data.layout import choose_files, data_card, data_names, is_data_name
from sage_contracts.errors import InvalidDataError


def files_of(path: Path, name: str, notes: list[str]) -> Iterator[tuple[Path, str]]:
    """Each file with its name for people, in the order of their paths; what was left out goes into `notes`.

    Raises: InvalidDataError.
    """
    if path.is_file():
        yield path, name
        return
    if path.is_dir():
        folder, kind = path, "folder"
        found = [file.relative_to(path).as_posix() for file in data_files(path)]
        names, left_out = choose_files(name, found, data_card(path), is_own_folder=True)
    elif is_hub_id(path) and not is_data_name(path.name):
        name, kind, left_out = str(path), "data set", []
        folder, names = fetch_dataset(name, left_out)
    else:
        raise InvalidDataError(f"There is no file {path}. Give the path of a JSON, CSV or Parquet file.")
    if not names:
        raise InvalidDataError(
            f"The folder {name} holds no data: no file ends in .json, .jsonl, .csv, .tsv, .parquet or "
            ".arrow (also with .gz or .zst)."
        )
    how_many = "1 file" if len(names) == 1 else f"{len(names)} files"
    notes += [f"{how_many} of the {kind} {name}, in the order of their names", *left_out]
    for file in names:
        yield folder / file, f"{name}/{file}"


def data_files(folder: Path) -> list[Path]:
    """Files below a folder that are named like data; hidden ones are left out."""
    found = (file for file in folder.rglob("*") if is_data_name(file.name) and file.is_file())
    names = [file.relative_to(folder) for file in found]
    shown = [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]
    return [folder / name for name in data_names(shown)]
