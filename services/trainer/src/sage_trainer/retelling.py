"""What an earlier attempt has left on the disk, told once more: of a worker that died its news died too."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sage.tools.finetune.callbacks import Evaluation
from sage.tools.finetune.checkpoints import written_checkpoints
from sage.tools.finetune.outputs import OutputLayout
from sage.tools.finetune.tracking import recorded_figures
from sage_trainer.messages import StepMessage
from sage_trainer.telling import Telling


def retell(output_dir: Path, told_step: int | None, tell: Telling) -> None:
    """Tell of the checkpoints that there are to go on from, and of the steps between `told_step` and them.

    Later steps are taken again. None: nobody knows what was told, and no step is told twice.
    """
    layout = OutputLayout(output_dir)
    checkpoints = list(written_checkpoints(layout.checkpoints))
    if checkpoints and told_step is not None:
        with suppress(OSError):  # the curve is gone, or cannot be read: the run does not need it
            _retell_steps(layout, told_step, checkpoints[-1].step, tell)
    for checkpoint in checkpoints:
        tell.on_earlier_checkpoint(checkpoint)


def _retell_steps(layout: OutputLayout, told_step: int, last_step: int, tell: Telling) -> None:
    for figures in recorded_figures(layout):
        step = figures["step"]
        if not told_step < step <= last_step:
            continue
        if "eval/loss" in figures:
            tell.on_eval(Evaluation("step", step, figures["eval/loss"], figures.get("eval/token_accuracy")))
        elif "train/loss" in figures:
            tell.say(
                StepMessage(
                    step=step,
                    loss=figures["train/loss"],
                    epoch=figures.get("train/epoch"),
                    learning_rate=figures.get("train/learning_rate"),
                    train_token_accuracy=figures.get("train/token_accuracy"),
                    is_repeated=True,
                )
            )
