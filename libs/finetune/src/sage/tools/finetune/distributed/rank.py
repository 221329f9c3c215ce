"""One rank of a run: the same run as alone, with its share of every step. Rank 0 writes and tells."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.climbing import Climb
from sage.tools.finetune.distributed.messages import Cleared, Failed, Forwarder, RankSpec, Wish
from sage.tools.finetune.distributed.shards import ShardedTeam
from sage.tools.finetune.distributed.team import AgreedStop, ProcessTeam, Team
from sage.tools.finetune.hardware import memory_errors
from sage.tools.finetune.losses import LossFunction, PlainLoss
from sage.tools.finetune.outputs import OutputLayout
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.trainer import LoRATrainer, Run, TrainResult
from sage_contracts.errors import SageError


class RankRun(Run):
    """A run of one of several processes."""

    checkpoints_folder: Path
    """The run's own, also where `layout` is only a place for what is not to be kept."""
    send: Callable[[Any], None]
    """To whoever started this process."""

    def _clear_checkpoints(self) -> None:
        super()._clear_checkpoints()
        if self.team.rank == 0:
            self.send(Cleared())

    def _checkpoints(self, fingerprint: dict[str, Any]) -> Checkpoints:
        kind = SharedCheckpoints if self.team.rank == 0 else ReadOnlyCheckpoints
        return kind(self.checkpoints_folder, fingerprint, self.team)

    def _loss(self, parts: RunParts, train: Sequence[Sample]) -> LossFunction:
        if isinstance(self.team, ShardedTeam):
            held, total = self.team.held(parts.model)
            self._tell.on_log(
                "info", f"Each of {self.team.size} devices holds {held:,} of {total:,} parameters"
            )
            # Shards come together when their layer is called, and the fast paths go around that.
            return PlainLoss(parts.model)
        return super()._loss(parts, train)


@dataclass(frozen=True)
class SharedCheckpoints(Checkpoints):
    """Those that rank 0 writes."""

    team: Team

    def save(self, state: RunState, model: Any, optimizer: Any, scaler: Any) -> Path:
        return super().save(state, self.team.whole(model), self.team.whole(optimizer), scaler)


class ReadOnlyCheckpoints(SharedCheckpoints):
    """The same for the others, to start from."""

    def save(self, state: RunState, model: Any, optimizer: Any, scaler: Any) -> Path:
        self.team.attend_save(model, optimizer)
        return self.folder / f"checkpoint-{state.step}"

    def keep_newest(self, *_: Any, **__: Any) -> None:
        """Rank 0 does."""

    def drop_after(self, step: int) -> None:
        """Rank 0 does."""

    def clear(self) -> None:
        """Rank 0 does."""


def train(spec: RankSpec, forward: Forwarder) -> TrainResult:
    """This rank's part of the run. Raises: SageError."""
    config = spec.config
    team = ShardedTeam(is_cpu=spec.is_cpu) if spec.is_sharded else ProcessTeam(is_cpu=spec.is_cpu)
    root = config.require_output_dir()
    with TemporaryDirectory(prefix="sage-rank-") as scratch, memory_errors():
        layout = OutputLayout(root if team.rank == 0 else Path(scratch))
        climb = Climb(
            config, OutputLayout(root).checkpoints, spec.run_id, resume=spec.resume, taken=spec.rungs
        )
        quiet: dict[str, Any] = {} if team.rank == 0 else {"report_to": [], "sample_prompts": []}
        if spec.is_sharded:
            quiet["sample_prompts"] = []  # an answer takes every process, token by token
        trainer = LoRATrainer(
            config, (), home=spec.home, training_path=spec.training_path,
            validation_path=spec.validation_path, resume=spec.resume, run_id=spec.run_id,
        )  # fmt: skip
        tell = AgreedStop([forward], team)  # type: ignore[list-item] # a callback by its methods
        run = RankRun(trainer, climb.config.model_copy(update=quiet), layout, tell, climb, resume=spec.resume)
        run.team, run.checkpoints_folder = team, OutputLayout(root).checkpoints
        run.send = forward.send
        run.load_on = "cpu" if spec.is_sharded else None  # it may fit on no single device
        result = run.go()
        team.leave()
        return result


def main() -> int:
    pipe = Connection(int(sys.argv[1]))
    # Whoever stops the run stops the process that started us; that one tells rank 0, and all stop together.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    spec: RankSpec = pipe.recv()
    is_first = os.environ["RANK"] == "0"
    forward = Forwarder(pipe.send)
    threading.Thread(target=_listen, args=(pipe, forward), daemon=True).start()
    try:
        result = train(spec, forward)
        if is_first:
            pipe.send(result)
        return 0
    except SageError as error:
        traceback.print_exc()
        pipe.send(Failed(error.code, error.message, error.param))
    except Exception as error:
        traceback.print_exc()
        pipe.send(Failed(None, f"{type(error).__name__}: {error}"))
    return 1


def _listen(pipe: Connection, forward: Forwarder) -> None:
    """Wishes come in; the end of the pipe means that whoever started us is gone, or wants us gone."""
    try:
        while True:
            said = pipe.recv()
            if isinstance(said, Wish):
                forward.wish = said.stop
    except (EOFError, OSError):
        os._exit(1)
