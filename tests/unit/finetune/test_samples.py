"""The sample rows that ship with the product: well formed, distinct, and about the product."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.data import validate_file
from sage_contracts.config import PresetConfigs

SAMPLES = ("qa", "chat", "instruction")
MIN_ROWS = 100


def rows_of(sample: str) -> list[dict[str, Any]]:
    text = files("sage.tools.finetune.samples").joinpath(f"{sample}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def question_of(sample: str, row: dict[str, Any]) -> str:
    if sample == "qa":
        return str(row["question"])
    if sample == "chat":
        return str(row["conversations"][0]["content"])
    return f"{row['instruction']}\n{row['input']}"


def answers_of(sample: str, row: dict[str, Any]) -> list[str]:
    if sample == "qa":
        return [row["answer"]]
    if sample == "chat":
        return [turn["content"] for turn in row["conversations"] if turn["role"] == "assistant"]
    return [row["output"]]


def normalised(text: str) -> str:
    return re.sub(r"\W+", "", text).casefold()


@pytest.mark.parametrize("sample", SAMPLES)
def test_there_are_enough_rows_and_a_share_of_chinese(sample: str) -> None:
    rows = rows_of(sample)
    chinese = [row for row in rows if re.search("[\u4e00-\u9fff]", question_of(sample, row))]

    assert len(rows) >= MIN_ROWS
    assert 0.15 <= len(chinese) / len(rows) <= 0.4


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_question_is_asked_twice(sample: str) -> None:
    counts = Counter(normalised(question_of(sample, row)) for row in rows_of(sample))

    assert [question for question, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_question_or_answer_is_empty(sample: str) -> None:
    for number, row in enumerate(rows_of(sample), start=1):
        assert question_of(sample, row).strip(), f"row {number} asks nothing"
        assert all(answer.strip() for answer in answers_of(sample, row)), f"row {number} has an empty answer"


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_long_answer_is_given_twice(sample: str) -> None:
    answers = Counter(
        normalised(answer)
        for row in rows_of(sample)
        for answer in answers_of(sample, row)
        if len(answer) > 80
    )

    assert [answer for answer, count in answers.items() if count > 1] == []


@pytest.mark.parametrize(
    ("sample", "row_format"), [("qa", "qa"), ("chat", "conversations"), ("instruction", "alpaca")]
)
def test_the_training_library_accepts_every_row(sample: str, row_format: str) -> None:
    path = Path(str(files("sage.tools.finetune.samples").joinpath(f"{sample}.jsonl")))
    report = validate_file(path)

    assert (report.format, report.bad, report.duplicates) == (row_format, [], 0)


def test_rows_have_exactly_the_published_fields() -> None:
    assert all(set(row) == {"question", "answer", "context"} for row in rows_of("qa"))
    assert all(set(row) == {"conversations"} for row in rows_of("chat"))
    assert all(set(row) == {"instruction", "input", "output"} for row in rows_of("instruction"))
    assert any(row["context"] for row in rows_of("qa"))


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    lengths = set()
    for number, row in enumerate(rows_of("chat"), start=1):
        roles = [turn["role"] for turn in row["conversations"] if turn["role"] != "system"]
        lengths.add(len(roles))
        assert roles == ["user", "assistant"] * (len(roles) // 2), f"row {number}: {roles}"
    assert lengths == {2, 4, 6}


def test_what_the_rows_say_of_presets_is_what_the_presets_are() -> None:
    by_question = {row["question"]: row["answer"] for row in rows_of("qa")}
    stated = by_question["What are the exact settings of the rtx_3060 preset?"]
    config = PresetConfigs.rtx_3060()

    assert config.load_in_8bit and "8-bit" in stated
    assert f"{config.gradient_accumulation_steps} accumulation steps" in stated
    assert f"{config.max_length} tokens" in stated
    assert config.optim in stated
    assert f"r={config.lora.r}" in stated and f"alpha {config.lora.lora_alpha}" in stated
