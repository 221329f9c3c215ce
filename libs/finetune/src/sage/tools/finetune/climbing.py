"""Going on when memory does not suffice: free everything, take the ladder's next rung, try again."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.hardware import give_back_memory, memory_errors, pick_device
from sage.tools.finetune.ladder import RESTARTING, Rung, climbed, next_rung
from sage.tools.finetune.storage import write_json
from sage_contracts.config import OomRung, TrainingConfig
from sage_contracts.errors import OutOfMemoryError

T = TypeVar("T")

_RECORD = "oom_rungs.json"


class Climb:
    """The rungs that one run has taken. They are kept beside its checkpoints, for whoever resumes it."""

    def __init__(
        self,
        config: TrainingConfig,
        checkpoints: Path,
        run_id: str | None,
        *,
        resume: bool,
        taken: Sequence[OomRung] = (),
    ) -> None:
        """`taken` are rungs that somebody else has chosen: whoever saw this run being killed."""
        self.owns_checkpoints = resume
        """Whether those in the folder are this run's to go on from; an earlier run's are not."""
        known = read_rungs(checkpoints, run_id, config) if resume else ()
        self._asked = config
        self._record = checkpoints / _RECORD
        self._run_id = run_id
        # Applied in the same order to the same config, so one list begins like the other.
        self._climb_to(max(tuple(taken), known, key=len))
        if self.taken != known:
            self._write()

    def survive(self, attempt: Callable[[TrainingConfig, bool], T], tell: TrainingCallback) -> T:
        """What `attempt(config, resume)` returns on the first rung whose memory suffices.

        An attempt that clears an earlier run's checkpoints sets `owns_checkpoints`: the next one resumes.

        Raises: OutOfMemoryError after the last rung, saying what was tried.
        """
        if self.taken:
            tell.on_log("info", f"Going on with what was changed for lack of memory: {self.told}")
        while True:
            try:
                with memory_errors():
                    return attempt(self.config, self.owns_checkpoints)
            except OutOfMemoryError as error:
                # Only its words: the error itself leads to every tensor of the frames it passed.
                problem = error.message
            self._up(problem, tell)
            free_memory()

    def _up(self, problem: str, tell: TrainingCallback) -> None:
        """One rung up. Raises: OutOfMemoryError."""
        can_quantise = find_spec("bitsandbytes") is not None
        rung = next_rung(self.config, self.taken, device=pick_device(), can_quantise=can_quantise)
        if rung is None:
            raise OutOfMemoryError(advice(problem, self.rungs, self.config))
        note = ""
        if rung.name in RESTARTING:
            note = " No checkpoint fits the new rank: the run begins anew."
            self.owns_checkpoints = False
        tell.on_log("warn", f"{problem} Going on with {rung.name}: {rung.change}.{note}")
        self._climb_to((*self.taken, rung.name))
        self._write()
        tell.on_rung(rung)

    def _climb_to(self, taken: Sequence[OomRung]) -> None:
        self.taken = tuple(taken)
        # torch is not asked, and so not loaded, before the rows are known to be good.
        device = pick_device() if taken else "cpu"
        self.config, self.rungs = climbed(self._asked, self.taken, device=device)

    def _write(self) -> None:
        record = {"run_id": self._run_id, "asked": _asked(self._asked), "rungs": self.taken}
        write_json(self._record, record)

    @property
    def told(self) -> str:
        """The rungs for people."""
        return told(self.rungs)


def told(rungs: Sequence[Rung]) -> str:
    """`halve_batch (per_device_train_batch_size 8 → 4, …); …`."""
    return "; ".join(f"{rung.name} ({rung.change})" for rung in rungs)


def advice(problem: str, rungs: Sequence[Rung], config: TrainingConfig) -> str:
    """What to do when the ladder of this config has ended."""
    tried = f" Tried in vain: {told(rungs)}." if rungs else ""
    is_full = config.tuning == "full"
    first = "" if is_full or config.distributed == "fsdp" else ", load_in_8bit or load_in_4bit"
    more = "" if rungs else f"per_device_train_batch_size=1, gradient_checkpointing{first}; "
    more += "allow oom_may_truncate=true or set a smaller max_length, "
    more += "tuning=lora, which holds an optimiser for adapters only" if is_full else "a smaller lora.r"
    return f"{problem}{tried} Take a smaller base model, or: {more}."


def read_rungs(
    checkpoints: Path, run_id: str | None, config: TrainingConfig | None = None
) -> tuple[OomRung, ...]:
    """The rungs that a run (of this config) has taken; none when the folder holds another's, or nothing."""
    try:
        record = json.loads((checkpoints / _RECORD).read_text(encoding="utf-8"))
        is_same = record["run_id"] == run_id and (config is None or record["asked"] == _asked(config))
        return tuple(record["rungs"]) if is_same else ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _asked(config: TrainingConfig) -> dict[str, Any]:
    # Another worker may see the same folders under another path.
    return config.model_dump(mode="json", exclude={"output_dir", "data_path"})


def forget_rungs(checkpoints: Path) -> None:
    (checkpoints / _RECORD).unlink(missing_ok=True)


def free_memory() -> None:
    """Drop what only cycles hold, and give back what the allocators keep, for whatever comes next."""
    gc.collect()
    give_back_memory()
    torch = sys.modules.get("torch")  # not to be loaded for this
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
