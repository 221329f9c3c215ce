"""Runs over two CPU processes: the same result as alone, one set of files, and one fate."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.integration.finetune_recorder import Recorder, adapter_weights

from sage.tools.finetune import LoRATrainer, StepMetrics, TrainingConfig, TrainResult
from sage.tools.finetune.ladder import Rung
from sage_contracts.errors import InvalidDataError, InvalidRequestError, TrainingFailedError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "data.json"
    rows = [{"question": f"Number {n}?", "answer": "always the same " * (1 + n % 4)} for n in range(24)]
    path.write_text(json.dumps(rows))
    return path


def settings(base: Path, data: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "save_steps": 2,
        "max_length": 128,
        "lora": {"lora_dropout": 0.0},
        "distributed": "ddp",
        "num_devices": 2,
    }
    return TrainingConfig.model_validate({**fields, **changes})


def assert_same_adapter(one: TrainResult, other: TrainResult, *, off: float = 1e-4) -> None:
    """Four steps move a weight by 0.04. Adam makes whole steps of gradients that are next to nothing, and so
    of what rounding leaves of them when they are summed in another order: single weights are 1e-5 apart.
    """
    expected = adapter_weights(one)
    found = adapter_weights(other)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert (weight - expected[name]).abs().max() < off, name


def living_children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


@pytest.fixture(scope="module")
def alone(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    config = settings(tiny_base, data, tmp_path_factory.mktemp("alone"), distributed="off")
    return LoRATrainer(config, ()).train()


def test_two_processes_find_what_one_finds(
    tiny_base: Path, data: Path, alone: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a user calls his own files is no part of what runs.
    (tmp_path / "transformers.py").write_text("raise SystemExit('not of the engine')")
    monkeypatch.chdir(tmp_path)
    watcher = Recorder()
    both = LoRATrainer(settings(tiny_base, data, tmp_path / "b"), [watcher]).train()

    assert_same_adapter(alone, both)
    assert both.eval_loss == pytest.approx(alone.eval_loss, rel=1e-4)
    assert both.metrics["trained_tokens"] == alone.metrics["trained_tokens"]
    assert (alone.meta["devices"], both.meta["devices"]) == (1, 2)
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4]
    (curve,) = (alone.output_dir / "logs").glob("run-*/metrics.jsonl")
    points = [json.loads(line) for line in curve.read_text().splitlines()]
    of_one = [point["train/token_accuracy"] for point in points if "train/token_accuracy" in point]
    assert [metrics.token_accuracy for metrics in watcher.steps] == pytest.approx(of_one)
    assert len(of_one) == 4
    assert [checkpoint.step for checkpoint in watcher.checkpoints] == [2, 4]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "lora_weights", "checkpoints", "logs", "training_config.json", "finetune_meta.json",
    }  # fmt: skip
    assert len(list((tmp_path / "b" / "logs").iterdir())) == 1
    assert living_children() == []


def test_a_stop_is_everybodys_and_either_kind_of_run_goes_on(
    tiny_base: Path, data: Path, alone: TrainResult, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, tmp_path / "b", save_steps=50)
    first = LoRATrainer(config, [Recorder(stop_after=1)], run_id="job").train()
    assert (first.stopped, first.adapter_dir) == ("save_and_stop", None)
    assert living_children() == []

    # The batch is the same however many share it: a checkpoint of two processes serves one, too.
    watcher = Recorder()
    second = LoRATrainer(
        config.model_copy(update={"distributed": "off"}), [watcher], run_id="job", resume=True
    ).train()
    assert watcher.steps[0].step > 1
    assert_same_adapter(alone, second)


def test_a_model_in_shards_finds_the_same_and_goes_on_whole(
    tiny_base: Path, data: Path, alone: TrainResult, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, tmp_path, distributed="fsdp", per_device_train_batch_size=2,
                      gradient_accumulation_steps=3)  # fmt: skip
    first = LoRATrainer(config, [Recorder(stop_after=1)], run_id="job").train()
    assert first.stopped == "save_and_stop"
    watcher = Recorder()
    second = LoRATrainer(config, [watcher], run_id="job", resume=True).train()
    assert watcher.steps[0].step > 1
    assert second.meta["loss_path"] == "plain"
    held = next(re.search(r"holds ([\d,]+) of ([\d,]+)", text) for _, text in watcher.logs if "holds" in text)
    assert held and int(held[1].replace(",", "")) < 0.75 * int(held[2].replace(",", ""))
    # Another path rounds otherwise, and Adam makes as much of a tiny gradient as of any: 0.01 a step.
    assert_same_adapter(alone, second, off=5e-4)


class Assassin(Recorder):
    """Ends the second process by a signal after the first step, once."""

    def __init__(self, weapon: signal.Signals) -> None:
        super().__init__()
        self._weapon = weapon
        self.rungs: list[Rung] = []

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        if len(self.steps) == 1:
            os.kill(max(living_children()), self._weapon)

    def on_rung(self, rung: Rung) -> None:
        self.rungs.append(rung)


def test_the_death_of_one_ends_all(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, data, tmp_path / "out", max_steps=500, save_steps=1)
    with pytest.raises(TrainingFailedError, match=r"device 1 ended without a word.*resumed") as told:
        LoRATrainer(config, [Assassin(signal.SIGUSR1)]).train()
    assert told.value.retryable
    assert living_children() == []


def test_one_that_the_kernel_kills_had_too_little_memory(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    assassin = Assassin(signal.SIGKILL)
    config = settings(tiny_base, data, tmp_path / "out", save_steps=1)
    result = LoRATrainer(config, [assassin]).train()
    assert [rung.name for rung in assassin.rungs] == ["halve_batch"]
    assert any("of device 1 was killed, probably because memory had run out" in t for _, t in assassin.logs)
    assert result.metrics["steps"] == 4
    assert living_children() == []


DIES_AS_BITSANDBYTES_DOES = """
import os, signal

