"""Which files of a folder or a data set are the rows to train on: of one configuration, one split, once each.

Told by the data card (the YAML at the top of `README.md`) where it says so, otherwise by the files' names.
Source: huggingface.co/docs/hub/datasets-manual-configuration and datasets-file-names-and-splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sage_contracts.errors import InvalidDataError

_DATA_NAME = re.compile(r"(?i)\.(json|jsonl|ndjson|csv|tsv|parquet|arrow)(\.gz|\.zst)?$")

_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""What `datasets` writes about rows that are in other files, and beside the first of them its state."""
TRAIN = "train"
_SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(r"[A-Za-z]+")
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_SHARD_END = re.compile(r"-\d{5}-of-\d{5}.*$")
_CONTAINERS = ("jsonl", "ndjson", "json", "parquet", "arrow", "csv", "tsv")
"""The most faithful first: Parquet gives all rows the fields of each, a table gives nothing but text."""
_SAYS_NOTHING = {"data", "default", *_CONTAINERS}
"""Names of folders that hold any data."""
_WILDCARDS = re.compile(r"(\*\*/|\*\*|\*|\?)")
_AS_PATTERN = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
_SHOWN_NAMES = 5
_DEFAULT = ""
"""In place of a configuration's name: the one to take unless another is asked for."""

Splits = dict[str, list[str]]
"""Files by split, those of no split under ''."""


class Choice(NamedTuple):
    files: list[str]
    notes: list[str]
    """What was left out."""


def is_data_name(name: str) -> bool:
    return bool(_DATA_NAME.search(name))


def data_names(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are named like rows, in order."""
    found = {name for name in names if is_data_name(name)}
    paths = map(PurePosixPath, sorted(found))
    return [
        str(path)
        for path in paths
        if path.name not in _NO_ROWS
        and not (path.name == "state.json" and str(path.with_name("dataset_info.json")) in found)
    ]


def data_card(folder: Path) -> dict[str, Any]:
    """What the YAML at the top of a folder's `README.md` says; empty where there is none."""
    try:
        import yaml
    except ImportError:
        return {}
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
        found = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---") else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def choose_files(
    name: str,
    files: Sequence[str],
    card: Mapping[str, Any],
    asked: Sequence[str] = (),
    *,
    is_own_folder: bool = False,
) -> Choice:
    """Of a data set's data files those to train on.

    `asked` are the names of a configuration, of a split, or of both. In a person's own folder, folders are
    parts of one whole where no card says otherwise.
    Raises: InvalidDataError where one has to be chosen, or where there is nothing of that name.
    """
    wanted, notes = list(asked), list[str]()
    configurations = _configurations_of_card(card, files) or _configurations_of_folders(files, is_own_folder)
    splits = _chosen_configuration(name, configurations, wanted, is_own_folder, notes)
    of_any = {file for found in configurations.values() for matched in found.values() for file in matched}
    if others := [file for file in files if file not in of_any]:
        notes.append(f"left out of {name}: what is of no configuration ({_in_words(others)})")
    name = ":".join([name, *asked[: len(asked) - len(wanted)]])
    split, chosen = _chosen_split(name, splits, wanted, is_own_folder, notes)
    if wanted:
        known = _in_words([*filter(None, [*configurations, *splits])])
        raise InvalidDataError(
            f"The data set {name} has no {wanted[0]!r}" + (f", but {known}." if known else ".")
        )
    return Choice(_each_once(chosen, "" if is_own_folder else split, notes), notes)


def _configurations_of_card(card: Mapping[str, Any], files: Sequence[str]) -> dict[str, Splits]:
    """Their splits; the one that the card calls the default alone, under ''."""
    entries = card.get("configs")
    found: dict[str, Splits] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping) and (splits := _splits_of_entry(entry, files)):
            found[str(entry.get("config_name", "default"))] = splits
            if entry.get("default"):
                found[_DEFAULT] = splits
    if "default" in found:
        found.setdefault(_DEFAULT, found["default"])
    return found


def _splits_of_entry(entry: Mapping[str, Any], files: Sequence[str]) -> Splits:
    given, folder = entry.get("data_files"), str(entry.get("data_dir") or "").strip("./")
    if folder:
        files = [file for file in files if file.startswith(f"{folder}/")]
    if given is None:
        return _splits_of_names(files)
    found: Splits = {}
    for split, patterns in _patterns(given):
        matched = [file for file in files if any(_fits(file, folder, pattern) for pattern in patterns)]
        found[split] = found.get(split, []) + matched
    return {split: list(dict.fromkeys(matched)) for split, matched in found.items() if matched}


def _patterns(given: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns of file names), from any of the forms that cards have."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list) and all(isinstance(item, Mapping) for item in given):
        pairs = [(item.get("split", TRAIN), item.get("path")) for item in given]
    else:
        pairs = [(TRAIN, given)]
    return [
        (str(split), [str(p) for p in (paths if isinstance(paths, list) else [paths])])
        for split, paths in pairs
    ]


def _fits(file: str, folder: str, pattern: str) -> bool:
    pattern = f"{folder}/{pattern}" if folder else pattern
    pieces = _WILDCARDS.split(pattern.removeprefix("./").strip("/"))
    expression = "".join(_AS_PATTERN.get(piece) or re.escape(piece) for piece in pieces)
    return bool(re.fullmatch(f"{expression}(?:/.*)?", file))


