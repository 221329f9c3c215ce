"""The preferences of a run that is planned: rendered whole, then cut to what each trial allows. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage.tools.finetune.preferences.methods import batch_shape
from sage.tools.finetune.preferences.samples import (
    PairSample,
    RatedSample,
    mixed,
    pair_samples,
    rated_samples,
    swapped_answers,
)
from sage.tools.finetune.rendering import ChatRenderer
from sage.tools.finetune.token_counts import TokenCounts, count_tokens
from sage_contracts.config import TrainingConfig

Judged = PairSample | RatedSample
_WHOLE = 10**9  # tokens; no row has as many


def judged_rows(config: TrainingConfig, tokenizer: Any, rows: Sequence[Any]) -> list[Judged]:
    """The rows as token ids, not cut. Raises: InvalidDataError."""
    renderer = ChatRenderer(tokenizer, _WHOLE)
    if config.method == "kto":
        return [*rated_samples(renderer, rows)]
    return [*pair_samples(renderer, rows)]


def cut(rows: Sequence[Judged], max_length: int) -> list[Judged]:
    """Those of which something is left to judge within `max_length`."""
    found: list[Judged] = []
    for row in rows:
        room = max_length - len(row.prompt)
        if room <= 0:
            continue
        if isinstance(row, PairSample):
            found.append(PairSample(row.prompt, row.chosen[:room], row.rejected[:room]))
        else:
            found.append(RatedSample(row.prompt, row.answer[:room], row.is_desirable))
    return found


def count_judged(config: TrainingConfig, rows: Sequence[Judged]) -> TokenCounts:
    """Of all that passes through the model: both answers of a pair, and with KTO each answer and another."""
    kept = [row for row in rows if len(row.prompt) < config.max_length]
    lengths = _lengths(config, kept)
    counts = count_tokens(
        lengths,
        max_length=config.max_length,
        batch_rows=2 * config.per_device_train_batch_size,
        dropped_rows=len(rows) - len(kept),
    )
    return counts.model_copy(update={"padding_saved": 0.0})  # TRL pads


def sampled_judged(rows: Sequence[Judged], count: int, typical: int) -> dict[str, Any]:
    """`longest_judged` and `typical_judged` of a TrialSpec."""
    longest = sorted(rows, key=_width, reverse=True)[:count]
    return {
        "longest_judged": [_plain(row) for row in longest],
        "typical_judged": [_plain(row) for row in rows[:typical]],
    }


def _plain(row: Judged) -> Judged:
    """With lists, which JSON knows, in place of arrays."""
    if isinstance(row, PairSample):
        return PairSample(list(row.prompt), list(row.chosen), list(row.rejected))
    return RatedSample(list(row.prompt), list(row.answer), row.is_desirable)


def _width(row: Judged) -> int:
    """What TRL pads a row to at least: both answers of a pair go into one batch."""
    answers = (row.chosen, row.rejected) if isinstance(row, PairSample) else (row.answer,)
    return len(row.prompt) + max(map(len, answers))


def _lengths(config: TrainingConfig, rows: Sequence[Judged]) -> list[int]:
    lengths = []
    for row in rows:
        if isinstance(row, PairSample):
            lengths += [len(row.prompt) + len(answer) for answer in (row.chosen, row.rejected)]
    rated = mixed([row for row in rows if isinstance(row, RatedSample)])
    others = swapped_answers(rated, batch_shape(config)[0]) if rated else []
    for judged, other in zip(rated, others, strict=True):
        lengths += [len(judged.prompt) + len(answer) for answer in (judged.answer, other)]
    return lengths
