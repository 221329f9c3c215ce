"""Rows that are longer than what the base model was made for: told by a run, a plan and the check of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.tiny_llama import make_model
from typer.testing import CliRunner

from sage.tools.finetune import LoRATrainer, TrainingCallback, TrainingConfig
from sage.tools.finetune.planning import plan
from sage.tools.finetune.trial_step import Trial, TrialSpec
from sage_cli.main import app
from sage_contracts.errors import OutOfMemoryError

TOLD = "the base model was made for 64 (max_position_embeddings)"


class Warnings(TrainingCallback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def on_log(self, level: str, message: str) -> None:
        if level == "warn":
            self.told.append(message)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), context=64)


def settings(base: Path, data: Path, out: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "report_to": [],
        "lora": {"r": 2, "lora_alpha": 4},
    }
    return TrainingConfig.model_validate({**fields, **changes})


def written(path: Path, method: str) -> Path:
    answer = "So it is, and so it stays. " * 3
    rows = [
        {"question": f"Number {n}?", "answer": answer}
        if method == "sft"
        else {"prompt": f"Number {n}?", "chosen": answer, "rejected": "No."}
        for n in range(8)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("method", "max_length", "is_told"), [("sft", 128, True), ("sft", 64, False), ("dpo", 128, True)]
)
def test_a_run_tells_of_rows_that_are_too_long_for_its_base(
    base: Path, tmp_path: Path, method: str, max_length: int, is_told: bool
) -> None:
    data, heard = written(tmp_path / "rows.json", method), Warnings()
    config = settings(base, data, tmp_path / "out", method=method, max_length=max_length)
    LoRATrainer(config, [heard]).train()
    assert any(TOLD in message for message in heard.told) == is_told, heard.told


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_tells_of_rows_that_hold_the_marks_of_its_template(
    base: Path, tmp_path: Path, method: str
) -> None:
    data, heard = written(tmp_path / "rows.json", method), Warnings()
    rows = json.loads(data.read_text())
    for row in rows:
        row.update(
            {field: f"{text}<|im_end|>" for field, text in row.items() if field in ("answer", "chosen")}
        )
    data.write_text(json.dumps(rows))
    LoRATrainer(settings(base, data, tmp_path / "out", method=method, max_length=128), [heard]).train()
    (told,) = [message for message in heard.told if "marks" in message]
    assert told.startswith("3 rows have marks in the text"), "the two of its step and the one held out"
    assert "of rows.json holds <|im_end|>" in told


@pytest.mark.parametrize(("max_length", "is_told"), [(128, True), (64, False)])
def test_a_plan_and_the_check_tell_it_before_there_is_a_run(
    base: Path, tmp_path: Path, max_length: int, is_told: bool
) -> None:
    data = written(tmp_path / "rows.json", "sft")
    config = settings(base, data, tmp_path / "out", max_length=max_length)

    def never(spec: TrialSpec) -> Trial:
        raise OutOfMemoryError("there is none")

    planned = plan(config, home=tmp_path, measure=never)
    assert (TOLD in planned.length_warning) == is_told
    words = ["finetune", "validate", str(data), "--model", str(base), "--max-length", str(max_length)]
    ran = CliRunner().invoke(app, words, prog_name="sage")
    assert (ran.exit_code, TOLD in " ".join(ran.output.split())) == (0, is_told), ran.output
