"""Runs for which memory does not suffice at first: they end well, and as if it had sufficed."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.fakes.short_of_memory import forward_limit

from sage.tools.finetune import LoRATrainer, StepMetrics, TrainingCallback, TrainingConfig
from sage.tools.finetune.ladder import Rung
from sage_contracts.errors import OutOfMemoryError


class Watcher(TrainingCallback):
    def __init__(self, fail_at: int = 0) -> None:
        self.steps: list[StepMetrics] = []
        self.rungs: list[Rung] = []
        self.logs: list[str] = []
        self._fail_at = fail_at

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        if metrics.step == self._fail_at and not self.rungs:
            raise MemoryError

    def on_rung(self, rung: Rung) -> None:
        self.rungs.append(rung)

    def on_log(self, level: Literal["info", "warn", "error"], message: str) -> None:
        self.logs.append(message)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    rows = [{"question": f"Number {n}?", "answer": "The answer is always the same."} for n in range(40)]
    path.write_text(json.dumps(rows))
    return path


def settings(base: Path, data: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "precision": "fp32",
        "save_steps": 2,
        "max_length": 128,
        "report_to": [],
        "lora": {"r": 8, "lora_dropout": 0.0},  # dropout would depend on how rows share forward passes
    }
    return TrainingConfig.model_validate({**fields, **changes})


def test_a_run_that_is_too_large_ends_like_one_that_is_not(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    whole = LoRATrainer(settings(tiny_base, data, tmp_path / "a"), ()).train()
    watcher = Watcher()
    with forward_limit(90) as refused:  # a row has some 80 tokens, two have more together
        result = LoRATrainer(settings(tiny_base, data, tmp_path / "b"), [watcher]).train()

    assert refused
    assert refused == sorted(refused, reverse=True)
    assert {rung.name for rung in watcher.rungs} == {"halve_batch"}
    last = watcher.rungs[-1].config
    assert (last.per_device_train_batch_size, last.gradient_accumulation_steps) == (1, 4)
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4, 5, 6]
    assert result.eval_loss == pytest.approx(whole.eval_loss, rel=1e-3)
    assert result.meta["oom_rungs"] == [{"name": r.name, "change": r.change} for r in watcher.rungs]
    assert json.loads((tmp_path / "b/finetune_meta.json").read_text())["oom_rungs"]
    assert whole.meta["oom_rungs"] == []
    assert any("CUDA out of memory" in text and "halve_batch" in text for text in watcher.logs)


def test_the_failed_try_is_gone_from_memory_before_the_next(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    class Counting(Watcher):
        def __init__(self) -> None:
            super().__init__()
            self.models_alive: list[int] = []

        def on_phase(self, name: str, detail: str) -> None:
            if name == "loading":
                self.models_alive.append(sum(type(x) is LlamaForCausalLM for x in gc.get_objects()))

    gc.collect()
    watcher = Counting()
    with forward_limit(150):
        LoRATrainer(settings(tiny_base, data, tmp_path), [watcher]).train()
    assert len(watcher.models_alive) == len(watcher.rungs) + 1
    assert set(watcher.models_alive[1:]) == {watcher.models_alive[0]}


def test_it_goes_on_from_the_last_checkpoint(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher(fail_at=5)
    config = settings(tiny_base, data, tmp_path, oom_ladder=["gradient_checkpointing"])
    result = LoRATrainer(config, [watcher]).train()
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4, 5, 5, 6]
    assert "Resuming after step 4" in watcher.logs
    assert [rung.name for rung in watcher.rungs] == ["gradient_checkpointing"]
    assert result.metrics["steps"] == 6


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_shorter_rows_go_on_from_the_last_checkpoint_though_some_are_left_out(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    """Every third question leaves no room for its answer at half the length, so there are fewer steps."""
    rows = [
        {"prompt": f"Number {n}? " * (16 if n % 3 == 0 else 1), "chosen": "Yes please.", "rejected": "no NO"}
        for n in range(40)
    ]
    if method == "sft":
        rows = [{"question": row["prompt"], "answer": row["chosen"]} for row in rows]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    watcher = Watcher(fail_at=3)
    config = settings(
        tiny_base, data, tmp_path / "out", method=method, max_steps=-1, num_train_epochs=1, max_length=256,
        oom_ladder=["halve_max_length"], oom_may_truncate=True,
    )  # fmt: skip
    LoRATrainer(config, [watcher]).train()
    steps = [metrics.step for metrics in watcher.steps]
    assert watcher.steps[-1].total_steps < watcher.steps[0].total_steps
    assert "Resuming after step 2" in watcher.logs
    assert steps == [1, 2, 3, *range(3, watcher.steps[-1].total_steps + 1)]


@pytest.mark.parametrize("phase", ["data", "base_model", "loading"])
def test_a_lack_of_memory_before_the_first_step_continues_no_earlier_run(
    tiny_base: Path, data: Path, tmp_path: Path, phase: str
) -> None:
    class ShortAtFirst(Watcher):
        def on_phase(self, name: str, detail: str) -> None:
            if name == phase and not self.rungs:
                raise MemoryError

    earlier = LoRATrainer(settings(tiny_base, data, tmp_path), ()).train()
    watcher = ShortAtFirst()
    config = settings(tiny_base, data, tmp_path, learning_rate=1e-3)
    result = LoRATrainer(config, [watcher]).train()
    assert len(watcher.rungs) == 1
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4, 5, 6]
    assert result.eval_loss != pytest.approx(earlier.eval_loss, rel=1e-3)


def test_a_smaller_rank_begins_anew_and_says_so(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher(fail_at=3)
    config = settings(tiny_base, data, tmp_path, oom_ladder=["smaller_rank"])
    result = LoRATrainer(config, [watcher]).train()
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert any("the run begins anew" in text for text in watcher.logs)
    assert result.adapter_dir is not None
    assert json.loads((result.adapter_dir / "adapter_config.json").read_text())["r"] == 4


def test_whoever_resumes_a_run_begins_on_its_rung(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    class Stopping(Watcher):
        def should_stop(self) -> Literal["save_and_stop"] | None:
            return "save_and_stop" if len(self.steps) >= 3 else None

    config = settings(tiny_base, data, tmp_path)
    with forward_limit(150) as refused:
        LoRATrainer(config, [Stopping()], run_id="job").train()
        assert refused
        refused.clear()
        watcher = Watcher()
        result = LoRATrainer(config, [watcher], run_id="job", resume=True).train()
    assert refused == []
    assert watcher.rungs == []
    assert [metrics.step for metrics in watcher.steps] == [4, 5, 6]
    assert result.meta["oom_rungs"]
    again = LoRATrainer(config, ()).train()  # a new run owes nothing to the old one
    assert again.meta["oom_rungs"] == []


def test_after_the_last_rung_it_says_what_was_tried(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    with (
        forward_limit(5),
        pytest.raises(OutOfMemoryError, match=r"in vain: halve_batch.*load_in_4bit") as caught,
    ):
        LoRATrainer(settings(tiny_base, data, tmp_path), [watcher]).train()
    assert [rung.name for rung in watcher.rungs][-3:] == [
        "gradient_checkpointing", "load_in_8bit", "load_in_4bit",
    ]  # fmt: skip
    assert "oom_may_truncate" in caught.value.message
    assert watcher.rungs[-1].config.max_length == 128


def test_without_a_ladder_it_fails_with_advice(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    with forward_limit(5), pytest.raises(OutOfMemoryError, match="gradient_checkpointing"):
        LoRATrainer(settings(tiny_base, data, tmp_path, oom_ladder="off"), [watcher]).train()
    assert watcher.rungs == []
