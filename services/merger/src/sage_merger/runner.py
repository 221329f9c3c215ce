"""One merge, from doorbell to finish: claim it, spawn its child, renew the lease, say how it ended."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import dataclass

from pydantic import ValidationError

from sage.tools.finetune.hardware import physical_cores
from sage_contracts.errors import (
    NotFoundError,
    NotYoursError,
    OutOfMemoryError,
    SageError,
    TrainingFailedError,
)
from sage_contracts.home import write_whole
from sage_contracts.workers import ClaimRequest, MergeClaim, MergeFinish, MergeReport
from sage_merger.messages import CHILD_MESSAGE, ChildSpec, DoneMessage, FailedMessage, PhaseMessage
from sage_merger.settings import MergerSettings
from sage_servicekit.children import Child, describe_exit, tail
from sage_servicekit.machine import total_memory_bytes
from sage_servicekit.worker import OrchestratorLink, claim, until_accepted

logger = logging.getLogger(__name__)

_WAKE_S = 0.25


@dataclass(frozen=True)
class Post:
    """Where this worker stands: what every merge of it needs."""

    settings: MergerSettings
    link: OrchestratorLink
    worker_id: str
    stopping: threading.Event


class MergeRunner:
    """Answers doorbells, one at a time."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self.current_merge: str | None = None

    def run(self, merge_id: str) -> None:
        """Merge if it can be claimed; return when the attempt is over or not ours."""
        post = self._post
        claimed = claim(
            post.link,
            f"/internal/merges/{merge_id}/claim",
            ClaimRequest(worker_id=post.worker_id, device_total_bytes=total_memory_bytes()),
            MergeClaim,
            stopping=post.stopping,
            patience_s=post.settings.claim_patience_s,
        )
        if claimed is None:
            return
        logger.info("merge %s: attempt %d of %s@%d", merge_id, claimed.attempt, claimed.name, claimed.version)
        self.current_merge = merge_id
        try:
            MergeAttempt(post, claimed).run()
        finally:
            self.current_merge = None


class MergeAttempt:
    """One claimed attempt. Everything happens in `run`, in one thread."""

    def __init__(self, post: Post, claimed: MergeClaim) -> None:
        self._post = post
        self._claim = claimed
        self._path = f"/internal/merges/{claimed.merge_id}"
        self._phase = "starting"
        self._words: DoneMessage | FailedMessage | None = None
        self._is_lost = False
        self._log_path = post.settings.home.resolve(claimed.output_dir) / "logs" / "merge.log"
        self._log_start = 0
        self._interval_s = min(post.settings.report_interval_s, claimed.lease_s / 3)
        self._next_report_at = 0.0

    def run(self) -> None:
        """Spawn, pump, reap, finish: whatever happens between, the child is gone and the end is told."""
        try:
            finish = self._merge()
        except Exception as error:
            logger.exception("merge %s: the attempt broke", self._claim.merge_id)
            finish = self._failed(TrainingFailedError.code, f"The merger could not run the merge: {error!r}")
        if self._is_lost:
            return
        logger.info("merge %s: %s %s", self._claim.merge_id, finish.outcome, finish.error_code or "")
        until_accepted(
            lambda: self._post.link.tell(f"{self._path}/finish", finish),
            f"the finish of {self._claim.merge_id}",
            stopping=self._post.stopping,
            patience_s=self._post.settings.finish_patience_s,
        )

    def _merge(self) -> MergeFinish:
        settings = self._post.settings
        spec_path = settings.home.run / f"merge-{self._claim.merge_id}-{self._claim.attempt}.json"
        write_whole(
            spec_path, ChildSpec(home=str(settings.home.root), claim=self._claim).model_dump_json(indent=1)
        )
        self._log_start = self._log_path.stat().st_size if self._log_path.exists() else 0
        env = {
            **os.environ,
            "SAGE_HOME": str(settings.home.root),
            "OMP_NUM_THREADS": str(settings.merge_threads or physical_cores()),
            "OMP_WAIT_POLICY": "PASSIVE",
            # Merging is never worth a GPU that training or serving may need.
            "CUDA_VISIBLE_DEVICES": "",
        }
        try:
            command = [*settings.merge_child_command, str(spec_path)]
            with Child(command, log_path=self._log_path, env=env) as child:
                self._pump(child)
                exit_code = child.reap()
                while lines := child.receive(0):
                    for line in lines:
                        self._hear(line)
        finally:
            spec_path.unlink(missing_ok=True)
        return self._conclude(exit_code)

    def _pump(self, child: Child) -> None:
        while not child.has_ended():
            for line in child.receive(min(_WAKE_S, self._next_report_at - time.monotonic())):
                self._hear(line)
            if self._post.stopping.is_set():
                child.stop(self._post.settings.merge_stop_grace_s)
            if time.monotonic() >= self._next_report_at:
                self._report(child)

    def _hear(self, line: bytes) -> None:
        try:
            message = CHILD_MESSAGE.validate_json(line)
        except ValidationError:
            logger.warning("the child said what is no message of ours: %.200r", line)
            return
        if isinstance(message, PhaseMessage):
            self._phase = message.text
            self._next_report_at = 0.0
        else:
            self._words = message

    def _report(self, child: Child) -> None:
        report = MergeReport(worker_id=self._post.worker_id, attempt=self._claim.attempt, phase=self._phase)
        try:
            self._post.link.tell(f"{self._path}/events", report)
        except (NotYoursError, NotFoundError) as error:
            logger.warning("merge %s is not ours any more, its child dies: %s", self._claim.merge_id, error)
            self._is_lost = True
            child.kill()
        except SageError as error:
            logger.warning("merging goes on: %s", error)
        self._next_report_at = time.monotonic() + self._interval_s

    def _conclude(self, exit_code: int) -> MergeFinish:
        words = self._words
        if isinstance(words, DoneMessage) and exit_code == 0:
            done = {"merged_path": words.merged_path, "meta": words.meta}
            return self._ended("succeeded").model_copy(update=done)
        if self._post.stopping.is_set():
            return self._ended("released")
        if isinstance(words, FailedMessage):
            message = words.message if words.is_explained else self._with_log(words.message)
            return self._failed(words.code, message)
        how = describe_exit(exit_code)
        if exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            message = (
                f"The merging process was killed ({how}): almost always the machine or the container ran out "
                "of memory. The check of a merge loads the whole model: give it more memory, and try again."
            )
            return self._failed(OutOfMemoryError.code, self._with_log(message))
        message = f"The merging process ended without a result ({how})."
        return self._failed(TrainingFailedError.code, self._with_log(message))

    def _with_log(self, message: str) -> str:
        last_lines = tail(self._log_path, since_byte=self._log_start)
        where = self._post.settings.home.relative(self._log_path)
        return f"{message}\nLast lines of {where}:\n{last_lines}" if last_lines else message

    def _ended(self, outcome: str) -> MergeFinish:
        return MergeFinish.model_validate(
            {"worker_id": self._post.worker_id, "attempt": self._claim.attempt, "outcome": outcome}
        )

    def _failed(self, code: str, message: str) -> MergeFinish:
        return self._ended("failed").model_copy(update={"error_code": code, "error_message": message})
