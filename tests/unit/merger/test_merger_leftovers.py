"""What a merging child had begun to write when it was killed: a whole model, in a folder that nobody sees."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from pydantic import BaseModel

from sage_contracts.errors import NotYoursError, SageError
from sage_contracts.workers import MergeClaim, MergeFinish, MergeReport
from sage_merger.runner import MergeAttempt, MergerPost
from sage_merger.settings import MergerSettings
from sage_servicekit.machine import Device
from sage_servicekit.worker import OrchestratorLink

BEGINS = """
import json, os, signal, sys
from pathlib import Path
signal.alarm(20)  # so that a test fails and does not hang
spec = json.loads(Path(sys.argv[1]).read_text())
begun = Path(spec["home"]) / spec["claim"]["output_dir"] / ".merged_model.x1"
begun.mkdir(parents=True)
(begun / "model.safetensors").write_bytes(b"half of it")
print('{"kind": "phase", "text": "writing"}', flush=True)
"""
DIES = f"{BEGINS}os.kill(os.getpid(), signal.SIGKILL)"
WRITES_ON = f"{BEGINS}signal.pause()"


class Hearing(OrchestratorLink):
    """Keeps how attempts ended; `refusal` is the answer to whoever reports that it writes."""

    def __init__(self, settings: MergerSettings, refusal: SageError | None) -> None:
        super().__init__(settings)
        self.finishes: list[MergeFinish] = []
        self._refusal = refusal

    def _send(self, path: str, message: BaseModel) -> bytes:
        if isinstance(message, MergeFinish):
            self.finishes.append(message)
        elif isinstance(message, MergeReport) and message.phase == "writing" and self._refusal is not None:
            raise self._refusal
        return b"{}"


def attempted(home: Path, code: str, refusal: SageError | None = None) -> list[MergeFinish]:
    """How the attempt ended whose child is this program."""
    settings = MergerSettings(home_dir=home, merge_child_command=[sys.executable, "-c", code])
    link = Hearing(settings, refusal)
    claim = MergeClaim(
        merge_id="merge-1", attempt=1, lease_s=60, name="code", version=1, base_model="base",
        adapter_path="adapter", output_dir="finetune_output/code/versions/1",
    )  # fmt: skip
    MergeAttempt(MergerPost(settings, link, "merger-1", Device("cpu", 1), threading.Event()), claim).run()
    return link.finishes


def test_what_a_killed_child_had_begun_goes_with_it(tmp_path: Path) -> None:
    version = tmp_path / "finetune_output/code/versions/1"
    (version / "merged_model").mkdir(parents=True)
    (finish,) = attempted(tmp_path, DIES)
    assert signal.SIGKILL.name in (finish.error_message or "")
    assert sorted(path.name for path in version.iterdir()) == ["logs", "merged_model"]


def test_what_may_be_somebody_elses_by_now_stays(tmp_path: Path) -> None:
    assert attempted(tmp_path, WRITES_ON, NotYoursError("another merger has it")) == []
    assert (tmp_path / "finetune_output/code/versions/1/.merged_model.x1").is_dir()
