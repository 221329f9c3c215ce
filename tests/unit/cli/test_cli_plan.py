"""What a person reads of a plan: what fits, what does not, and what nobody could try."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from sage.tools.finetune.plan_types import Change, Plan, SpreadPlan
from sage.tools.finetune.token_counts import count_tokens
from sage_cli.jobs.plan import show
from sage_contracts.config import TrainingConfig

EIGHT_BITS = Change(name="load_in_8bit", change="8-bit weights", fits=False, untried="No card, no 8 bits.")
HALF = Change(name="halve_batch", change="batch 2", fits=False, peak_memory_bytes=3 << 30)
SMALLER = Change(name="--preset minimal", change="max_length 512", fits=True, peak_memory_bytes=1 << 30)


def shown(*changes: Change, **fields: Any) -> str:
    plan = Plan(
        config=TrainingConfig(),
        data="rows.jsonl: 9 rows",
        counts=count_tokens([9] * 9, max_length=512, batch_rows=4),
        held_out_rows=1,
        steps=3,
        tokens_in_all=81,
        device="cpu",
        spread=SpreadPlan(kind="off", ranks=1, why="one device", fits=None),
        memory_limit_bytes=2 << 30,
        fits=False,
        problem="No.",
        merged_bytes=0,
        free_disk_bytes=1 << 30,
        would_fit=list(changes),
    )
    console = Console(width=200)
    with console.capture() as capture:
        show(console, plan.model_dump(mode="json"))
    return capture.get()


def test_what_could_not_be_tried_is_not_said_to_be_too_large() -> None:
    text = shown(EIGHT_BITS, HALF, SMALLER)
    assert "load_in_8bit: could not be tried: No card, no 8 bits." in text
    assert "halve_batch: does not fit either (peak 3.0 GiB). batch 2" in text
    assert "--preset minimal: fits (peak 1.0 GiB). max_length 512" in text
    assert text.count("does not fit either") == 1
    assert "by itself" not in text  # the run takes rungs, and no other preset
    assert "by itself" in shown(HALF.model_copy(update={"fits": True}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ((EIGHT_BITS,), "No alternative could be tried"),
        ((EIGHT_BITS, HALF), "Nothing that was tried fits"),
        ((), "take a smaller base model"),
    ],
)
def test_the_last_word_is_about_what_was_tried(changes: tuple[Change, ...], told: str) -> None:
    assert told in shown(*changes)
