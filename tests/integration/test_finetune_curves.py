"""Curves are written beside a run, which does not depend on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from sage.tools.finetune import Evaluation, GeneratedAnswer, StepMetrics, TrainingCallback, TrainingConfig
from sage.tools.finetune.outputs import OutputLayout
from sage.tools.finetune.tracking import CurveWriter

GOES_BACK = """
import sys
from pathlib import Path
from sage.tools.finetune import Evaluation, GeneratedAnswer, StepMetrics, TrainingCallback, TrainingConfig
from sage.tools.finetune.outputs import OutputLayout
from sage.tools.finetune.tracking import CurveWriter

config = TrainingConfig(report_to=["tensorboard", "wandb"])
layout, reached, again_from, last = OutputLayout(Path(sys.argv[1])), *map(int, sys.argv[2:])
curves = CurveWriter(layout, config, 0, TrainingCallback())
def step(number, loss):
    curves.on_step(StepMetrics(number, 9, loss, 1e-4, 100.0, 1.0, 0.5, 0, 100, 0.5))
step(1, 1.0)
curves.on_eval(Evaluation("base", 0, 2.5))
for number in range(2, reached + 1):
    step(number, float(number))
curves.on_eval(Evaluation("step", reached, 9.0))
curves.on_answers(reached, [GeneratedAnswer("Why?", "Noise."), GeneratedAnswer("How?", "Noise.")])
for number in range(again_from, last + 1):
    step(number, 100.0 + number)
curves.on_eval(Evaluation("step", last, 1.5))
curves.on_answers(last, [GeneratedAnswer("Why?", "So."), GeneratedAnswer("How?", "Thus.")])
curves.close()
"""
"""Takes steps up to the first number, and then those from the second to the third."""


class Warned(TrainingCallback):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_log(self, level: Literal["info", "warn", "error"], message: str) -> None:
        self.messages.append(message)


def test_a_full_disk_leaves_gaps_and_does_not_end_the_run(tmp_path: Path) -> None:
    warned = Warned()
    first = CurveWriter(OutputLayout(tmp_path), TrainingConfig(report_to=[]), 0, warned)
    first.close()
    (first.folder / "metrics.jsonl").unlink()
    (first.folder / "metrics.jsonl").symlink_to("/dev/full")
    curves = CurveWriter(OutputLayout(tmp_path), TrainingConfig(report_to=[]), 1, warned)
    curves.on_eval(Evaluation("step", 2, 1.5))
    curves.on_answers(2, [GeneratedAnswer("Why?", "So.")])
    curves.close()
    assert len(warned.messages) == 1
    assert "have gaps: [Errno 28] No space left on device" in warned.messages[0]


def test_a_resumed_run_has_each_step_once_in_its_curve(tmp_path: Path) -> None:
    config = TrainingConfig(report_to=[])
    first = CurveWriter(OutputLayout(tmp_path), config, 0, Warned())
    first.on_eval(Evaluation("base", 0, 2.5))
    for step in (1, 2, 3):
        first.on_eval(Evaluation("step", step, 2.0))
    first.close()
    curve = first.folder / "metrics.jsonl"
    curve.write_text(curve.read_text() + '{"step": 4, "eval/lo')  # killed here
    again = CurveWriter(OutputLayout(tmp_path), config, 2, Warned())
    again.on_eval(Evaluation("step", 3, 1.0))
    again.close()
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    assert [(line["step"], line["eval/loss"]) for line in lines] == [(0, 2.5), (1, 2.0), (2, 2.0), (3, 1.0)]


def test_a_resumed_run_goes_on_with_its_own_curve_and_leaves_a_younger_runs(tmp_path: Path) -> None:
    layout, config = OutputLayout(tmp_path), TrainingConfig(report_to=[])
    older = written(CurveWriter(layout, config, 0, Warned()), (1, 2, 3))
    checkpoints = layout.checkpoints.rename(tmp_path / "aside")  # it is paused
    younger = written(CurveWriter(layout, config, 0, Warned()), range(1, 9))
    before = younger.read_bytes()
    shutil.rmtree(layout.checkpoints)
    checkpoints.rename(layout.checkpoints)
    again = written(CurveWriter(layout, config, 2, Warned()), (3, 4))
    assert younger.read_bytes() == before
    assert again == older
    assert [json.loads(line)["step"] for line in older.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_resumed_run_that_does_not_know_its_curve_begins_one(tmp_path: Path) -> None:
    layout, config = OutputLayout(tmp_path), TrainingConfig(report_to=[])
    others = written(CurveWriter(layout, config, 0, Warned()), (1, 2, 3))
    before = others.read_bytes()
    shutil.rmtree(layout.checkpoints)
    own = written(CurveWriter(layout, config, 1, Warned()), (2,))
    assert own != others
    assert others.read_bytes() == before


def written(curves: CurveWriter, steps: Iterable[int]) -> Path:
    """The file with an evaluation at each of these steps."""
    for step in steps:
        curves.on_eval(Evaluation("step", step, 2.0))
    curves.close()
    return curves.folder / "metrics.jsonl"


@pytest.fixture(scope="module", params=[(6, 4, 9), (3, 1, 4)], ids=["part of the way", "to the start"])
def gone_back(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(a run's folder, the loss of each of its steps, the steps taken before it went back)"""
    reached, again_from, last = request.param
    output = tmp_path_factory.mktemp("output")
    done = subprocess.run(
        [sys.executable, "-c", GOES_BACK, str(output), *map(str, request.param)],
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = output.glob("logs/run-*")
    kept = [(step, float(step)) for step in range(1, again_from)]
    return run, kept + [(step, 100.0 + step) for step in range(again_from, last + 1)], reached


def test_metrics_have_steps_that_are_taken_again_once(gone_back: Any) -> None:
    run, steps, _ = gone_back
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] == steps
    last = steps[-1][0]
    measured = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    assert measured == [(0, 2.5), (last, 1.5)]
    assert [line["step"] for line in lines if "answers" in line] == [last]


