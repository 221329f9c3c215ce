"""Curves: TensorBoard, a JSONL file beside it, and Weights & Biases where it is asked for and installed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from hashlib import sha256
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sage.tools.finetune.callbacks import (
    CallbackList,
    Evaluation,
    GeneratedAnswer,
    StepMetrics,
    TrainingCallback,
)
from sage.tools.finetune.outputs import OutputLayout
from sage_contracts.config import TrainingConfig
from sage_contracts.home import write_whole

_METRICS = "metrics.jsonl"
_RECORD = "curve"
"""The name of the folder that the run of these checkpoints writes its curve to."""


class CurveWriter(TrainingCallback):
    """Writes below `<logs>/run-<time>`, one folder per run, so that versions do not share a curve."""

    def __init__(
        self, layout: OutputLayout, config: TrainingConfig, resumed_step: int, tell: TrainingCallback
    ) -> None:
        # Beside the checkpoints, which a younger run of the folder puts aside or deletes.
        record = layout.checkpoints / _RECORD
        known = _recorded(record, layout.logs) if resumed_step else None
        self.folder = known or _fresh(layout.logs)
        self._every = config.logging_steps
        self._step = resumed_step
        self._evaluated_step: int | None = None
        self._tell = tell
        self._has_warned = False
        if known is None:
            with self._despite_a_full_disk():
                write_whole(record, self.folder.name)
        self._metrics = self.folder / _METRICS
        if resumed_step:
            with self._despite_a_full_disk():
                _forget_after(resumed_step, self._metrics)
        self._lines = self._metrics.open("a", encoding="utf-8")
        has_board = "tensorboard" in config.report_to
        self._board = _tensorboard(self.folder, resumed_step + 1) if has_board else None
        self._wandb = _wandb(self.folder, config, tell) if "wandb" in config.report_to else None
        if self._wandb is not None:
            # Its own count of steps takes nothing for one that is past; ours goes back at times.
            self._wandb.define_metric("step", hidden=True)
            self._wandb.define_metric("*", step_metric="step")

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step <= self._step:
            self._take_back(metrics.step)
        self._step = metrics.step
        if metrics.step % self._every and metrics.step != metrics.total_steps:
            return
        values = {
            "train/loss": metrics.loss,
            "train/learning_rate": metrics.lr,
            "train/tokens_per_second": metrics.tokens_per_second,
            "train/epoch": metrics.epoch,
        }
        if metrics.token_accuracy is not None:
            values["train/token_accuracy"] = metrics.token_accuracy
        self._write(values, metrics.step)

    def on_eval(self, evaluation: Evaluation) -> None:
        is_told = evaluation.step < self._step or evaluation.step == self._evaluated_step
        if evaluation.name == "tuned" and is_told:
            return  # when it was measured; TensorBoard drops what is later than a figure that comes again
        self._evaluated_step = evaluation.step
        # The base's loss is the tuned model's at step 0: one curve shows both.
        values = {"eval/loss": evaluation.loss}
        if evaluation.token_accuracy is not None and evaluation.perplexity is not None:
            values |= {
                "eval/perplexity": evaluation.perplexity,
                "eval/token_accuracy": evaluation.token_accuracy,
            }
        self._write(values, evaluation.step)

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        with self._despite_a_full_disk():
            said = [asdict(answer) for answer in answers]
            print(json.dumps({"step": step, "answers": said}), file=self._lines, flush=True)
            if self._board is not None:
                for index, answer in enumerate(answers):
                    text = f"**{answer.prompt}**\n\n{answer.answer}"
                    self._board.add_text(f"answers/{index}", text, step)
            if self._wandb is not None:
                texts = {f"answers/{index}": answer.answer for index, answer in enumerate(answers)}
                self._wandb.log({"step": step, **texts})

    def close(self) -> None:
        for closing in (self._lines, self._board):
            with self._despite_a_full_disk():
                if closing is not None:
                    closing.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, values: dict[str, float], step: int) -> None:
        with self._despite_a_full_disk():
            print(json.dumps({"step": step, **values}), file=self._lines, flush=True)
            if self._board is not None:
                for tag, value in values.items():
                    self._board.add_scalar(tag, value, step)
                self._board.flush()  # people watch while it trains
            if self._wandb is not None:
                self._wandb.log({"step": step, **values})

    def _take_back(self, step: int) -> None:
        """The run went back: `step` and those after it are taken again. Weights & Biases only ever adds."""
        with self._despite_a_full_disk():
            _forget_after(step - 1, self._metrics)
            lines, self._lines = self._lines, self._metrics.open("a", encoding="utf-8")
            lines.close()
        if self._board is not None:
            with self._despite_a_full_disk():
                self._board.close()
            with self._despite_a_full_disk():
                self._board = _tensorboard(self.folder, step)

    @contextmanager
    def _despite_a_full_disk(self) -> Iterator[None]:
        """A run does not end for the sake of a curve; its checkpoints tell when there is no room for them."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._tell.on_log("warn", f"The curves in {self.folder} have gaps: {error}")


