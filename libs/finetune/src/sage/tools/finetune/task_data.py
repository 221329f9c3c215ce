"""The rows of a run: the user's own, or what each task brings along. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

from sage.tools.finetune.code_data import SOURCE_SUFFIXES, CodePair, build_code_pairs, split_by_module
from sage.tools.finetune.code_data.readings import Readings
from sage.tools.finetune.code_data.source_files import own_files, source_files
from sage.tools.finetune.data import Conversation, RowError, load_conversations, load_rows
from sage.tools.finetune.data.formats import match
from sage.tools.finetune.data.layout import is_data_name
from sage.tools.finetune.data.report import with_notes
from sage.tools.finetune.data.row_keys import conversation_key, row_key
from sage.tools.finetune.data.sources import data_files
from sage.tools.finetune.registry import Registry
from sage_contracts.config import TASKS_GROUP, Task, TrainingConfig
from sage_contracts.errors import InvalidDataError

SAMPLES_DIR = Path(__file__).parent / "samples"
_PROBED_FILES = 200
_NAMED_FILES = 3

Row = TypeVar("Row")


@dataclass
class RowSplits(Generic[Row]):
    """What is trained on and what is held out."""

    train: list[Row]
    validation: list[Row]
    description: str
    """For people: where the rows come from and how they were split."""
    _sha256: str | None = field(default=None, init=False, repr=False)

    def content(self, row: Row) -> list[Any]:
        """What is learned of a row."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 over every row of both splits, in order."""
        if self._sha256 is None:
            digest = sha256()
            for rows in (self.train, self.validation):
                for row in rows:
                    digest.update(content_bytes(self.content(row)))
                digest.update(b"\0")
            self._sha256 = digest.hexdigest()
        return self._sha256

    def let_go(self) -> None:
        """Forget the rows once they are rendered: as texts they take as much memory as their tokens.

        The description and the fingerprint stay.
        """
        self.fingerprint()
        self.train, self.validation = [], []


class Splits(RowSplits[Conversation]):
    """No conversation is in both."""

    def content(self, row: Conversation) -> list[Any]:
        return [row.messages, row.tools]


def content_bytes(content: Any) -> bytes:
    """Equal for equal content. What JSON has not, such as the dates of a Parquet file, counts as its text."""
    return json.dumps(content, sort_keys=True, default=str).encode()


OwnData = Callable[[TrainingConfig], Splits]
TASKS: Registry[OwnData] = Registry("task", TASKS_GROUP, on_add=Task.add)
"""Task name -> the data it brings when the user gives none."""


def prepare(
    config: TrainingConfig, *, training_path: Path | None = None, validation_path: Path | None = None
) -> Splits:
    """The rows to train on and to hold out; limited to `max_train_rows` and `max_eval_rows`.

    `training_path` (default: `config.data_path`) is a file of rows, a folder of such files, or a hub's data
    set; for the task `code` also a source tree.
    Raises: InvalidDataError.
    """
    path = training_path or (Path(config.data_path).expanduser() if config.data_path else None)
    if path is None:
        splits = TASKS.get(config.task.value)(config)
    elif is_source_tree(config.task, path):
        readings = Readings()
        pairs = build_code_pairs(path, config.code_kinds, readings=readings)
        splits = _split_code(pairs, config, f"functions of {path.absolute().name}")
        notes = [*readings.notes(path), *left_out_rows(path)]
        splits.description = with_notes(splits.description, notes)
    else:
        splits = _from_files(config, path, validation_path)
    # Tasks of others know no limits.
    train, held = limited(splits.train, config), splits.validation[: config.max_eval_rows]
    return Splits(train, held, splits.description)


def is_source_tree(task: Task, path: Path) -> bool:
    """Whether a path means source code, to make rows of, and not rows."""
    if task is not Task.CODE:
        return False
    # Source trees often hold some JSON; folders of rows hold no code.
    if path.is_dir():
        return next(source_files(path), None) is not None or not data_files(path)
    return path.suffix in SOURCE_SUFFIXES


def left_out_rows(tree: Path) -> list[str]:
    """What to know of a source tree with files of rows in it, which are not read beside code."""
    files = (file for file in own_files(tree) if is_data_name(file.name) and not file.name.startswith("."))
    named = sorted(file for file in files if file.is_file())
    # A tree may hold any number of JSON files; most have nothing to do with training.
    found = list(islice(filter(_holds_rows, named[:_PROBED_FILES]), _NAMED_FILES + 1))
    if not found:
        return []
    names = ", ".join(file.relative_to(tree).as_posix() for file in found[:_NAMED_FILES])
    more = " and more" if len(found) > _NAMED_FILES else ""
    return [
        f"the folder holds source code, which is learned: rows in {names}{more} are left out; give that file "
        "or a folder without code to train on rows"
    ]


def _holds_rows(file: Path) -> bool:
    try:
        return any(match(row.content()) for row in islice(load_rows(file), 1))
    except (InvalidDataError, RowError, OSError):
        return False


