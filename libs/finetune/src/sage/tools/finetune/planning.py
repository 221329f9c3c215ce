"""What a run will take, before it is paid for: rows and tokens counted, memory and time measured.

    python -m sage.tools.finetune.planning SPEC.json

prints JSON lines: {"kind": "progress", …} while it works, then {"kind": "plan", …} or {"kind": "failed", …}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sage.tools.finetune.base_models import default_model, resolve_base
from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.distributed.ranks import spread_here
from sage.tools.finetune.hardware import device_memory_bytes, has_cuda, wait_politely
from sage.tools.finetune.ladder import LEAST_HARM, climbed, next_rung, order_of
from sage.tools.finetune.lifeline import end_with_parent
from sage.tools.finetune.model_size import parameters_of
from sage.tools.finetune.plan_types import Change, Plan, PlanSpec, SpreadPlan
from sage.tools.finetune.preferences.methods import require_fixed_reference
from sage.tools.finetune.preferences.planned import (
    Judged,
    count_judged,
    cut,
    judged_rows,
    sampled_judged,
)
from sage.tools.finetune.preferences.splits import prepare_preferences
from sage.tools.finetune.quickstart import quickstart_overrides
from sage.tools.finetune.rendering import ChatRenderer, Sample, Samples
from sage.tools.finetune.task_data import prepare
from sage.tools.finetune.token_counts import TokenCounts, count_tokens
from sage.tools.finetune.trial_step import SAMPLED_ROWS, Trial, TrialSpec, folder_bytes, sampled, try_step
from sage_contracts.auto import choose_preset
from sage_contracts.config import OomRung, PresetName, TrainingConfig, overlay, preset_fields
from sage_contracts.errors import (
    InvalidDataError,
    InvalidRequestError,
    OutOfMemoryError,
    SageError,
    TrainingFailedError,
)

Report = Callable[[str], None]

_SMALLER_PRESETS = (PresetName.RTX_4090, PresetName.RTX_3060, PresetName.MINIMAL)
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
    require_fixed_reference(config)
    splits = prepare(config) if config.method == "sft" else prepare_preferences(config)
    base = resolve_base(config.model_name, home, report)
    counts, samples, schedule = _count(config, base, splits.train, report)
    data, held_out_rows = splits.description, len(splits.validation)
    del splits  # the step that is measured needs the memory
    device = "cuda" if has_cuda() else "cpu"
    limit = memory_limit_bytes or device_memory_bytes(device)
    spread = spread_here(config, home)
    found = Plan(
        config=config,
        data=data,
        counts=counts,
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
    trial = _Trials(base, samples, limit, report, measure)
    found.trial, found.problem = trial.run(config)
    found.fits = found.problem is None
    if found.trial:
        _estimate(found, found.trial, counts.tokens / schedule.rows)
    if not found.fits:
        found.would_fit = list(_what_would_fit(config, trial, device, keep))
    return found


def _count(
    config: TrainingConfig, base: Path, rows: Sequence[Any], report: Report
) -> tuple[TokenCounts, Sequence[Sample | Judged], Schedule]:
    from sage.tools.finetune.modeling import load_tokenizer

    if config.max_steps > 0:  # a run of few steps reads only as many rows, and so does its plan
        rows = rows[: config.max_steps * config.effective_batch_size]
    report(f"Counting the tokens of {len(rows)} rows")
    effective, epochs = config.effective_batch_size, config.num_train_epochs
    if config.method != "sft":
        judged = judged_rows(config, load_tokenizer(base), rows)
        kept = len(cut(judged, config.max_length))
        if not kept:
            raise _nothing_left(config.max_length)
        schedule = Schedule(kept, effective, epochs, config.max_steps, config.seed)
        return count_judged(config, judged), judged, schedule
    limit = config.max_length
    # Whole: an alternative may allow more of a row than this configuration does.
    texts = ChatRenderer(load_tokenizer(base), limit).tokenised(rows)
    samples = Samples(Sample(text.ids, text.labels) for text in texts)
    lengths = [len(whole.ids) for whole in samples if _cut(whole, limit).label_count]
    if not lengths:
        raise _nothing_left(limit)
    batch = config.per_device_train_batch_size
    dropped = len(samples) - len(lengths)
    counts = count_tokens(lengths, max_length=limit, batch_rows=batch, dropped_rows=dropped)
    return counts, samples, Schedule(len(lengths), effective, epochs, config.max_steps, config.seed)


def _cut(whole: Sample, max_length: int) -> Sample:
    return Sample(whole.ids[:max_length], whole.labels[:max_length])


def _nothing_left(max_length: int) -> InvalidDataError:
    return InvalidDataError(f"No row has an answer within max_length={max_length} tokens. Raise max_length.")


def _rows_in_all(schedule: Schedule) -> float:
    """Rows over all steps; the last step of an epoch may have fewer than the others."""
    return schedule.rows * schedule.total_steps / schedule.steps_per_epoch


class _Trials:
    """Real steps on the rows of one plan."""

    def __init__(
        self,
        base: Path,
        samples: Sequence[Sample | Judged],
        limit_bytes: int,
        report: Report,
        measure: Callable[[TrialSpec], Trial],
    ) -> None:
        self._measure = measure
        self._base = base
        self._samples = samples
        self._limit_bytes = limit_bytes
        self._report = report

    def run(
        self, config: TrainingConfig, rungs: Sequence[OomRung] = (), what: str = "this configuration"
    ) -> tuple[Trial | None, str | None]:
        """(what was measured, why it does not fit or None). Raises: InvalidDataError, TrainingFailedError."""
        self._report(f"Running a real step on the longest rows: {what}")
        rows = self._rows(config)
        spec = TrialSpec(config=config, base=str(self._base), rungs=list(rungs), **rows)
        try:
            trial = self._measure(spec)
        except OutOfMemoryError as error:
            return None, error.message
        if trial.peak_memory_bytes > self._limit_bytes:
            peak, limit = trial.peak_memory_bytes / 2**30, self._limit_bytes / 2**30
            return trial, f"A step takes {peak:.1f} GiB, and there are {limit:.1f} GiB."
        return trial, None

    def attempt(
        self, config: TrainingConfig, rungs: Sequence[OomRung], what: str, name: str, change: str
    ) -> Change:
        """An alternative. One that cannot run at all says why, and leaves the others their turn."""
        try:
            trial, problem = self.run(config, rungs, what)
        except (InvalidDataError, TrainingFailedError) as error:
            self._report(f"Could not be tried {what}: {error.message}")
            return Change(name=name, change=change, fits=False, untried=error.message)
        peak = trial.peak_memory_bytes if trial else None
        return Change(name=name, change=change, fits=problem is None, peak_memory_bytes=peak)

    def _rows(self, config: TrainingConfig) -> dict[str, Any]:
        limit, batch = config.max_length, config.effective_batch_size
        if config.method != "sft":
            judged = cut([row for row in self._samples if not isinstance(row, Sample)], limit)
            if not judged:
                raise _nothing_left(limit)
            return sampled_judged(judged, min(batch, SAMPLED_ROWS), SAMPLED_ROWS)
        cut_rows = (_cut(row, limit) for row in self._samples if isinstance(row, Sample))
        rows = Samples(row for row in cut_rows if row.label_count)
        if not rows:
            raise _nothing_left(limit)
        return sampled(rows, batch)


def _estimate(found: Plan, trial: Trial, tokens_per_row: float) -> None:
    """Time and disk, from what was measured."""
    rates = sorted(tokens / seconds for tokens, seconds in trial.passes)
    overall = sum(tokens for tokens, _ in trial.passes) / sum(seconds for _, seconds in trial.passes)
    fixed_s = trial.load_s + found.steps * trial.update_s
    # An evaluation is the forward third of a pass, before and after the run.
    held_out = 2 / 3 * found.held_out_rows * tokens_per_row
    tokens = found.tokens_in_all + held_out
    found.step_s = found.tokens_in_all / overall / found.steps + trial.update_s
    found.run_s = (
        (fixed_s + tokens / min(rates[-1], overall * (1 + _TIME_MARGIN))) * (1 - _TIME_MARGIN),
        (fixed_s + tokens / max(rates[0], overall / (1 + 2 * _TIME_MARGIN))) * (1 + _TIME_MARGIN),
    )
    saved = ceil(found.steps / found.config.save_steps)
    found.checkpoints_bytes = trial.checkpoint_bytes * min(saved, _most_checkpoints(found.config))
    found.adapter_bytes = trial.adapter_bytes


def _most_checkpoints(config: TrainingConfig) -> int:
    """At once: those that are kept, the best one, those that a rollback may need (the good one, and the one
    that has yet to prove good), and the one that is written before the oldest goes."""
    proving = 2 if config.max_rollbacks else 0
    return config.save_total_limit + bool(config.eval_steps and config.keep_best) + proving + 1


def _what_would_fit(
    config: TrainingConfig, trials: _Trials, device: str, keep: Sequence[str]
) -> Iterator[Change]:
    """The ladder's rungs, then smaller presets: each measured, each until one fits."""
    asked = config if order_of(config) else config.model_copy(update={"oom_ladder": list(LEAST_HARM)})
    current, taken = asked, tuple[OomRung, ...]()
    can_quantise = find_spec("bitsandbytes") is not None
    while rung := next_rung(current, taken, device=device, can_quantise=can_quantise):
        current, taken = rung.config, (*taken, rung.name)
        changes = "; ".join(step.change for step in climbed(asked, taken, device=device)[1])
        name = " + ".join(dict.fromkeys(taken))
        found = trials.attempt(current, taken, f"with {rung.name}", name, changes)
        yield found
        if found.fits:
            break
    for preset in _SMALLER_PRESETS[_place(config.preset) :]:
        fields = {name: value for name, value in preset_fields(preset).items() if name not in keep}
        quantisation = {"load_in_8bit": False, "load_in_4bit": False}
        if config.tuning == "full":
            fields |= quantisation  # no preset quantises what trains
        changed = TrainingConfig.model_validate(
            {**config.model_dump(), **quantisation, **fields, "preset": preset}
        )
        change = f"max_length {changed.max_length}, batch {changed.per_device_train_batch_size}"
        found = trials.attempt(changed, (), f"with preset {preset.value}", f"--preset {preset.value}", change)
        yield found
        if found.fits:
            return


def _place(preset: PresetName | None) -> int:
    """Where the presets begin that are smaller than this one."""
    return _SMALLER_PRESETS.index(preset) + 1 if preset in _SMALLER_PRESETS else 0


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def resolve(spec: PlanSpec) -> tuple[TrainingConfig, str | None]:
    """(the config that `start` would train with here, why its preset was chosen).

    Raises: InvalidRequestError.
    """
    home = Path(spec.home)
    model = default_model(spec.task) if spec.model == "auto" else spec.model.removeprefix("base:")
    preset, why = spec.preset, None
    if preset in (None, PresetName.AUTO):
        device = "cuda:0" if has_cuda() else "cpu"
        choice = choose_preset(device, device_memory_bytes(device), parameters_of(model, home))
        preset, why = choice.preset, choice.why
    fields = preset_fields(preset or PresetName.CPU)
    if spec.is_auto:
        method = spec.settings.get("method", "sft")
        sizes = quickstart_overrides(spec.task, preset or PresetName.CPU, method)
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