@contextmanager
def curves(
    layout: OutputLayout, config: TrainingConfig, resumed_step: int, tell: TrainingCallback
) -> Iterator[CallbackList]:
    """`tell` with a curve writer beside it, closed at the end."""
    writer = CurveWriter(layout, config, resumed_step, tell)
    try:
        yield CallbackList((tell, writer))
    finally:
        writer.close()


def _recorded(record: Path, logs: Path) -> Path | None:
    """The folder of the run that is resumed; None where it is gone, or an older version left no record."""
    try:
        folder = logs / record.read_text(encoding="utf-8")
    except OSError:
        return None
    return folder if folder.is_dir() else None


def _fresh(logs: Path) -> Path:
    """A new folder for a run. Raises: OSError."""
    logs.mkdir(parents=True, exist_ok=True)
    folder = first = logs / f"run-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    folder.mkdir()
    return folder


def _forget_after(step: int, metrics: Path) -> None:
    """Steps that are taken again would be there twice; and a line may be half written, of a killed run."""
    if not metrics.is_file():
        return
    kept = [line for line, read in _whole_lines(metrics) if read["step"] <= step]
    write_whole(metrics, "".join(f"{line}\n" for line in kept))


def _whole_lines(metrics: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        yield line, read


def recorded_figures(layout: OutputLayout) -> Iterator[dict[str, Any]]:
    """What the run of these checkpoints has written of its curve so far: each a `step` and its figures.

    Raises: OSError.
    """
    folder = _recorded(layout.checkpoints / _RECORD, layout.logs)
    if folder is not None:
        yield from (read for _, read in _whole_lines(folder / _METRICS))


def _tensorboard(folder: Path, next_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=next_step)


def _wandb(folder: Path, config: TrainingConfig, tell: TrainingCallback) -> Any:
    """A run of Weights & Biases; offline where there is no account, None where it is not installed."""
    try:
        import wandb
    except ImportError:
        tell.on_log("warn", "wandb is not installed, so no run is sent there: pip install wandb")
        return None
    settings = wandb.setup().settings
    is_offline = settings.mode == "online" and not _has_account(settings)
    if is_offline:
        tell.on_log(
            "info",
            "Weights & Biases has no key here (WANDB_API_KEY, or `wandb login`), so the run is written "
            f"offline. Send it later with: wandb sync {folder}/wandb/offline-run-*",
        )
    about: dict[str, Any] = {
        "project": config.wandb_project or settings.project or "sage-finetune",
        "entity": config.wandb_entity,
        "name": config.wandb_run_name,
        "tags": config.wandb_tags or None,
        "dir": str(folder),
        "config": config.model_dump(mode="json"),
        # It would put itself in front of standard output, which carries the trainer's protocol.
        "settings": wandb.Settings(console="off", silent=True),
    }
    if is_offline or settings.mode != "online":
        return wandb.init(mode="offline" if is_offline else None, **about)
    try:
        # One run for all attempts at it: they write into one folder.
        run_id = sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        return wandb.init(id=run_id, resume="allow", **about)
    except wandb.Error as error:
        tell.on_log("warn", f"Weights & Biases cannot be reached ({error}), so the run is written offline")
        return wandb.init(mode="offline", **about)


def _has_account(settings: Any) -> bool:
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        host = urlsplit(settings.base_url).hostname or ""
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