def test_tensorboard_shows_steps_that_are_taken_again_once(gone_back: Any) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    run, steps, _ = gone_back
    shown = EventAccumulator(str(run)).Reload()

    def points(tag: str) -> list[tuple[int, Any]]:
        return [(point.step, make_ndarray(point.tensor_proto).item()) for point in shown.Tensors(tag)]

    last = steps[-1][0]
    assert points("train/loss") == steps
    assert points("eval/loss") == [(0, 2.5), (last, 1.5)]
    assert points("answers/1/text_summary") == [(last, b"**How?**\n\nThus.")]


def test_wandb_takes_steps_again(gone_back: Any) -> None:
    """It takes nothing back, so what was before stays beside them."""
    run, steps, reached = gone_back
    (written,) = run.glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(written.read_bytes()))
    axes = {one.metric.glob_name: one.metric.step_metric for one in records if one.HasField("metric")}
    assert axes["*"] == "step"
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in one.history.item}
        for one in records
        if one.HasField("history")
    ]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    again = [(step, loss) for step, loss in steps if loss > 100]
    assert losses == [(step, float(step)) for step in range(1, reached + 1)] + again
    last = steps[-1][0]
    measured = [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    assert measured == [(0, 2.5), (reached, 9.0), (last, 1.5)]
    said = [(row["step"], row["answers/0"], row["answers/1"]) for row in rows if "answers/0" in row]
    assert said == [(reached, "Noise.", "Noise."), (last, "So.", "Thus.")]


def wandb_records(content: bytes) -> Iterator[Any]:
    """Of a file that `wandb sync` sends: records in parts, none of which crosses the end of a block."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""  # after the file's own header
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, part = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # all of it, or the last part
            yield Record.FromString(whole)
            whole = b""


def at_step(step: int) -> StepMetrics:
    return StepMetrics(step, 9, float(step), 1e-4, 100.0, 1.0, 0.5, 0, 100, 0.5)


def test_a_run_that_goes_back_to_between_two_written_steps_has_each_once(tmp_path: Path) -> None:
    curves = CurveWriter(OutputLayout(tmp_path), TrainingConfig(report_to=[], logging_steps=5), 0, Warned())
    for step in (*range(1, 7), *range(4, 10)):
        curves.on_step(at_step(step))
    curves.close()
    lines = (curves.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 9]


@pytest.mark.parametrize("kept", [2, 3, 4])
def test_the_results_figures_are_told_where_they_were_measured_and_once(tmp_path: Path, kept: int) -> None:
    curves = CurveWriter(OutputLayout(tmp_path), TrainingConfig(report_to=[]), 0, Warned())
    curves.on_eval(Evaluation("base", 0, 2.5))
    for step in (1, 2, 3, 4):
        curves.on_step(at_step(step))
        if step in (2, 3):
            curves.on_eval(Evaluation("step", step, float(step)))
    curves.on_eval(Evaluation("tuned", kept, float(kept)))  # of an earlier step, where that was the best
    curves.close()
    lines = [json.loads(line) for line in (curves.folder / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    assert measured == [(0, 2.5), (2, 2.0), (3, 3.0), *([(4, 4.0)] if kept == 4 else [])]


def test_a_run_whose_curves_were_deleted_goes_back_all_the_same(tmp_path: Path) -> None:
    warned = Warned()
    curves = CurveWriter(OutputLayout(tmp_path), TrainingConfig(report_to=[]), 0, warned)
    curves.on_step(at_step(1))
    shutil.rmtree(curves.folder)
    curves.on_step(at_step(1))
    curves.on_step(at_step(2))
    curves.close()
    assert len(warned.messages) == 1
    assert "have gaps" in warned.messages[0]
