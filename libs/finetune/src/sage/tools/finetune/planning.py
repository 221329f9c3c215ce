"""What a run will take, before it is paid for: rows and tokens counted, memory and time measured.

    python -m sage.tools.finetune.planning SPEC.json

prints JSON lines: {"kind": "progress", …} while it works, then {"kind": "plan", …} or {"kind": "failed", …}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sage.tools.finetune.base_models import default_model, resolve_base
from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.distributed.ranks import spread_here
from sage.tools.finetune.hardware import (
    device_memory_bytes,
    has_cuda,
    pick_device,
    unused_card,
    wait_politely,
)
from sage.tools.finetune.model_size import parameters_of
from sage.tools.finetune.plan_rows import Report, count_rows
from sage.tools.finetune.plan_trials import Trials, what_would_fit
from sage.tools.finetune.plan_types import Plan, PlanSpec, SpreadPlan
from sage.tools.finetune.positions import beyond_positions, positions_of
from sage.tools.finetune.preferences.methods import require_trainable
from sage.tools.finetune.preferences.splits import prepare_preferences
from sage.tools.finetune.quickstart import quickstart_overrides
from sage.tools.finetune.task_data import prepare
from sage.tools.finetune.trial_step import Trial, TrialSpec, folder_bytes, try_step
from sage_contracts.auto import choose_preset
from sage_contracts.config import PresetName, TrainingConfig, overlay, preset_fields
from sage_contracts.errors import InvalidRequestError, SageError
from sage_contracts.lifeline import end_with_parent

_TIME_MARGIN = 0.15
"""Of the time: rows that are yet to come differ from those that were timed."""


def plan(
    config: TrainingConfig,
    *,
    home: Path | None = None,
    memory_limit_bytes: int | None = None,
    report: Report = lambda message: None,
    keep: Sequence[str] = (),
    measure: Callable[[TrialSpec], Trial] = try_step,
) -> Plan:
    """Count the rows of a run and measure a real step of it. Nothing is trained, nothing is kept.

    `memory_limit_bytes` plans for less memory than the device has. `keep` names the fields that another
    preset must not change. `measure` takes one step, and raises OutOfMemoryError where it cannot. Raises:
    InvalidDataError, InvalidRequestError, ModelNotFoundError, TrainingFailedError.
    """
    wait_politely()
    home = home or Path(os.environ.get("SAGE_HOME", "~/.sage")).expanduser()
    report("Reading the rows")
    require_trainable(config)
    splits = prepare(config) if config.method == "sft" else prepare_preferences(config)
    base = resolve_base(config.model_name, home, report)
    counts, samples, schedule = count_rows(config, base, splits.train, report)
    data, held_out_rows = splits.description, len(splits.validation)
    del splits  # the step that is measured needs the memory
    device = pick_device()
    if device == "cpu" and (why := unused_card()):
        report(f"{why}. This plan is for the CPU")
    limit = memory_limit_bytes or device_memory_bytes(device)
    spread = spread_here(config, home)
    found = Plan(
        config=config,
        data=data,
        counts=counts,
        length_warning=beyond_positions(min(counts.longest, config.max_length), positions_of(base)),
        held_out_rows=held_out_rows,
        steps=schedule.total_steps,
        tokens_in_all=round(counts.tokens / schedule.rows * _rows_in_all(schedule)),
        device=device,
        spread=SpreadPlan(kind=spread.kind, ranks=spread.ranks, why=spread.why, fits=spread.fits),
        memory_limit_bytes=limit,
        fits=False,
        merged_bytes=folder_bytes(base) if config.tuning == "lora" else 0,
        free_disk_bytes=shutil.disk_usage(_existing(home)).free,
    )
    if spread.kind == "fsdp" and spread.fits is not None:
        # One device alone cannot tell what a shard takes.
        found.fits = spread.fits
        found.problem = None if found.fits else spread.why
        return found
    trial = Trials(base, samples, limit, report, measure)
    found.trial, found.problem = trial.run(config)
    found.fits = found.problem is None
    if found.trial:
        _estimate(found, found.trial, counts.tokens / schedule.rows)
    if not found.fits:
        found.would_fit = list(what_would_fit(config, trial, device, keep))
    return found


def _rows_in_all(schedule: Schedule) -> float:
    """Rows over all steps; the last step of an epoch may have fewer than the others."""
    return schedule.rows * schedule.total_steps / schedule.steps_per_epoch


def _estimate(found: Plan, trial: Trial, tokens_per_row: float) -> None:
    """Time and disk, from what was measured."""
    rates = sorted(tokens / seconds for tokens, seconds in trial.passes)
    overall = sum(tokens for tokens, _ in trial.passes) / sum(seconds for _, seconds in trial.passes)
    fixed_s = trial.load_s + found.steps * trial.update_s
    # An evaluation is the forward third of a pass.
    evaluations = _evaluations(found.steps, found.config.eval_steps)
    held_out = evaluations / 3 * found.held_out_rows * tokens_per_row
    tokens = found.tokens_in_all + held_out
    found.step_s = found.tokens_in_all / overall / found.steps + trial.update_s
    found.run_s = (
        (fixed_s + tokens / min(rates[-1], overall * (1 + _TIME_MARGIN))) * (1 - _TIME_MARGIN),
        (fixed_s + tokens / max(rates[0], overall / (1 + 2 * _TIME_MARGIN))) * (1 + _TIME_MARGIN),
    )
    found.checkpoints_bytes = trial.checkpoint_bytes * min(_saves(found), _most_checkpoints(found.config))
    found.adapter_bytes = trial.adapter_bytes


def _evaluations(steps: int, eval_steps: int) -> int:
    """The base's, those between steps, and the result's, which the last step's may be."""
    return 1 + (ceil(steps / eval_steps) if eval_steps else 1)