def die(*_):
    os.write(2, b"Error out of memory at line 60 in file /src/csrc/ops.cu\\n")
    os._exit(1)

signal.signal(signal.SIGUSR1, die)
"""


def test_one_whose_libraries_get_no_memory_and_exit_had_too_little_too(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES_AS_BITSANDBYTES_DOES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assassin = Assassin(signal.SIGUSR1)
    config = settings(tiny_base, data, tmp_path / "out", save_steps=1)
    result = LoRATrainer(config, [assassin]).train()
    assert [rung.name for rung in assassin.rungs] == ["halve_batch"]
    assert any("of device 1 got no memory (Error out of memory at line 60" in t for _, t in assassin.logs)
    assert result.metrics["steps"] == 4
    assert living_children() == []


def test_what_is_wrong_with_the_data_is_said_once(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"question": "Why?", "answer": ""}]))
    with pytest.raises(InvalidDataError, match="row 1, field answer"):
        LoRATrainer(settings(tiny_base, path, tmp_path / "out"), ()).train()
    assert living_children() == []


def test_adapters_outside_the_shards_are_refused(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    lora = {"lora_dropout": 0.0, "target_modules": ["q_proj", "lm_head"]}
    config = settings(tiny_base, data, tmp_path / "out", distributed="fsdp", max_steps=1, lora=lora)
    with pytest.raises(InvalidRequestError, match=r"lm_head.*distributed=ddp") as refused:
        LoRATrainer(config, ()).train()
    assert refused.value.param == "lora.target_modules"
    assert living_children() == []


class ShortAtFirst(Recorder):
    """Too little memory until the ladder's first rung, from the moment a phase begins."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self._phase = phase
        self.rungs: list[Rung] = []

    def on_phase(self, name: str, detail: str) -> None:
        if name == self._phase and not self.rungs:
            raise MemoryError

    def on_rung(self, rung: Rung) -> None:
        self.rungs.append(rung)


def test_short_of_memory_it_continues_its_own_checkpoints_and_no_earlier_runs(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, tmp_path, max_steps=2, save_steps=1)
    LoRATrainer(config.model_copy(update={"distributed": "off"}), ()).train()
    early = ShortAtFirst("data")
    LoRATrainer(config, [early]).train()
    assert [metrics.step for metrics in early.steps] == [1, 2]
    late = ShortAtFirst("eval")
    LoRATrainer(config, [late]).train()
    assert [metrics.step for metrics in late.steps] == [1, 2]
    assert len(late.rungs) == 1
    assert ("info", "Resuming after step 2") in late.logs
