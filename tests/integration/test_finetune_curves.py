"""Curves are written beside a run, which does not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sage.tools.finetune import Evaluation, GeneratedAnswer, TrainingCallback, TrainingConfig
from sage.tools.finetune.tracking import CurveWriter


class Warned(TrainingCallback):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_log(self, level: Literal["info", "warn", "error"], message: str) -> None:
        self.messages.append(message)


def test_a_full_disk_leaves_gaps_and_does_not_end_the_run(tmp_path: Path) -> None:
    warned = Warned()
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    curves = CurveWriter(tmp_path, TrainingConfig(report_to=[]), 1, warned)  # goes on with run-1
    curves.on_eval(Evaluation("step", 2, 1.5))
    curves.on_answers(2, [GeneratedAnswer("Why?", "So.")])
    curves.close()
    assert len(warned.messages) == 1
    assert "have gaps: [Errno 28] No space left on device" in warned.messages[0]
