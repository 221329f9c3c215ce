"""Runs of few steps over data of which most rows are too long: the rows that are not, wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune import LoRATrainer, TrainingConfig
from sage.tools.finetune.planning import plan
from sage.tools.finetune.task_data import prepare
from sage_contracts.errors import InvalidDataError


def supervised(number: int, prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f"Answer {number}."}


def pair(number: int, prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": f"Answer {number}.", "rejected": "no"}


def rated(number: int, prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f"Answer {number}.", "label": number % 2 == 0}


def settings(base: Path, tmp_path: Path, make: Any, good: int, method: str) -> TrainingConfig:
    long = "too much to read " * 40
    rows = [make(n, f"Number {n}?" if n < good else f"{n} {long}") for n in range(100)]
    data = tmp_path / "mostly_long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return TrainingConfig(
        model_name=str(base), data_path=str(data), output_dir=str(tmp_path / "out"), method=method,
        max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_length=100,
        validation_fraction=0, precision="fp32", report_to=[],
    )  # fmt: skip


@pytest.mark.parametrize(("make", "method"), [(supervised, "sft"), (pair, "dpo"), (rated, "kto")])
def test_every_row_of_a_short_run_is_another_one_as_long_as_there_are_some(
    tiny_base: Path, tmp_path: Path, make: Any, method: str
) -> None:
    config = settings(tiny_base, tmp_path, make, 16, method)
    run = LoRATrainer(config, ()).train()
    assert run.meta["train_rows"] >= 12
    planned = plan(config, home=tmp_path)
    assert planned.counts is not None
    texts = 1 if method == "sft" else 2  # of a row: preferences are learned from two answers
    assert planned.counts.rows == texts * run.meta["train_rows"]


def test_only_where_no_row_at_all_is_short_enough_is_that_said(tiny_base: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, tmp_path, supervised, 0, "sft")
    with pytest.raises(InvalidDataError, match="No row has an answer within max_length=100"):
        LoRATrainer(config, ()).train()
    # One row is, and it is the last to be tried.
    rows = prepare(config).train
    last = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]}
    data = [{"messages": row.messages} for row in rows[:-1]] + [last]
    assert config.data_path is not None
    Path(config.data_path).write_text("\n".join(map(json.dumps, data)))
    assert LoRATrainer(config, ()).train().meta["train_rows"] == 1
