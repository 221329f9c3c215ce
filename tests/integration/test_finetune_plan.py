"""Plans against the runs they are about, and against memory that does not suffice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.tiny_llama import make_model

from sage.tools.finetune import LoRATrainer, TrainingConfig
from sage.tools.finetune.planning import Plan, plan
from sage_contracts.config import PresetName


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    rows = [{"question": f"Number {n}?", "answer": "So it is. " * (1 + n % 7)} for n in range(40)]
    path.write_text(json.dumps(rows))
    return path


def settings(base: Path, data: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "max_length": 90,
        "report_to": [],
        "lora": {"r": 4, "lora_alpha": 8},
    }
    return TrainingConfig.model_validate({**fields, **changes})


def test_the_command_plans_what_the_run_does(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, data)
    saying = config.model_dump(mode="json", exclude={"model_name", "data_path", "task", "preset"})
    (tmp_path / "settings.json").write_text(json.dumps(saying))
    command = [
        sys.executable, "-m", "sage_cli.main", "finetune", "plan", "--data", str(data),
        "--model", str(tiny_base), "--preset", "cpu", "--config", str(tmp_path / "settings.json"), "--json",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    planned = Plan.model_validate_json(shown.stdout)
    assert "Running a real step on the longest rows" in shown.stderr

    run = LoRATrainer(config.model_copy(update={"output_dir": str(tmp_path / "out")}), ()).train()

    assert planned.fits
    assert planned.problem is None
    assert planned.config.preset is PresetName.CPU
    assert planned.steps == run.metrics["steps"]
    assert planned.tokens_in_all == run.metrics["trained_tokens"]
    assert planned.counts.rows == run.meta["train_rows"]
    assert planned.held_out_rows == run.meta["held_out_rows"]
    assert 0 < planned.counts.truncated_rows <= run.meta["truncated_rows"]  # the run counts held-out ones too
    assert planned.trial is not None
    assert planned.trial.trainable_parameters == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert (planned.trial.device, planned.trial.precision) == (run.meta["device"], run.meta["precision"])
    assert planned.trial.loss_path == run.meta["loss_path"]
    adapter = tmp_path / "out/lora_weights"
    written = sum(path.stat().st_size for path in adapter.iterdir() if path.is_file())
    # But for the pages of text that tell what was measured, which only the run can write.
    assert planned.adapter_bytes == pytest.approx(written, abs=10_000)
    assert planned.run_s is not None
    assert planned.run_s[0] < planned.run_s[1]
    assert 1e8 < planned.trial.peak_memory_bytes < planned.memory_limit_bytes


def test_what_does_not_fit_is_told_with_what_would(data: Path, tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", intermediate_size=32_768)
    config = settings(wide, data, preset="minimal", oom_ladder=["halve_batch"])  # there is no smaller preset
    told: list[str] = []
    whole = plan(config, home=tmp_path)
    assert whole.trial is not None
    limit = round(whole.trial.peak_memory_bytes * 0.93)

    short = plan(config, home=tmp_path, memory_limit_bytes=limit, report=told.append)

    assert not short.fits
    assert "A step takes" in (short.problem or "")
    fitting = short.would_fit[-1]
    assert fitting.fits
    assert fitting.name == "halve_batch"
    assert (fitting.peak_memory_bytes or 0) <= limit
    assert "per_device_train_batch_size 4 → 2" in fitting.change
    assert any("with halve_batch" in text for text in told)
