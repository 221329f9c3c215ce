"""One real training step in a process of its own, so that its memory is its own and so is its death.

python -m sage.tools.finetune.trial_step SPEC.json RESULT.json
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.hardware import (
    last_memory_words,
    memory_errors,
    peak_memory_bytes,
    wait_politely,
)
from sage.tools.finetune.preferences.samples import PairSample, RatedSample
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.storage import temporary_folder, temporary_folder_errors
from sage_contracts.config import OomRung, TrainingConfig
from sage_contracts.errors import OutOfMemoryError, SageError, StorageFullError, TrainingFailedError
from sage_contracts.lifeline import die_first, end_with_parent

if TYPE_CHECKING:
    from sage.tools.finetune.losses import LossFunction
    from sage.tools.finetune.run_parts import RunParts

TRIAL_TIMEOUT_S = 900.0
TIMING_S = 10.0
"""How long typical passes are timed, once the longest one has been measured."""
SAMPLED_ROWS = 64
_OUT_OF_MEMORY, _DISK_FULL, _FAILED = 75, 74, 70


class TrialSpec(BaseModel):
    model_config = ConfigDict(extra="forbid")

    config: TrainingConfig
    base: str
    rungs: list[OomRung] = Field(default_factory=list)
    longest: list[tuple[list[int], list[int]]] = Field(default_factory=list)
    """(ids, labels) of the longest rows that can meet in one step."""
    typical: list[tuple[list[int], list[int]]] = Field(default_factory=list)
    longest_judged: list[PairSample | RatedSample] = Field(default_factory=list)
    """Instead of those, for a run that learns from preferences."""
    typical_judged: list[PairSample | RatedSample] = Field(default_factory=list)


class Trial(BaseModel):
    """What a real step took."""

    model_config = ConfigDict(extra="forbid")

    device: str
    precision: str
    loss_path: str
    trainable_parameters: int
    total_parameters: int
    longest_pass_tokens: int
    peak_memory_bytes: int
    load_s: float
    passes: list[tuple[int, float]]
    """(tokens, seconds) of typical passes forward and backward."""
    computed_share: float = 1.0
    """Of the tokens of typical passes: what rows of a pass begin with in common is computed once for all of
    them, what stands behind a row's last input not at all."""
    update_s: float
    """One step of the optimiser."""
    adapter_bytes: int
    checkpoint_bytes: int
    notes: list[str] = Field(default_factory=list)


def sampled(rows: Sequence[Sample], effective_batch: int) -> dict[str, Any]:
    """`longest` and `typical` of a TrialSpec, from all rows of a run."""
    count = min(effective_batch, SAMPLED_ROWS)
    longest = nlargest(count, rows, key=lambda row: len(row.ids))
    return {
        "longest": [(list(row.ids), list(row.labels)) for row in longest],
        "typical": [(list(row.ids), list(row.labels)) for row in rows[:SAMPLED_ROWS]],
    }