def _splits_of_names(files: Sequence[str]) -> Splits:
    found: Splits = {}
    for file in files:
        found.setdefault(split_of(file), []).append(file)
    return found


def split_of(file: str) -> str:
    """`train`, `validation` or `test` where the file's name says so, or else a folder's; otherwise ''.

    A shard may say it in more words, as `train_sft-00000-of-00003` does.
    """
    *folders, last = _DATA_NAME.sub("", file).split("/")
    if (shard := _SHARD.match(last)) and any(word in _SPLITS for word in _words(shard[1])):
        return shard[1]
    known = (_SPLITS.get(word) for part in (last, *reversed(folders)) for word in _words(part))
    return next(filter(None, known), "")


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _configurations_of_folders(files: Sequence[str], is_own_folder: bool) -> dict[str, Splits]:
    """By folders that have a training split each."""
    splits = _splits_of_names(files)
    folders = sorted(
        {_telling_folder(file) for split in splits if _is_training(split) for file in splits[split]}
    )
    if is_own_folder or len(folders) < 2:
        return {_DEFAULT: splits}
    return {
        folder or "default": _splits_of_names([file for file in files if _telling_folder(file) == folder])
        for folder in folders
    }


def _telling_folder(file: str) -> str:
    """Of a file's folders those that name neither a split nor a container."""
    folders = PurePosixPath(file).parts[:-1]
    return "/".join(
        part for part in folders if part.lower() not in _SAYS_NOTHING and part.lower() not in _SPLITS
    )


def _is_training(split: str) -> bool:
    return any(_SPLITS.get(word) == TRAIN for word in _words(split))


def _is_held_out(split: str) -> bool:
    return not _is_training(split) and any(word in _SPLITS for word in _words(split))


def _chosen_configuration(
    name: str, found: dict[str, Splits], wanted: list[str], is_own_folder: bool, notes: list[str]
) -> Splits:
    if wanted and wanted[0] in found:
        return found[wanted.pop(0)]
    names = [known for known in found if known]
    if _DEFAULT not in found and len(names) > 1:
        raise InvalidDataError(
            f"{name} has the configurations {_in_words(names)}, which are data sets of their own. "
            + _how_to_choose(name, names, next(iter(found[names[0]].values())), is_own_folder)
        )
    splits = found[_DEFAULT if _DEFAULT in found else names[0]]
    if others := [known for known in names if found[known] is not splits]:
        notes.append(f"of {name} the default configuration is read; it also has {_in_words(others)}")
    return splits


def _chosen_split(
    name: str, splits: Splits, wanted: list[str], is_own_folder: bool, notes: list[str]
) -> tuple[str, list[str]]:
    if wanted and wanted[0] in splits:
        split = wanted.pop(0)
        return split, splits[split]
    training = [TRAIN] if TRAIN in splits else [split for split in splits if _is_training(split)]
    if len(training) > 1:
        raise InvalidDataError(
            f"{name} has the training splits {_in_words(training)}. "
            + _how_to_choose(name, training, splits[training[0]], is_own_folder)
        )
    chosen = training or [split for split in splits if not _is_held_out(split)] or list(splits)
    if is_own_folder and "" in splits and not any(map(_is_held_out, splits)):
        chosen = list(splits)  # one file called `train` among others does not make them splits
    left_out = {split: files for split, files in splits.items() if split not in chosen}
    if left_out:
        notes.append(f"left out of {name}: {_left_out(left_out)}")
    elif not training and any(map(_is_held_out, chosen)):
        notes.append(f"{name} has no split to train on: its {_in_words(chosen)} is read")
    return chosen[0] if len(chosen) == 1 else "", [file for split in chosen for file in splits[split]]


def _left_out(splits: Splits) -> str:
    parts = [f"its split {split} ({_in_words(splits[split])})" for split in splits if split]
    if others := splits.get(""):
        parts.append(f"what is of no split ({_in_words(others)})")
    return ", ".join(parts)


def _how_to_choose(name: str, names: Sequence[str], files: Sequence[str], is_own_folder: bool) -> str:
    if is_own_folder:
        return f"Choose one: put its files, such as {files[0]}, in a folder of their own and give that."
    return f"Choose one, as in {name}:{names[0]}"


def _each_once(files: Sequence[str], split: str, notes: list[str]) -> list[str]:
    """The files without those that hold the rows of others in another container, or compressed.

    All files of one `split` are taken to hold the same rows in each of their containers; without one those
    that are called the same.
    """
    by_rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for file in files:
        plain = re.sub(r"(?i)\.(gz|zst)$", "", file)
        if plain != file and plain in files:
            continue
        stem, _, container = plain.rpartition("/")[2].rpartition(".")
        rows = (_telling_folder(file), split or _SHARD_END.sub("", stem))
        by_rows.setdefault(rows, {}).setdefault(container.lower(), []).append(file)
    kept = (found[min(found, key=_CONTAINERS.index)] for found in by_rows.values())
    chosen = sorted(file for group in kept for file in group)
    if again := [file for file in files if file not in chosen]:
        notes.append(f"left out, as the same rows in another form: {_in_words(again)}")
    return chosen


def _in_words(names: Sequence[str]) -> str:
    """The first of them, joined."""
    shown = list(names[:_SHOWN_NAMES])
    if len(names) > _SHOWN_NAMES:
        shown.append(f"{len(names) - _SHOWN_NAMES} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
