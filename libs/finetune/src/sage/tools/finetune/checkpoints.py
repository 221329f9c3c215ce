"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sage.tools.finetune.modeling import save_adapter
from sage.tools.finetune.storage import file_sha256, folder_written_whole, write_json

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
    train_loss: float | None = None
    """Of the last step."""


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

        target = self.folder / f"checkpoint-{state.step}"
        with folder_written_whole(target) as unfinished:
            save_adapter(model, unfinished)
            tensors = {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            }
            torch.save(tensors, unfinished / _TENSORS)
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
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
        tensors = torch.load(path / _TENSORS, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        if scaler and tensors["scaler"]:
            scaler.load_state_dict(tensors["scaler"])
        torch.set_rng_state(tensors["random"])
        if tensors["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(tensors["random_cuda"])
        return self.read_state(path, RunState)

    def read_state(self, path: Path, kind: type[State]) -> State:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        state.pop("run")
        return kind(**state)

    def newest_whole(self, warn: Callable[[str], None]) -> Path | None:
        """The latest checkpoint of this run that is complete; broken ones are reported and passed over."""
        for path in reversed(self.all()):
            problem = self._problem(path)
            if problem is None:
                return path
            warn(f"Checkpoint {path.name} is not used: {problem}")
        return None

    def all(self) -> list[Path]:
        """By step, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def keep_newest(self, count: int) -> None:
        for path in self.all()[:-count]:
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        # One by one: others keep what belongs to these checkpoints in the same folder.
        for path in self.all():
            shutil.rmtree(path, ignore_errors=True)

    def _problem(self, path: Path) -> str | None:
        try:
            hashes = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            damaged = [name for name, wanted in hashes.items() if file_sha256(path / name) != wanted]
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"it is incomplete ({error})"
        if damaged:
            return f"{', '.join(damaged)} is damaged"
        differing = [key for key, value in self.fingerprint.items() if state["run"].get(key) != value]
        return f"it is of another run ({', '.join(differing)} differ)" if differing else None
