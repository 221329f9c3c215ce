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

    if config.max_steps > 0:  # a run of few steps reads only as many rows, and so does its plan
        rows = rows[: config.max_steps * config.effective_batch_size]
    report(f"Counting the tokens of {len(rows)} rows")
    effective, epochs = config.effective_batch_size, config.num_train_epochs
    if config.method != "sft":
        judged = judged_rows(config, load_tokenizer(base), rows)
        kept = len(cut(judged, config.max_length))
        if not kept:
            raise _nothing_left(config.max_length)
        schedule = Schedule(kept, effective, epochs, config.max_steps, config.seed)
        return count_judged(config, judged), judged, schedule
    limit = config.max_length
    # Whole: an alternative may allow more of a row than this configuration does.
    texts = ChatRenderer(load_tokenizer(base), limit).tokenised(rows)
    samples = Samples(Sample(text.ids, text.labels) for text in texts)
    lengths = [len(whole.ids) for whole in samples if _cut(whole, limit).label_count]
    if not lengths:
        raise _nothing_left(limit)
    batch = config.per_device_train_batch_size
    dropped = len(samples) - len(lengths)
    counts = count_tokens(lengths, max_length=limit, batch_rows=batch, dropped_rows=dropped)
    return counts, samples, Schedule(len(lengths), effective, epochs, config.max_steps, config.seed)


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
