"""Curves are written beside a run, which does not depend on them."""

from __future__ import annotations

import json
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


def test_a_resumed_run_has_each_step_once_in_its_curve(tmp_path: Path) -> None:
    config = TrainingConfig(report_to=[])
    first = CurveWriter(tmp_path, config, 0, Warned())
    first.on_eval(Evaluation("base", 0, 2.5))
    for step in (1, 2, 3):
        first.on_eval(Evaluation("step", step, 2.0))
    first.close()
    curve = first.folder / "metrics.jsonl"
    curve.write_text(curve.read_text() + '{"step": 4, "eval/lo')  # killed here
    again = CurveWriter(tmp_path, config, 2, Warned())
    again.on_eval(Evaluation("step", 3, 1.0))
    again.close()
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    assert [(line["step"], line["eval/loss"]) for line in lines] == [(0, 2.5), (1, 2.0), (2, 2.0), (3, 1.0)]
