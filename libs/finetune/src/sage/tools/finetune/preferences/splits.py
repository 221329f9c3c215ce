"""The preferences of a run: the user's own, or the sample set. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from sage.tools.finetune.data.preferences import (
    PreferencePair,
    RatedAnswer,
    load_preferences,
    load_rated_answers,
    one_kind_fault,
)
from sage.tools.finetune.data.report import with_notes
from sage.tools.finetune.data.row_keys import conversation_key
from sage.tools.finetune.task_data import (
    SAMPLES_DIR,
    RowSplits,
    content_bytes,
    count_of,
    held_out_count,
    judged,
    limited,
)
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidDataError

SAMPLE_SET = SAMPLES_DIR / "preferences.jsonl"
Row = TypeVar("Row", PreferencePair, RatedAnswer)


class PreferenceSplits(RowSplits[Row]):
    """No prompt is in both."""

    def content(self, row: Row) -> list[Any]:
        return _content(row)


def prepare_preferences(
    config: TrainingConfig, *, training_path: Path | None = None, validation_path: Path | None = None
) -> PreferenceSplits[PreferencePair] | PreferenceSplits[RatedAnswer]:
    """The pairs (DPO, ORPO) or rated answers (KTO) to train on and to hold out.

    Limited to `max_train_rows` and `max_eval_rows`. Raises: InvalidDataError.
    """
    path = training_path or (Path(config.data_path).expanduser() if config.data_path else None)
    if config.method == "kto":
        return _split(load_rated_answers, config, path, validation_path)
    return _split(load_preferences, config, path, validation_path)


def _split(
    load: Callable[..., list[Row]], config: TrainingConfig, path: Path | None, validation_path: Path | None
) -> PreferenceSplits[Row]:
    source = path.name if path else "the sample set 'preferences'"
    notes: list[str] = []
    loaded = load(path or SAMPLE_SET, notes=notes)
    rows = _unique(loaded)
    is_rated = config.method == "kto"
    if is_rated:
        _require_both_kinds(rows, "among the rows")
    if validation_path is None:
        found, held = _by_prompt(rows, config)
    else:
        held = _unique(load(validation_path, notes=notes))
        known = {_prompt_key(row) for row in held}
        found = [row for row in rows if _prompt_key(row) not in known]
        Random(config.seed).shuffle(found)
        if not found:
            raise InvalidDataError(
                f"Every prompt of {source} is also in {validation_path.name}: nothing to train on."
            )
        if is_rated:
            _require_both_kinds(found, f"whose prompt is not also in {validation_path.name}")
    train = limited(found, config)
    if is_rated and len(train) < len(found):
        _require_both_kinds(train, f"among the {len(train)} rows that max_train_rows leaves")
    dropped, left_out = len(loaded) - len(rows), len(rows) - len(found) if validation_path else 0
    description = f"{source}: {count_of(train, found)} preferences, {len(held)} held out"
    description += f", {dropped} duplicates removed" if dropped else ""
    description += f", {left_out} left out whose prompts are held out" if left_out else ""
    held = judged(held, config) if validation_path else held[: config.max_eval_rows]
    return PreferenceSplits(train, held, with_notes(description, notes))


def _by_prompt(rows: Sequence[Row], config: TrainingConfig) -> tuple[list[Row], list[Row]]:
    """Whole prompts are held out: two answers to one question are no independent evidence."""
    groups: dict[bytes, list[Row]] = {}
    for row in rows:
        groups.setdefault(_prompt_key(row), []).append(row)
    prompts = list(groups)
    Random(config.seed).shuffle(prompts)
    wanted = held_out_count(len(prompts), config.validation_fraction)
    left = Counter(kind for group in groups.values() for kind in _kinds(group))
    train: list[Row] = []
    held: list[Row] = []
    for prompt in prompts:
        kinds = _kinds(groups[prompt])
        # The last answer of its kind is for training: kto learns nothing without.
        if wanted and all(left[kind] > 1 for kind in kinds):
            wanted -= 1
            left.subtract(kinds)
            held += groups[prompt]
        else:
            train += groups[prompt]
    return train, held


def _kinds(rows: Sequence[PreferencePair | RatedAnswer]) -> set[bool]:
    """Whether there are wanted and unwanted answers; a pair has always both."""
    return {row.is_desirable for row in rows if isinstance(row, RatedAnswer)}


def _require_both_kinds(rows: Sequence[PreferencePair | RatedAnswer], where: str) -> None:
    if fault := one_kind_fault(_kinds(rows), where):
        raise InvalidDataError(fault)


def _unique(rows: Sequence[Row]) -> list[Row]:
    return list({sha256(content_bytes(_content(row))).digest(): row for row in rows}.values())


def _prompt_key(row: PreferencePair | RatedAnswer) -> bytes:
    return conversation_key(row.prompt_messages)


def _content(row: PreferencePair | RatedAnswer) -> list[Any]:
    if isinstance(row, PreferencePair):
        return [row.prompt_messages, row.chosen, row.rejected, row.tools]
    return [row.prompt_messages, row.answer, row.is_desirable, row.tools]