def _saves(found: Plan) -> int:
    """Steps after which a checkpoint is written; an evaluation's is where it is the best so far."""
    config, steps = found.config, found.steps
    saved = {*range(config.save_steps, steps, config.save_steps), steps}
    if config.eval_steps and config.keep_best and found.held_out_rows:
        saved |= {*range(config.eval_steps, steps, config.eval_steps)}
    return len(saved)


def _most_checkpoints(config: TrainingConfig) -> int:
    """At once: those that are kept, the best one, those that a rollback may need (the good one, and the one
    that has yet to prove good), and the one that is written before the oldest goes."""
    proving = 2 if config.max_rollbacks else 0
    return config.save_total_limit + bool(config.eval_steps and config.keep_best) + proving + 1


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def resolve(spec: PlanSpec) -> tuple[TrainingConfig, str | None]:
    """(the config that `start` would train with here, why its preset was chosen).

    Raises: InvalidRequestError.
    """
    wait_politely()
    home = Path(spec.home)
    model = default_model(spec.task) if spec.model == "auto" else spec.model.removeprefix("base:")
    preset, why = spec.preset, None
    if preset in (None, PresetName.AUTO):
        device = "cuda:0" if pick_device() == "cuda" else "cpu"
        choice = choose_preset(device, device_memory_bytes(device), parameters_of(model, home))
        preset, why = choice.preset, choice.why
    fields = preset_fields(preset or PresetName.CPU)
    if spec.is_auto:
        method = spec.settings.get("method", "sft")
        sizes = quickstart_overrides(spec.task, preset or PresetName.CPU, method, has_gpu=has_cuda())
        if "num_train_epochs" in spec.settings:
            sizes.pop("max_steps", None)
        fields |= sizes
    fields = overlay(fields, spec.settings)
    fields |= {"task": spec.task, "preset": preset, "model_name": model, "data_path": spec.data}
    try:
        return TrainingConfig.model_validate(fields), why
    except ValidationError as error:
        raise InvalidRequestError(error.errors()[0]["msg"]) from error


def main() -> int:
    """The program: its spec is a file, or `-` for standard input."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the trainer takes its numbers to be nvidia-smi's
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no line of ours

    def say(kind: str, **fields: Any) -> None:
        lines.write(json.dumps({"kind": kind, **fields}) + "\n")

    if sys.argv[1] == "-":
        spec = PlanSpec.model_validate_json(sys.stdin.read())
    else:
        end_with_parent()
        spec = PlanSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        config, why = resolve(spec)
        found = plan(
            config,
            home=Path(spec.home),
            report=lambda message: say("progress", message=message),
            keep=tuple(spec.settings),
        )
    except SageError as error:
        say("failed", code=error.code, message=error.message, param=error.param)
        return 1
    found.why_preset = why
    say("plan", plan=found.model_dump(mode="json"))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Not `sys.exit`: libraries leave threads behind that would be waited for.
    os._exit(code)
