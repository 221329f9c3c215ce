"""The rows of a plan: counted as the run will see them, and chosen for the steps that are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.preferences.planned import (
    Judged,
    count_judged,
    cut,
    judged_rows,
    sampled_judged,
)
from sage.tools.finetune.rendering import ChatRenderer, Sample, Samples
from sage.tools.finetune.row_supply import parts_needed
from sage.tools.finetune.token_counts import TokenCounts, count_tokens
from sage.tools.finetune.trial_step import SAMPLED_ROWS, sampled
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidDataError

PlannedRows = Sequence[Sample | Judged]
Report = Callable[[str], None]


def count_rows(
    config: TrainingConfig, base: Path, rows: Sequence[Any], report: Report
) -> tuple[TokenCounts, PlannedRows, Schedule]:
    """Tokens, the rows themselves and the steps over them. Raises: InvalidDataError."""
    from sage.tools.finetune.modeling import load_tokenizer

    counted = _samples if config.method == "sft" else _judged
    counts, found, kept = counted(config, load_tokenizer(base), rows, report)
    effective, epochs = config.effective_batch_size, config.num_train_epochs
    return counts, found, Schedule(kept, effective, epochs, config.max_steps, config.seed)


def _samples(
    config: TrainingConfig, tokenizer: Any, rows: Sequence[Any], report: Report
) -> tuple[TokenCounts, Samples, int]:
    """(tokens, the rows whole, how many are trained on). An alternative may allow more of a row than this."""
    limit = config.max_length
    renderer, found = ChatRenderer(tokenizer, limit), Samples()
    lengths: list[int] = []
    for part in parts_needed(config, rows, lambda: len(lengths)):
        report(f"Counting the tokens of {len(part)} rows")
        for text in renderer.tokenised(part):
            whole = Sample(text.ids, text.labels)
            found.extend([whole])
            if _cut(whole, limit).label_count:
                lengths.append(len(whole.ids))
    if not lengths:
        raise _nothing_left(limit)
    dropped, batch = len(found) - len(lengths), config.per_device_train_batch_size
    counts = count_tokens(lengths, max_length=limit, batch_rows=batch, dropped_rows=dropped)
    return counts, found, len(lengths)


def _judged(
    config: TrainingConfig, tokenizer: Any, rows: Sequence[Any], report: Report
) -> tuple[TokenCounts, list[Judged], int]:
    found: list[Judged] = []
    for part in parts_needed(config, rows, lambda: len(cut(found, config.max_length))):
        report(f"Counting the tokens of {len(part)} rows")
        found.extend(judged_rows(config, tokenizer, part))
    kept = len(cut(found, config.max_length))
    if not kept:
        raise _nothing_left(config.max_length)
    return count_judged(config, found), found, kept


def rows_of_a_step(config: TrainingConfig, rows: PlannedRows) -> dict[str, Any]:
    """For the specification of a trial: the longest rows that can meet in one step, and typical ones.

    Raises: InvalidDataError.
    """
    limit, batch = config.max_length, config.effective_batch_size
    if config.method != "sft":
        judged = cut([row for row in rows if not isinstance(row, Sample)], limit)
        if not judged:
            raise _nothing_left(limit)
        return sampled_judged(judged, min(batch, SAMPLED_ROWS), SAMPLED_ROWS)
    shortened = (_cut(row, limit) for row in rows if isinstance(row, Sample))
    kept = Samples(row for row in shortened if row.label_count)
    if not kept:
        raise _nothing_left(limit)
    return sampled(kept, batch)


def _cut(whole: Sample, max_length: int) -> Sample:
    return Sample(whole.ids[:max_length], whole.labels[:max_length])


def _nothing_left(max_length: int) -> InvalidDataError:
    return InvalidDataError(f"No row has an answer within max_length={max_length} tokens. Raise max_length.")