def _from_files(config: TrainingConfig, path: Path, validation_path: Path | None) -> Splits:
    notes: list[str] = []
    rows = load_conversations(path, notes=notes)
    if validation_path is None:
        splits = _split_rows(rows, config, path.name)
        splits.description = with_notes(splits.description, notes)
        return splits
    held = _unique(load_conversations(validation_path, notes=notes))
    unique = _unique(rows)
    unsaid = _unsaid(unique, held)
    Random(config.seed).shuffle(unsaid)  # limits take its head
    if not unsaid:
        raise InvalidDataError(
            f"Every row of {path.name} is also in {validation_path.name}: nothing to train on."
        )
    train = limited(unsaid, config)
    description = f"{path.name}: {count_of(train, unsaid)} rows{_removed(rows, unique, unsaid)}"
    description += f"; held out: {len(held)} of {validation_path.name}"
    return Splits(train, judged(held, config), with_notes(description, notes))


def limited(train: list[Row], config: TrainingConfig) -> list[Row]:
    return train[: config.max_train_rows or None]


def count_of(kept: Sequence[Row], found: Sequence[Row]) -> str:
    """How many are trained on, and of how many where that is not all."""
    return f"{len(kept)}" if len(kept) == len(found) else f"{len(kept)} of {len(found)}"


def _removed(rows: Sequence[Row], unique: Sequence[Row], kept: Sequence[Row]) -> str:
    """What became of the rows that are neither trained on nor held out."""
    dropped, left_out = len(rows) - len(unique), len(unique) - len(kept)
    note = f", {dropped} duplicates removed" if dropped else ""
    return note + (f", {left_out} left out that say the same as held-out rows" if left_out else "")


def judged(held: list[Row], config: TrainingConfig) -> list[Row]:
    """Those of a validation file that are evaluated. Of too many it is the seed's choice: a file may be
    sorted."""
    if len(held) <= config.max_eval_rows:
        return held
    return Random(config.seed).sample(held, config.max_eval_rows)


def held_out_count(count: int, fraction: float) -> int:
    """How many of so many are held out: one at least, where any are to be, and never the last to train on."""
    if fraction == 0 or count < 2:
        return 0
    return max(1, min(round(count * fraction), count - 1))


def _split_rows(rows: Sequence[Conversation], config: TrainingConfig, source: str) -> Splits:
    unique = _unique(rows)
    Random(config.seed).shuffle(unique)
    wanted = held_out_count(len(unique), config.validation_fraction)
    held = unique[:wanted]
    unsaid = _unsaid(unique[wanted:], held)
    if not unsaid:  # all rows say the same
        unsaid, held = unique, []
    train = limited(unsaid, config)
    counts = f"{count_of(train, unsaid)} rows, {len(held)} held out"
    return Splits(train, held, f"{source}: {counts}{_removed(rows, unique, [*unsaid, *held])}")


def _split_code(pairs: Sequence[CodePair], config: TrainingConfig, source: str) -> Splits:
    found, held = split_by_module(pairs, config.validation_fraction)
    if not held:
        rows = [pair.conversation() for pair in pairs]
        return _split_rows(rows, config, f"{source} (one module, split by function)")
    order = Random(config.seed)
    order.shuffle(found)
    order.shuffle(held)
    train = limited(found, config)
    modules = len({pair.module for pair in held})
    counts = f"{count_of(train, found)} to train on, {len(held)} held out"
    description = f"{source}: {counts} from {modules} unseen modules"
    as_rows = [[pair.conversation() for pair in part] for part in (train, held)]
    return Splits(as_rows[0], as_rows[1], description)


def _unique(rows: Sequence[Conversation]) -> list[Conversation]:
    return list({row_key(row.messages, row.tools): row for row in rows}.values())


def _unsaid(rows: Sequence[Conversation], held: Sequence[Conversation]) -> list[Conversation]:
    """The rows whose conversation is not held out, also not with other tools or weights."""
    known = {conversation_key(row.messages) for row in held}
    return [row for row in rows if conversation_key(row.messages) not in known]


@TASKS.register("code")
def _standard_library(config: TrainingConfig) -> Splits:
    version = ".".join(map(str, sys.version_info[:2]))
    return _split_code(
        build_code_pairs(None, config.code_kinds), config, f"functions of Python {version}'s standard library"
    )


def _samples(config: TrainingConfig) -> Splits:
    path = SAMPLES_DIR / f"{config.task.value}.jsonl"
    return _split_rows(load_conversations(path), config, f"the sample set '{config.task.value}'")


for _task in (Task.QA, Task.CHAT, Task.INSTRUCTION):
    TASKS.register(_task.value)(_samples)


@TASKS.register("custom")
def _no_data(config: TrainingConfig) -> Splits:
    raise InvalidDataError(
        "The task 'custom' has no data of its own: give some with --data (data_path in Python).",
        param="data_path",
    )
