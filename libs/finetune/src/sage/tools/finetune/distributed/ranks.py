"""Starts a process per device, passes on what the first one tells, and ends all when one is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING

from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.distributed.choosing import Machine, Spread, choose_spread
from sage.tools.finetune.distributed.messages import Cleared, Failed, RankSpec, Told, Wish
from sage.tools.finetune.hardware import (
    has_cuda,
    last_memory_words,
    physical_cores,
    resolve_precision,
)
from sage.tools.finetune.model_size import parameters_of
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import OutOfMemoryError, TrainingFailedError, all_errors

if TYPE_CHECKING:
    from sage.tools.finetune.climbing import Climb
    from sage.tools.finetune.trainer import TrainResult

_POLL_S = 0.1
"""How often callbacks are asked whether to stop."""
_LAST_WORDS_S = 5.0
"""How long the others may take to say why, once one has died: the first to die is seldom the one to blame."""
_EXIT_S = 60.0
_REMEMBERED_LINES = 50
"""Of what a process writes to standard error."""


class DeviceLostError(TrainingFailedError):
    """A process ended by itself, for a reason that nobody knows and that may be gone the next time."""

    retryable = True


def spread_here(config: TrainingConfig, home: Path) -> Spread:
    """How a run is spread over the devices of this machine. Raises: InvalidRequestError."""
    machine, parameters = Machine(0, 0, "fp32"), None
    if has_cuda() and config.distributed != "off" and config.method == "sft":
        import torch

        # Of their properties, not of what is free: asking for that would take memory of the first one.
        sizes = [
            int(torch.cuda.get_device_properties(index).total_memory)
            for index in range(torch.cuda.device_count())
        ]
        machine = Machine(len(sizes), min(sizes, default=0), resolve_precision(config.precision, "cuda")[0])
        parameters = parameters_of(config.model_name, home)
    return choose_spread(config, machine, parameters)


def run_ranks(spec: RankSpec, size: int, tell: TrainingCallback, climb: Climb) -> TrainResult:
    """Train in `size` processes; their result. None of them outlives this call.

    Raises: what the run raises; OutOfMemoryError when a process is killed, TrainingFailedError when one is
    lost otherwise.
    """
    port = _free_port()
    ranks: list[_Rank] = []
    try:
        for rank in range(size):
            ranks.append(_Rank(spec, rank, size, port))
        return _watch(ranks, tell, climb)
    finally:
        for rank_process in ranks:
            rank_process.end()


class _Rank:
    """One process and our end of its pipe."""

    def __init__(self, spec: RankSpec, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self.pipe, theirs = Pipe()
        # -P: what lies in the user's folder is no part of the program.
        command = [sys.executable, "-P", "-m", "sage.tools.finetune.distributed", str(theirs.fileno())]
        env = {**os.environ, **_environment(rank, size, port, is_cpu=spec.is_cpu)}
        try:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                stderr=subprocess.PIPE,
                errors="replace",
                pass_fds=[theirs.fileno()],
            )
        finally:
            theirs.close()
        assert self.process.stderr is not None
        self._words = _Words(self.process.stderr)
        self.pipe.send(spec)

    def exit_code(self) -> int | None:
        """Of a process whose pipe has closed: it is about to end."""
        try:
            return self.process.wait(timeout=_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        """What a process that has ended wrote to standard error in the end."""
        self._words.join(_LAST_WORDS_S)
        return "".join(self._words.last)

    def end(self) -> None:
        """Its end of the pipe closes, which it does not survive; should it, it is killed."""
        self.pipe.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=_EXIT_S)
        self._words.join(_LAST_WORDS_S)


class _Words(Thread):
    """Passes on what a process writes, and remembers the end of it."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(name="rank-words", daemon=True)
        self.last: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        self._stream = stream
        self.start()

    def run(self) -> None:
        with self._stream:
            for line in self._stream:
                self.last.append(line)
                print(line, end="", file=sys.__stderr__, flush=True)


def _watch(ranks: Sequence[_Rank], tell: TrainingCallback, climb: Climb) -> TrainResult:
    by_pipe: dict[Connection, _Rank] = {rank.pipe: rank for rank in ranks}
    failures: dict[int, Failed] = {}
    lost: list[int] = []
    wished, give_up_at = None, float("inf")
    result: TrainResult | None = None
    while by_pipe and time.monotonic() < give_up_at:
        for pipe in wait(list(by_pipe), _POLL_S):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except (EOFError, ConnectionError):
                rank = by_pipe.pop(pipe)
                if result is None or rank.rank in failures:
                    lost.append(rank.rank)
                    give_up_at = min(give_up_at, time.monotonic() + _LAST_WORDS_S)
                continue
            if isinstance(said, Told):
                getattr(tell, said.name)(*said.arguments, **said.named)
            elif isinstance(said, Cleared):
                climb.owns_checkpoints = True
            elif isinstance(said, Failed):
                failures[by_pipe[pipe].rank] = said
            else:
                result = said
        if result is None and (wish := tell.should_stop()) and wish != wished:
            wished = wish
            _say(ranks[0], Wish(wish))
        if result is not None:
            return result
    raise _failure(failures, lost, ranks)


def _say(rank: _Rank, wish: Wish) -> None:
    try:
        rank.pipe.send(wish)
    except OSError:
        return  # it is gone, which the loop sees


def _failure(failures: dict[int, Failed], lost: Sequence[int], ranks: Sequence[_Rank]) -> Exception:
    explained = [failure for _, failure in sorted(failures.items()) if failure.code is not None]
    if explained:
        first = explained[0]
        return all_errors().get(first.code or "", TrainingFailedError)(first.message, param=first.param)
    silent = [rank for rank in lost if rank not in failures]
    if silent:
        codes = {rank: ranks[rank].exit_code() for rank in silent}
        killed = [rank for rank, code in codes.items() if code == -signal.SIGKILL]
        if killed:
            return OutOfMemoryError(
                f"The training process of device {killed[0]} was killed, probably because memory had run out."
            )
        for rank in silent:
            if words := last_memory_words(ranks[rank].last_words()):
                return OutOfMemoryError(f"The training process of device {rank} got no memory ({words}).")
        gone = silent[0]
        return DeviceLostError(
            f"The training process of device {gone} ended without a word (exit code {codes[gone]}), "
            "and so the others were ended too. The run can be resumed from its last checkpoint."
        )
    message = failures[min(failures)].message if failures else "no reason was given"
    return TrainingFailedError(f"Training over {len(ranks)} devices failed: {message}")


def _environment(rank: int, size: int, port: int, *, is_cpu: bool) -> dict[str, str]:
    found = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_cpu:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(asked) if asked.isdigit() else physical_cores()
        found["OMP_NUM_THREADS"] = str(max(1, threads // size))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