def try_step(
    spec: TrialSpec,
    *,
    program: Sequence[str] = (sys.executable, "-P", "-m", "sage.tools.finetune.trial_step"),
    timeout_s: float = TRIAL_TIMEOUT_S,
) -> Trial:
    """Run the trial as a child. `program` gets the paths of its spec and of its result.

    Raises: OutOfMemoryError, also when the child is killed; StorageFullError; TrainingFailedError.
    """
    with temporary_folder("sage-trial-") as folder:
        spec_path, result_path, log_path = (folder / name for name in ("spec", "result", "log"))
        spec_path.write_text(spec.model_dump_json())
        with (
            log_path.open("wb") as log,
            # Its standard input stays open for as long as this process lives.
            subprocess.Popen(
                [*program, str(spec_path), str(result_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
            ) as child,
        ):
            try:
                code = child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise TrainingFailedError(
                    f"A trial step did not end within {timeout_s:.0f} s. Take less at once."
                ) from None
            finally:
                child.kill()
        if code == 0:
            return Trial.model_validate_json(result_path.read_bytes())
        raise _end_of_trial(code, log_path.read_text(errors="replace").strip())


def _end_of_trial(code: int, words: str) -> SageError:
    last = words.splitlines()[-1] if words else f"exit code {code}"
    if code == _OUT_OF_MEMORY:
        return OutOfMemoryError(last)
    if code == _DISK_FULL:
        return StorageFullError(last)
    if code == -signal.SIGKILL or last_memory_words(words):
        return OutOfMemoryError("The trial was killed, almost certainly because memory had run out.")
    return TrainingFailedError(f"The trial step failed: {last}")


class TrialNotes(TrainingCallback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_log(self, level: str, message: str) -> None:
        if level != "info":
            self.notes.append(message)


def measure(spec: TrialSpec) -> Trial:
    """The longest pass twice, with the optimiser's step between, then typical ones."""
    wait_politely()
    if spec.config.method != "sft":
        from sage.tools.finetune.preferences.trial import measure_preferences

        return measure_preferences(spec)
    from sage.tools.finetune.modeling import parameter_counts
    from sage.tools.finetune.run_parts import RunParts

    began = time.monotonic()
    tell = TrialNotes()
    parts = RunParts(spec.config, Path(spec.base), tell, spec.rungs)
    rows = [Sample(ids, labels) for ids, labels in spec.typical]
    loss = parts.loss(rows)
    batch = spec.config.effective_batch_size
    typical = _passes(rows, batch, loss, parts)
    hardest = _fullest([Sample(ids, labels) for ids, labels in spec.longest], loss, parts)
    longest = max(hardest, typical[0], key=loss.computed_tokens)
    load_s = time.monotonic() - began
    parts.model.train()
    _run_pass(loss, longest, parts)
    update_s = _update(parts)
    # The peak is here: activations while the optimiser already holds its state.
    _run_pass(loss, longest, parts)
    passes: list[tuple[int, float]] = []
    deadline = time.monotonic() + TIMING_S
    for group in typical:
        passes.append((_tokens(group), _run_pass(loss, group, parts)))
        if time.monotonic() > deadline:
            break
    trained, total = parameter_counts(parts.model)
    adapter_bytes, checkpoint_bytes = _sizes(parts)
    return Trial(
        device=parts.device,
        precision=parts.precision,
        loss_path=loss.name,
        trainable_parameters=trained,
        total_parameters=total,
        longest_pass_tokens=loss.computed_tokens(longest),
        peak_memory_bytes=peak_memory_bytes(parts.device),
        load_s=load_s,
        passes=passes,
        computed_share=sum(map(loss.computed_tokens, typical)) / sum(map(_tokens, typical)),
        update_s=update_s,
        adapter_bytes=adapter_bytes,
        checkpoint_bytes=checkpoint_bytes,
        notes=tell.notes,
    )


def _passes(rows: Sequence[Sample], batch: int, loss: LossFunction, parts: RunParts) -> list[list[Sample]]:
    """The rows in forward passes as steps of `batch` rows would group them, the largest first."""
    found = []
    for start in range(0, len(rows), batch):
        step = rows[start : start + batch]
        groups = loss.groups(step, parts.token_budget, parts.rows_at_once)
        found += [[step[index] for index in group] for group in groups]
    return sorted(found, key=loss.computed_tokens, reverse=True)


def _fullest(rows: Sequence[Sample], loss: LossFunction, parts: RunParts) -> list[Sample]:
    """As many of the rows, the longest first, as go through one pass: some step of a run may have such."""
    found: list[Sample] = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if len(loss.groups([*found, row], parts.token_budget, parts.rows_at_once)) == 1:
            found.append(row)
    return found


def _tokens(group: Sequence[Sample]) -> int:
    return sum(len(row.ids) for row in group)


def _run_pass(loss: Any, group: Sequence[Sample], parts: RunParts) -> float:
    """Seconds of one pass forward and backward."""
    began = time.monotonic()
    mean = loss(group) / sum(row.label_count for row in group)
    (parts.scaler.scale(mean) if parts.scaler else mean).backward()
    _finish_kernels(parts.device)
    return time.monotonic() - began


def _update(parts: RunParts) -> float:
    began = time.monotonic()
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    _finish_kernels(parts.device)
    return time.monotonic() - began


def _finish_kernels(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _sizes(parts: RunParts) -> tuple[int, int]:
    """(bytes of the result with its tokenizer, bytes of a checkpoint), as written to a disk."""
    from sage.tools.finetune.checkpoints import Checkpoints, RunState
    from sage.tools.finetune.modeling import is_whole, save_weights

    with temporary_folder("sage-trial-") as folder:
        result, checkpoints = folder / "result", folder / "checkpoints"
        parts.tokenizer.save_pretrained(str(result))
        if is_whole(parts.model):
            # Gigabytes, that the folder for temporary files may have no room for: added up, not written.
            weights = sum(p.numel() * p.element_size() for p in parts.model.parameters())
            return weights + folder_bytes(result), weights + _state_bytes(parts.optimizer)
        save_weights(parts.model, result)
        Checkpoints(checkpoints, {}).save(RunState(), parts.model, parts.optimizer, parts.scaler)
        return folder_bytes(result), folder_bytes(checkpoints)


def _state_bytes(optimizer: Any) -> int:
    """Of what the optimiser remembers of each parameter."""
    known = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in known if hasattr(value, "numel"))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    end_with_parent()
    die_first()
    spec = TrialSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        with memory_errors():
            trial = measure(spec)
        with temporary_folder_errors():
            Path(sys.argv[2]).write_text(trial.model_dump_json())
    except (OutOfMemoryError, StorageFullError) as error:
        print(error.message, file=sys.stderr)
        return _OUT_OF_MEMORY if isinstance(error, OutOfMemoryError) else _DISK_FULL
    except Exception as error:  # whatever it is, it goes to whoever asked
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
