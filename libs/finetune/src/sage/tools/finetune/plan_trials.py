"""Real steps for a plan: of what was asked for, and of what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from sage.tools.finetune.ladder import LEAST_HARM, climbed, next_rung, order_of
from sage.tools.finetune.plan_rows import PlannedRows, Report, rows_of_a_step
from sage.tools.finetune.plan_types import Change
from sage.tools.finetune.trial_step import Trial, TrialSpec
from sage_contracts.config import OomRung, PresetName, TrainingConfig, preset_fields
from sage_contracts.errors import InvalidDataError, OutOfMemoryError, TrainingFailedError

_SMALLER_PRESETS = (PresetName.RTX_4090, PresetName.RTX_3060, PresetName.MINIMAL)


class Trials:
    """Real steps on the rows of one plan."""

    def __init__(
        self,
        base: Path,
        rows: PlannedRows,
        limit_bytes: int,
        report: Report,
        measure: Callable[[TrialSpec], Trial],
    ) -> None:
        self._measure = measure
        self._base = base
        self._rows = rows
        self._limit_bytes = limit_bytes
        self._report = report

    def run(
        self, config: TrainingConfig, rungs: Sequence[OomRung] = (), what: str = "this configuration"
    ) -> tuple[Trial | None, str | None]:
        """(what was measured, why it does not fit or None). Raises: InvalidDataError, TrainingFailedError."""
        self._report(f"Running a real step on the longest rows: {what}")
        rows = rows_of_a_step(config, self._rows)
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


def what_would_fit(
    config: TrainingConfig, trials: Trials, device: str, keep: Sequence[str]
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
