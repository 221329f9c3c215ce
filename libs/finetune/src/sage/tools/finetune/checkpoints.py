"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sage.tools.finetune.callbacks import CheckpointInfo
from sage.tools.finetune.modeling import load_weights, save_weights
from sage.tools.finetune.random_numbers import RandomNumbers
from sage.tools.finetune.storage import file_sha256, folder_written_whole, write_json
from sage.tools.finetune.watchdog import LossWatch
from sage_contracts.config import TrainingConfig

_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TENSORS = "optimizer.pt"


@dataclass
class RunState:
    """Where a run stands; the data position is the step, since the order of rows follows from it."""

    step: int = 0
    trained_tokens: int = 0
    base_eval_loss: float | None = None
    base_token_accuracy: float | None = None
    train_loss: float | None = None
    """Of the last step."""
    evaluation: dict[str, float] | None = None
    """The newest between steps: step, loss, token_accuracy."""
    best: dict[str, float] | None = None
    """The one of the lowest loss, likewise; its checkpoint is kept."""
    stale_evaluations: int = 0
    """In a row, without becoming better."""
    has_ended_early: bool = False
    answered_step: int | None = None
    """The newest between steps whose answers to the sample prompts were told."""
    kept_step: int | None = None
    """Set at the end, when an earlier step than the last became the result."""
    good_step: int = 0
    """Of the newest checkpoint that is worth going back to; 0 is the start."""
    candidate_step: int | None = None
    """Of a checkpoint that the steps after it have yet to prove good."""
    watch: LossWatch = field(default_factory=LossWatch)
    rate_scale: float = 1.0
    """What rollbacks have left of the learning rate."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def keep_base_of(self, before: RunState) -> None:
        """The base's scores are the run's, whatever becomes of its steps."""
        self.base_eval_loss = before.base_eval_loss
        self.base_token_accuracy = before.base_token_accuracy


State = TypeVar("State", bound=RunState)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run below one folder."""

    folder: Path
    fingerprint: dict[str, Any]
    """What must be equal for a checkpoint to belong to this run."""

    def save(self, state: RunState, model: Any, optimizer: Any, scaler: Any) -> Path:
        """Write `checkpoint-<step>` whole. It holds a complete adapter, so that it can be served too."""
        import torch

        target = self.of_step(state.step)
        with folder_written_whole(target) as unfinished:
            save_weights(model, unfinished)
            random = RandomNumbers.now()
            tensors = {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "random": random.cpu,
                "random_cuda": random.cuda,
            }
            torch.save(tensors, unfinished / _TENSORS)
            self.seal(unfinished, state)
        return target

    def save_state(self, state: RunState, model: Any, *, like: Path | None) -> Path:
        """Write the checkpoint of `state.step` whole: one of that step with this state, or weights alone."""
        target = self.of_step(state.step)
        with folder_written_whole(target) as unfinished:
            if like:
                shutil.copytree(like, unfinished, dirs_exist_ok=True)
            else:
                save_weights(model, unfinished)
            self.seal(unfinished, state)
        return target

    def seal(self, folder: Path, state: RunState) -> None:
        """Declare everything in the folder a whole checkpoint of this run at `state`."""
        write_json(folder / _STATE, {**asdict(state), "run": self.fingerprint})
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST]
        hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        write_json(folder / _MANIFEST, hashes)

    def restore(self, path: Path, model: Any, optimizer: Any, scaler: Any) -> RunState:
        """Put model, optimizer and random numbers back as they were."""
        import torch

        load_weights(model, path)
        tensors = torch.load(path / _TENSORS, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        if scaler and tensors["scaler"]:
            scaler.load_state_dict(tensors["scaler"])
        RandomNumbers(tensors["random"], tensors["random_cuda"]).put_back()
        return self.read_state(path, RunState)

    def read_state(self, path: Path, kind: type[State]) -> State:
        """The state of a checkpoint, in the shape of this kind of run."""
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        state.pop("run")
        return kind(**{**state, "watch": LossWatch(**state.get("watch", {}))})

    def newest_whole(self, warn: Callable[[str], None], upto: int | None = None) -> Path | None:
        """The latest checkpoint of this run that is complete; broken ones are reported and passed over.

        `upto` looks at no later step.
        """
        for path in reversed(self.all()):
            if upto is not None and _step_of(path) > upto:
                continue
            problem = self._problem(path)
            if problem is None:
                return path
            warn(f"Checkpoint {path.name} is not used: {problem}")
        return None

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, so that nobody goes on from them."""
        for path in self.all():
            if _step_of(path) > step:
                shutil.rmtree(path, ignore_errors=True)

    def all(self) -> list[Path]:
        """By step, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def of_step(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def keep_newest(self, count: int, besides: Sequence[int] = ()) -> None:
        """Delete the older ones, except those of the steps `besides`."""
        kept = {self.of_step(step) for step in besides}
        for path in [*self.all()[:-count], *self._begun()]:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        # One by one: others keep what belongs to these checkpoints in the same folder.
        for path in [*self.all(), *self._begun()]:
            shutil.rmtree(path, ignore_errors=True)

    def _begun(self) -> Iterator[Path]:
        """What a process that was killed had begun to write."""
        return self.folder.glob(".checkpoint-*")

    def is_whole(self, step: int) -> bool:
        """Whether this run's checkpoint of a step can be used."""
        return self._problem(self.of_step(step)) is None

    def _problem(self, path: Path) -> str | None:
        try:
            hashes = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            damaged = [name for name, wanted in hashes.items() if file_sha256(path / name) != wanted]
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"it is incomplete ({error})"
        if damaged:
            return f"{', '.join(damaged)} is damaged"
        recorded = _with_later_settings(state["run"])
        differing = [key for key, value in self.fingerprint.items() if recorded.get(key) != value]
        return f"it is of another run ({', '.join(differing)} differ)" if differing else None


def holds_checkpoint(folder: Path) -> bool:
    """Whether one lies there that was written to its end. Nothing is read: it may be large."""
    return any(folder.glob(f"checkpoint-*/{_MANIFEST}"))


def written_checkpoints(folder: Path) -> Iterator[CheckpointInfo]:
    """Those that were written to their end, by step, as their run told of them.

    They may be large, so nothing is compared with their manifests.
    """
    for path in Checkpoints(folder, {}).all():
        if not (path / _MANIFEST).is_file():
            continue
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            step, train_loss, measured = state["step"], state["train_loss"], state["evaluation"]
        except (OSError, ValueError, KeyError):
            continue  # damaged since; whoever wants to go on from it says so
        eval_loss = measured["loss"] if measured and measured["step"] == step else None
        yield CheckpointInfo(step, path, train_loss, eval_loss)


def _with_later_settings(run: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's run, with the settings that the version which wrote it did not know at their defaults.

    Else an upgrade would take a paused run's checkpoints from it.
    """
    defaults = TrainingConfig().model_dump(mode="json")
    return {**defaults, **run, "lora": {**defaults["lora"], **run.get("lora", {})}}


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
