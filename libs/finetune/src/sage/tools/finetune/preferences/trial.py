"""Real steps of a preference method, measured as `trial_step` measures those of supervised runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import StopMode, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.hardware import peak_memory_bytes
from sage.tools.finetune.modeling import parameter_counts, save_weights
from sage.tools.finetune.preferences.methods import NEVER, make_trainer
from sage.tools.finetune.preferences.planned import Judged
from sage.tools.finetune.preferences.progress import Progress
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.storage import temporary_folder
from sage.tools.finetune.trial_step import TIMING_S, Trial, TrialNotes, TrialSpec, folder_bytes

_MOST_TIMED_STEPS = 8


def measure_preferences(spec: TrialSpec, timing_s: float = TIMING_S) -> Trial:
    """Two steps on the longest rows, the second with the optimiser's state in memory; then typical ones.

    Of each kind one at least, and none is begun after `timing_s`.
    """
    began = time.monotonic()
    tell = TrialNotes()
    parts = RunParts(spec.config, Path(spec.base), tell, spec.rungs)
    load_s = time.monotonic() - began
    with temporary_folder("sage-trial-") as folder:
        result, longest, typical = (folder / name for name in ("result", "longest", "typical"))
        hardest = _steps(spec, parts, spec.longest_judged, 2, longest, timing_s)
        # Every step of a run is as these: its update is in their time.
        timed = _steps(spec, parts, spec.typical_judged, _MOST_TIMED_STEPS, typical, timing_s)
        save_weights(parts.model, result)
        parts.tokenizer.save_pretrained(str(result))
        adapter_bytes, checkpoint_bytes = folder_bytes(result), folder_bytes(longest)
    trained, total = parameter_counts(parts.model)
    return Trial(
        device=parts.device,
        precision=parts.precision,
        loss_path=f"trl-{spec.config.method}",
        trainable_parameters=trained,
        total_parameters=total,
        longest_pass_tokens=hardest.most_tokens,
        peak_memory_bytes=peak_memory_bytes(parts.device),
        load_s=load_s,
        passes=timed.passes,
        update_s=0.0,
        adapter_bytes=adapter_bytes,
        checkpoint_bytes=checkpoint_bytes,
        notes=tell.notes,
    )


def _steps(
    spec: TrialSpec, parts: RunParts, rows: Sequence[Judged], steps: int, folder: Path, timing_s: float
) -> _Watched:
    """As many steps as there is time for; the last one leaves a checkpoint in the folder."""
    config = spec.config.model_copy(update={"save_steps": NEVER})
    schedule = Schedule(len(rows), config.effective_batch_size, 1, max_steps=steps, seed=config.seed)
    watched = _Watched(config, schedule, RunState(), Checkpoints(folder, {}), _InTime(timing_s), parts.device)
    make_trainer(config, parts, list(rows), schedule, folder, watched).train()  # type: ignore[arg-type]
    return watched


class _Watched(Progress[RunState]):
    """What each pass and each step took."""

    most_tokens = 0

    def forward(self, batch: Mapping[str, Any]) -> None:
        # No wish is asked for within a step: half of one says nothing of the time that a step takes.
        self.most_tokens = max(self.most_tokens, self._count(batch))

    @property
    def passes(self) -> list[tuple[int, float]]:
        return [(tokens, seconds) for seconds, tokens in self._recent]


class _InTime(TrainingCallback):
    """Wants no further step once there were enough seconds of them."""

    def __init__(self, timing_s: float) -> None:
        self._deadline = time.monotonic() + timing_s

    def should_stop(self) -> StopMode | None:
        return "save_and_stop" if time.monotonic() > self._deadline else None
