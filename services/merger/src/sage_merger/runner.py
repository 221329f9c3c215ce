"""One merge, from the doorbell to the finish: what its child says, and how its end is worded."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from sage.tools.finetune.hardware import physical_cores
from sage_contracts.errors import OutOfMemoryError, TrainingFailedError
from sage_contracts.workers import MergeClaim, MergeFinish, MergeReport, Outcome
from sage_merger.folders import folder_of, remove_leftovers
from sage_merger.messages import (
    CHILD_MESSAGE,
    ChildMessage,
    ChildSpec,
    DoneMessage,
    FailedMessage,
    PhaseMessage,
)
from sage_merger.settings import MergerSettings
from sage_servicekit.attempt import Attempt, Ending, Post, Runner
from sage_servicekit.children import Child, computing_env, describe_exit


@dataclass(frozen=True)
class MergerPost(Post):
    settings: MergerSettings


class MergeRunner(Runner[MergeClaim]):
    noun = "merge"
    claim_type = MergeClaim
    _post: MergerPost

    def _attempt(self, claimed: MergeClaim) -> None:
        MergeAttempt(self._post, claimed).run()


class MergeAttempt(Attempt[MergeClaim, ChildMessage]):
    worker = "merger"
    noun = "merge"
    verb = "merge"
    messages = CHILD_MESSAGE
    _post: MergerPost

    def __init__(self, post: MergerPost, claimed: MergeClaim) -> None:
        super().__init__(post, claimed, claimed.merge_id, stop_grace_s=post.settings.merge_stop_grace_s)
        self._phase = self._told_phase = "starting"
        self._words: DoneMessage | FailedMessage | None = None

    def _work(self) -> Ending:
        home = self._post.settings.home
        end = self._run_child(ChildSpec(home=str(home.root), claim=self._claim))
        if not self._is_lost:
            remove_leftovers(home.resolve(self._claim.output_dir) / folder_of(self._claim))
        return self._ending_of(end.exit_code)

    def _spawn(self, spec_path: Path) -> Child:
        settings = self._post.settings
        env = computing_env(settings.home.root, settings.merge_threads or physical_cores())
        env["CUDA_VISIBLE_DEVICES"] = ""
        return Child([*settings.merge_child_command, str(spec_path)], log_path=self._log_path, env=env)

    def _take_in(self, message: ChildMessage) -> None:
        if isinstance(message, PhaseMessage):
            self._phase = message.text
        else:
            self._words = message

    @property
    def _is_urgent(self) -> bool:
        return self._phase != self._told_phase

    def _send_news(self) -> None:
        self._told_phase = self._phase
        report = MergeReport(worker_id=self._post.worker_id, attempt=self._claim.attempt, phase=self._phase)
        self._post.link.tell(f"{self._path}/events", report)

    def _ending_of(self, exit_code: int) -> Ending:
        words = self._words
        if isinstance(words, DoneMessage) and exit_code == 0:
            return Ending(Outcome.SUCCEEDED)
        if self._post.stopping.is_set():
            return Ending(Outcome.RELEASED)
        if isinstance(words, FailedMessage):
            message = words.message if words.is_explained else self._with_log(words.message)
            return Ending(Outcome.FAILED, words.code, message)
        how = describe_exit(exit_code)
        if exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            message = (
                f"The merging process was killed ({how}): almost always the machine or the container ran out "
                "of memory. The check of a merge loads the whole model: give it more memory, and try again."
            )
            return Ending(Outcome.FAILED, OutOfMemoryError.code, self._with_log(message))
        message = f"The merging process ended without a result ({how})."
        return Ending(Outcome.FAILED, TrainingFailedError.code, self._with_log(message))

    def _finish_of(self, ending: Ending) -> MergeFinish:
        finish = MergeFinish.model_validate(
            {
                "worker_id": self._post.worker_id,
                "attempt": self._claim.attempt,
                "outcome": ending.outcome.value,
                "error_code": ending.error_code,
                "error_message": ending.error_message,
            }
        )
        if ending.outcome is Outcome.SUCCEEDED and isinstance(self._words, DoneMessage):
            finish.merged_path = self._words.merged_path
            finish.meta = self._words.meta
        return finish
