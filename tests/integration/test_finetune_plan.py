"""Plans against the runs they are about, and against memory that does not suffice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.nvidia_smi import Card, install

from sage.tools.finetune import LoRATrainer, TrainingCallback, TrainingConfig
from sage.tools.finetune.batching import micro_batches
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.ladder import token_budget
from sage.tools.finetune.modeling import save_weights
from sage.tools.finetune.plan_types import Plan
from sage.tools.finetune.planning import plan
from sage.tools.finetune.preferences.trial import measure_preferences
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.trial_step import Trial, TrialSpec, folder_bytes, measure
from sage_contracts.config import PresetName
from sage_contracts.errors import OutOfMemoryError, TrainingFailedError


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
    # What a user calls his own files is no part of what runs.
    (tmp_path / "transformers.py").write_text("raise SystemExit('not of the engine')")
    command = [
        sys.executable, "-P", "-m", "sage_cli.main", "finetune", "plan", "--data", str(data),
        "--model", str(tiny_base), "--preset", "cpu", "--config", str(tmp_path / "settings.json"), "--json",
    ]  # fmt: skip
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
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
    assert 0 < planned.counts.truncated_rows == run.meta["truncated_rows"]
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


def test_a_card_that_this_torch_cannot_use_is_told_and_the_plan_is_for_the_cpu(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is a build for CUDA")
    env = {**os.environ, "PATH": f"{install(tmp_path, Card('GPU-aa', 12288))}:{os.environ['PATH']}"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [
        sys.executable, "-m", "sage_cli.main", "finetune", "plan", "--auto", "--data", str(data),
        "--model", str(tiny_base), "--json",
    ]  # fmt: skip
    shown = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    planned = Plan.model_validate_json(shown.stdout)
    assert (planned.device, planned.config.preset) == ("cpu", PresetName.CPU)
    assert planned.fits and planned.trial is not None and planned.trial.device == "cpu"
    assert f"this torch ({torch.__version__}) is a build for the CPU" in " ".join(shown.stderr.split())


class Memory:
    """Stands in for a device: a step takes so many bytes a token of its largest forward pass."""

    def __init__(self, bytes_per_token: int, has_room_for_tokens: int = 10**6) -> None:
        self.asked: list[TrialSpec] = []
        self._bytes_per_token = bytes_per_token
        self._room = has_room_for_tokens

    def __call__(self, spec: TrialSpec) -> Trial:
        self.asked.append(spec)
        budget = token_budget(spec.config, "cpu", spec.rungs)
        lengths = [len(ids) for ids, _ in spec.longest]
        at_once = spec.config.per_device_train_batch_size
        largest = max(sum(lengths[index] for index in g) for g in micro_batches(lengths, budget, at_once))
        if largest > self._room:
            raise OutOfMemoryError("The trial was killed.")
        return Trial(
            device="cpu", precision="fp32", loss_path="plain", trainable_parameters=1, total_parameters=2,
            longest_pass_tokens=largest, peak_memory_bytes=largest * self._bytes_per_token, load_s=1,
            passes=[(100, 1.0)], update_s=0.1, adapter_bytes=10, checkpoint_bytes=30,
        )  # fmt: skip


def test_what_does_not_fit_is_told_with_what_would(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, data, preset="minimal", oom_ladder=["halve_batch"], save_steps=1)
    told: list[str] = []
    memory = Memory(1000)

    short = plan(config, home=tmp_path, memory_limit_bytes=200_000, report=told.append, measure=memory)

    assert not short.fits
    assert "A step takes" in (short.problem or "")
    assert [change.fits for change in short.would_fit] == [True]
    fitting = short.would_fit[-1]
    assert fitting.name == "halve_batch"
    assert (fitting.peak_memory_bytes or 0) <= 200_000
    assert "per_device_train_batch_size 4 → 2" in fitting.change
    assert any("with halve_batch" in text for text in told)
    assert [spec.rungs for spec in memory.asked] == [[], ["halve_batch"]]
    # The three that are kept, the two that the watchdog may go back to, and the one that is written before
    # the oldest goes.
    assert short.steps > 7
    assert short.checkpoints_bytes == 30 * (3 + 2 + 1)
    careless = config.model_copy(update={"max_rollbacks": 0, "eval_steps": 1})
    without = plan(careless, home=tmp_path, memory_limit_bytes=200_000, measure=memory)
    assert without.checkpoints_bytes == 30 * (3 + 1 + 1)  # the best evaluation's


def test_evaluations_between_steps_are_in_the_time_and_on_the_disk(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    def planned(**fields: Any) -> Plan:
        config = settings(tiny_base, data, **{"save_steps": 1000, **fields})
        return plan(config, home=tmp_path, measure=Memory(1000))

    def seconds(**fields: Any) -> float:
        found = planned(**fields)
        assert found.run_s is not None
        return found.run_s[0]

    rare = planned()
    assert (rare.steps, rare.checkpoints_bytes) == (18, 30)
    each = (seconds(eval_steps=1) - seconds()) / 17  # the last step's is the result's
    assert each > 0
    assert seconds(eval_steps=18) == pytest.approx(seconds())
    assert seconds(eval_steps=4) == pytest.approx(seconds() + 4 * each)
    # Each evaluation may be the best so far, whose checkpoint is written: four, and the last step's.
    assert planned(eval_steps=4).checkpoints_bytes == 30 * 5
    assert planned(eval_steps=4, save_steps=4).checkpoints_bytes == 30 * 5
    assert planned(eval_steps=4, save_steps=6).checkpoints_bytes == 30 * 6
    assert planned(eval_steps=1).checkpoints_bytes == 30 * (3 + 1 + 2 + 1)
    assert planned(eval_steps=1, keep_best=False).checkpoints_bytes == 30
    assert planned(eval_steps=1, validation_fraction=0).checkpoints_bytes == 30


def test_a_run_of_every_weight_is_told_what_it_can_take(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(
        tiny_base, data, tuning="full", oom_ladder="published", oom_may_truncate=True, max_length=512,
        eval_steps=1, save_steps=1,
    )  # fmt: skip
    memory = Memory(1000, has_room_for_tokens=10)

    found = plan(config, home=tmp_path, measure=memory)

    assert found.problem == "The trial was killed."
    assert [spec.rungs for spec in memory.asked][1] == ["halve_max_length"]
    assert [change.name for change in found.would_fit if change.name.startswith("--")] == [
        "--preset rtx_4090", "--preset rtx_3060", "--preset minimal",
    ]  # fmt: skip
    assert not any(change.fits for change in found.would_fit)
    for spec in memory.asked:
        assert spec.config.tuning == "full"
        assert not {"load_in_8bit", "load_in_4bit", "smaller_rank"} & set(spec.rungs)
    assert found.merged_bytes == 0
    assert found.spread.kind == "off"


def test_a_trial_says_how_much_rows_that_begin_alike_have_in_common(tiny_base: Path) -> None:
    config = TrainingConfig.model_validate(
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    )
    prompt = list(range(20, 50))
    rows = [([*prompt, *[5 + n] * 10], [-100] * 30 + [5 + n] * 10) for n in range(8)]
    trial = measure(TrialSpec(config=config, base=str(tiny_base), longest=rows[:4], typical=rows))
    assert [tokens for tokens, _ in trial.passes] == [160, 160], (
        "two steps, their passes as full as they come"
    )
    assert trial.longest_pass_tokens == 30 + 4 * 9, "last labels are no inputs"
    assert trial.computed_share == pytest.approx(66 / 160)


def test_a_trial_takes_the_fullest_pass_that_rows_with_a_long_beginning_come_to(tiny_base: Path) -> None:
    config = TrainingConfig.model_validate({"per_device_train_batch_size": 4, "max_length": 12})  # 48 a pass
    prompt = list(range(20, 80))
    longest = [([*prompt, 5 + n, 2], [-100] * 60 + [5 + n, 2]) for n in range(4)]
    typical = [([5 + n] * 10, [5 + n] * 10) for n in range(8)]
    trial = measure(TrialSpec(config=config, base=str(tiny_base), longest=longest, typical=typical))
    assert trial.longest_pass_tokens == 60 + 4, "what all of a pass share is on top of its budget"


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_trial_counts_and_sizes_what_a_run_of_it_writes(
    tuning: str, tiny_base: Path, tmp_path: Path
) -> None:
    config = TrainingConfig.model_validate({"tuning": tuning, "per_device_train_batch_size": 2})
    rows = [([5 + n % 9] * (20 + n), [5 + n % 9] * (20 + n)) for n in range(4)]

    one, two = (
        measure(TrialSpec(config=sized, base=str(tiny_base), longest=rows, typical=rows))
        for sized in (config.model_copy(update={"max_length": length}) for length in (12, 25))
    )

    assert (one.longest_pass_tokens, two.longest_pass_tokens) == (22, 22 + 21)
    parts = RunParts(config, tiny_base, TrainingCallback())
    loss = parts.loss([Sample(*row) for row in rows])
    loss([Sample(*rows[0])]).backward()
    parts.optimizer.step()
    save_weights(parts.model, tmp_path / "result")
    parts.tokenizer.save_pretrained(str(tmp_path / "result"))
    Checkpoints(tmp_path / "checkpoints", {}).save(RunState(), parts.model, parts.optimizer, None)
    assert two.adapter_bytes == pytest.approx(folder_bytes(tmp_path / "result"), abs=10_000)
    assert two.checkpoint_bytes == pytest.approx(folder_bytes(tmp_path / "checkpoints"), abs=40_000)
    weights = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    assert (two.trainable_parameters == two.total_parameters) == (tuning == "full")
    assert two.trainable_parameters == weights
    assert two.checkpoint_bytes > 3 * 4 * weights  # the weights and Adam's two moments, in fp32


def test_steps_on_preferences_are_measured_whole_on_a_machine_that_takes_long_for_each(
    tiny_base: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"Number {n}?", "chosen": "Yes.", "rejected": "no NO no"} for n in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = settings(
        tiny_base, tmp_path / "pairs.jsonl", method="dpo", max_length=90, per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    planned = plan(config, home=tmp_path, measure=lambda spec: measure_preferences(spec, timing_s=0))
    assert planned.problem is None
    assert planned.step_s is not None and planned.step_s > 0


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_a_run_on_preferences_is_planned_as_it_runs(method: str, tiny_base: Path, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"Number {n}?", "chosen": "Yes please. " * (1 + n % 9), "rejected": "no NO no"}
        for n in range(9)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = settings(
        tiny_base, tmp_path / "pairs.jsonl", method=method, max_length=90, num_train_epochs=1, save_steps=1,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    specs: list[TrialSpec] = []

    def step(spec: TrialSpec) -> Trial:
        specs.append(TrialSpec.model_validate_json(spec.model_dump_json()))
        return measure(specs[-1])

    planned = plan(config, home=tmp_path, measure=step)
    run = LoRATrainer(config, ()).train()

    assert planned.fits
    assert len(specs) == 1
    assert planned.steps == run.metrics["steps"]
    assert planned.tokens_in_all == run.metrics["trained_tokens"]
    assert planned.held_out_rows == run.meta["held_out_rows"]
    assert planned.counts.truncated_rows > 0
    assert planned.trial is not None
    assert planned.trial.loss_path == run.meta["loss_path"]
    assert planned.trial.longest_pass_tokens > 90
    assert planned.trial.passes
    written = folder_bytes(tmp_path / f"out/checkpoints/checkpoint-{planned.steps}")
    assert planned.trial.checkpoint_bytes == pytest.approx(written, rel=0.1)


def test_preferences_that_do_not_fit_are_cut_as_their_run_would(tiny_base: Path, tmp_path: Path) -> None:
    pair = {"prompt": "Number?", "chosen": "Yes please. " * 60, "rejected": "no NO no"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({**pair, "prompt": f"Number {n}?"}) for n in range(9)))
    config = settings(
        tiny_base, path, method="dpo", max_length=512, oom_ladder=["halve_max_length"], oom_may_truncate=True,
        preset="minimal",
    )  # fmt: skip
    longest: list[int] = []

    def never(spec: TrialSpec) -> Trial:
        longest.append(max(len(r.prompt) + len(r.chosen) for r in spec.longest_judged))  # type: ignore
        raise OutOfMemoryError("No.")

    assert not plan(config, home=tmp_path, measure=never).fits
    assert longest == [512, 256, 128]


def test_an_alternative_that_cannot_run_does_not_take_the_others_with_it(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, oom_ladder=["load_in_8bit", "halve_batch"])

    def step(spec: TrialSpec) -> Trial:
        if not spec.rungs and spec.config.preset is None:
            raise OutOfMemoryError("No.")
        if spec.config.load_in_8bit:
            raise TrainingFailedError("No card, no 8 bits.")
        return Memory(1000)(spec)

    told: list[str] = []
    found = plan(config, home=tmp_path, measure=step, report=told.append)

    assert found.problem == "No."
    assert [change.fits for change in found.would_fit][:2] == [False, False]
    assert found.would_fit[0].untried == "No card, no 8 bits."
    assert any("No card, no 8 bits." in text for text in told)
    assert found.would_fit[-1].fits, "a preset that quantises nothing"

    def broken(spec: TrialSpec) -> Trial:
        raise TrainingFailedError("Broken.")

    with pytest.raises(TrainingFailedError, match="Broken"):  # what was asked for itself
        plan(config, home=tmp_path, measure=broken)


def test_rows_of_which_a_smaller_length_leaves_nothing_are_no_alternative(
    tiny_base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"question": f"Number {n}? " * 20, "answer": "So."} for n in range(8)]))
    config = settings(
        tiny_base, path, max_length=1024, preset="minimal", oom_ladder=["halve_max_length"],
        oom_may_truncate=True,
    )  # fmt: skip

    def never(spec: TrialSpec) -> Trial:
        assert spec.longest, "nothing to measure"
        raise OutOfMemoryError("No.")

    found = plan(config, home=tmp_path, measure=never)

    assert [change.fits for change in found.would_fit] == [False] * 3
    assert [bool(change.untried) for change in found.would_fit] == [False, False, True]
    assert "No row has an answer within max_length=128" in str(found.would_fit[-1].untried)


def test_a_plan_offers_no_quantised_weights_where_nothing_can_load_them(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    config = settings(tiny_base, data, preset="minimal", oom_ladder=["load_in_8bit", "load_in_4bit"])
    assert plan(config, home=tmp_path, measure=Memory(1000, has_room_for_tokens=1)).would_fit == []


def test_a_longer_alternative_is_measured_on_whole_rows(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    long, late = "So it is. " * 20, "Number? " * 30
    rows = [{"question": f"{n}?", "answer": long} for n in range(8)]
    rows += [{"question": f"{n} {late}", "answer": "So."} for n in range(8)]
    path.write_text(json.dumps(rows))
    config = settings(tiny_base, path, max_length=60, oom_ladder="off", validation_fraction=0)
    asked: list[TrialSpec] = []

    def never(spec: TrialSpec) -> Trial:
        asked.append(spec)
        raise OutOfMemoryError("No.")

    found = plan(config, home=tmp_path, measure=never)

    assert (found.counts.rows, found.counts.dropped_rows, found.counts.truncated_rows) == (8, 8, 8)
    assert found.steps == 2 * 2
    for spec in asked:
        lengths = [len(ids) for ids, _ in spec.typical]
        if spec.config.max_length == 60:
            assert lengths == [60] * 8
        else:  # rows whose answer the shorter limit cut off are there, too
            assert len(lengths) == 16
            assert min(lengths) > 60
    assert {spec.config.max_length for spec in asked} > {60}
