"""`LoRATrainer(config).train()`: from a config to a tuned adapter in its folder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage.tools.finetune.base_models import resolve_base
from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import CallbackList, ConsoleProgress, StopMode, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.climbing import Climb, forget_rungs, free_memory
from sage.tools.finetune.comparison import Comparison
from sage.tools.finetune.distributed.messages import RankSpec
from sage.tools.finetune.distributed.ranks import run_ranks, spread_here
from sage.tools.finetune.distributed.team import ALONE, Team
from sage.tools.finetune.evaluation import HeldOut, RunStopped, Scores
from sage.tools.finetune.hardware import has_cuda, wait_politely
from sage.tools.finetune.loop import TrainingLoop
from sage.tools.finetune.losses import LossFunction
from sage.tools.finetune.outputs import OutputLayout
from sage.tools.finetune.registry import Registry
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.run_record import Metrics, RunRecord, score_metrics
from sage.tools.finetune.storage import storage_errors
from sage.tools.finetune.task_data import Splits, prepare
from sage.tools.finetune.tracking import curves
from sage_contracts.config import OomRung, TrainingConfig
from sage_contracts.errors import InvalidRequestError


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind. After a stop there is no new adapter, only checkpoints."""

    output_dir: Path
    adapter_dir: Path | None
    stopped: StopMode | None
    base_model: Path
    base_eval_loss: float | None = None
    eval_loss: float | None = None
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    model_dir: Path | None = None
    """With `tuning="full"`, in place of an adapter: a plain model folder."""


TRAINERS: Registry[type[LoRATrainer]] = Registry("trainer", "sage.finetune.trainers")
"""What `config.trainer` names, for jobs of the stack."""


@TRAINERS.register("lora")
class LoRATrainer:
    """Fine-tuning of low-rank adapters, or with `tuning="full"` of all weights.

    On answers, or (`config.method`) on preferences.

    `home` is where base models are kept (default: $SAGE_HOME or ~/.sage). `run_id` ties checkpoints to one
    run: with `resume`, only those of the same run_id, data, base and batch are continued. Without callbacks
    progress is printed; pass `()` for silence. `rungs` of the out-of-memory ladder are taken from the start;
    the run takes more by itself where memory does not suffice.
    """

    def __init__(
        self,
        config: TrainingConfig,
        callbacks: Sequence[TrainingCallback] | None = None,
        *,
        home: Path | None = None,
        training_path: Path | None = None,
        validation_path: Path | None = None,
        resume: bool = False,
        run_id: str | None = None,
        rungs: Sequence[OomRung] = (),
    ) -> None:
        self._config = config
        self._watchers = tuple(callbacks) if callbacks is not None else (ConsoleProgress(),)
        self._home = home or Path(os.environ.get("SAGE_HOME", "~/.sage")).expanduser()
        self._training_path = training_path
        self._validation_path = validation_path
        self._resume = resume
        self._run_id = run_id
        self._rungs = rungs

    def train(self) -> TrainResult:
        """Run to the end, or to where a callback wants it stopped.

        Raises: InvalidDataError, ModelNotFoundError, StorageFullError, OutOfMemoryError, TrainingFailedError.
        """
        try:
            root = self._config.require_output_dir()
        except ValueError as error:
            raise InvalidRequestError(str(error), param="output_dir") from error
        wait_politely()
        tell = CallbackList(self._watchers)
        layout = OutputLayout(root)
        if not self._resume:
            forget_rungs(layout.checkpoints)
        with storage_errors(root):
            climb = Climb(
                self._config, layout.checkpoints, self._run_id, resume=self._resume, taken=self._rungs
            )
            try:
                return climb.survive(
                    lambda config, resume: self._attempt(config, layout, tell, climb, resume=resume),
                    tell,
                )
            finally:
                free_memory()

    def _attempt(
        self, config: TrainingConfig, layout: OutputLayout, tell: CallbackList, climb: Climb, *, resume: bool
    ) -> TrainResult:
        spread = spread_here(config, self._home)
        if spread.ranks == 1:
            return _run_kind(config)(self, config, layout, tell, climb, resume=resume).go()
        spec = RankSpec(
            self._config, climb.taken, self._home, self._training_path, self._validation_path, resume,
            self._run_id, is_cpu=not has_cuda(), is_sharded=spread.kind == "fsdp",
        )  # fmt: skip
        tell.on_log("info", f"{spread.ranks} devices with {spread.kind}: {spread.why}")
        return run_ranks(spec, spread.ranks, tell, climb)


def _run_kind(config: TrainingConfig) -> type[Run]:
    if config.method == "sft":
        return Run
    from sage.tools.finetune.preferences.run import PreferenceRun

    return PreferenceRun


class Run:
    """One call of `train`: the parts in the order they happen."""

    team: Team = ALONE
    """The processes that train together; the first of them writes and tells."""
    load_on: str | None = None
    """Where the base is loaded to; None: where it trains."""

    def __init__(
        self,
        trainer: LoRATrainer,
        config: TrainingConfig,
        layout: OutputLayout,
        tell: CallbackList,
        climb: Climb,
        *,
        resume: bool,
    ) -> None:
        self._t = trainer
        self._config = config
        self._climb = climb
        self._resume = resume
        self._layout = layout
        self._tell = tell
        self._began = time.monotonic()

    def go(self) -> TrainResult:
        config, tell = self._config, self._tell
        tell.on_phase("data", "Preparing the rows")
        splits = self._prepare()
        tell.on_log("info", f"Data: {splits.description}")
        tell.on_phase("base_model", config.model_name)
        base = resolve_base(config.model_name, self._t._home, lambda message: tell.on_log("info", message))
        if not self._resume:
            self._clear_checkpoints()
        try:
            return self._train(splits, base)
        except RunStopped as stop:
            return TrainResult(self._layout.root, None, stop.mode, base)

    def _clear_checkpoints(self) -> None:
        """Delete those of an earlier run, once it is known that this one can begin."""
        self._checkpoints({}).clear()
        self._climb.owns_checkpoints = True

    def _prepare(self) -> Splits:
        return prepare(
            self._config, training_path=self._t._training_path, validation_path=self._t._validation_path
        )

    def _train(self, splits: Any, base: Path) -> TrainResult:
        config, tell, layout = self._config, self._tell, self._layout
        tell.on_phase("loading", f"Loading {config.model_name}")
        parts = RunParts(config, base, tell, self._climb.taken, load_on=self.load_on)
        train, held, left = parts.render(splits)
        splits.let_go()
        schedule = self._schedule(len(train), left)
        checkpoints = self._checkpoints(self._fingerprint(splits, base, schedule))
        state = self._starting_state(checkpoints, parts)
        self.team.begin(parts.model, parts.optimizer)
        loss = self._loss(parts, train)
        layout.write_config(config)
        with curves(layout, config, state.step, tell) as told:
            measure = HeldOut(
                parts.model, parts.tokenizer, loss, held, config.sample_prompts, parts.eval_token_budget,
                told, self.team,
            )  # fmt: skip
            comparison = Comparison(config, measure)
            has_waiting_base = comparison.measure_base_at_once(state)
            told.on_phase("training", f"{schedule.total_steps} steps of {config.effective_batch_size} rows")
            loop = TrainingLoop(
                parts.model, loss, parts.optimizer, train, schedule, config, parts.token_budget, told,
                checkpoints, state, parts.device, measure, parts.restart,
                rows_at_once=parts.rows_at_once, scaler=parts.scaler, team=self.team,
                measure_base=comparison.measure_bare if has_waiting_base else None,
            )  # fmt: skip
            stopped, state = loop.run(), loop.state
            if stopped:
                return TrainResult(layout.root, None, stopped, base, state.base_eval_loss)
            told.on_phase("eval", f"Held-out loss of the tuned model on {len(held)} rows")
            tuned = comparison.settle(checkpoints, state)
        tell.on_phase("saving", str(layout.root))
        metrics = self._metrics(state, schedule, tuned, loop)
        meta = self._record(parts, base, splits).meta(
            metrics, train_rows=len(train), held_out_rows=len(held), loss_name=loss.name
        )
        meta["rollbacks"] = state.rollbacks
        weights = layout.write_result(self.team.whole(parts.model), parts.tokenizer, config, meta)
        adapter, model = (weights, None) if config.tuning == "lora" else (None, weights)
        return TrainResult(
            layout.root, adapter, None, base, state.base_eval_loss, metrics["eval_loss"], metrics, meta, model
        )

    def _schedule(self, rows: int, left: int) -> Schedule:
        config = self._config
        return Schedule(
            rows, config.effective_batch_size, config.num_train_epochs, config.max_steps, config.seed, left
        )

    def _loss(self, parts: RunParts, train: Sequence[Sample]) -> LossFunction:
        return parts.loss(train)

    def _checkpoints(self, fingerprint: dict[str, Any]) -> Checkpoints:
        return Checkpoints(self._layout.checkpoints, fingerprint)

    def _starting_state(self, checkpoints: Checkpoints, parts: RunParts) -> RunState:
        if not self._resume:
            return RunState()
        newest = checkpoints.newest_whole(lambda message: self._tell.on_log("warn", message))
        if newest is None:
            checkpoints.clear()  # of no use to this run, and in the way of its own
            return RunState()
        state = checkpoints.restore(newest, parts.model, parts.optimizer, parts.scaler)
        self._tell.on_log("info", f"Resuming after step {state.step}")
        return state

    def _fingerprint(self, splits: Any, base: Path, schedule: Schedule) -> dict[str, Any]:
        # Rows that lose their whole answer are left out, and the ladder goes on from the same checkpoints.
        is_cut = "halve_max_length" in self._climb.taken
        steps = {} if is_cut else {"total_steps": schedule.total_steps}
        return {
            "run_id": self._t._run_id,
            "data_sha256": splits.fingerprint(),
            "base": base.name,
            "batch_rows": schedule.batch_rows,
            **steps,
            # As asked for: what the out-of-memory ladder changes goes on from the same checkpoints.
            "max_length": self._t._config.max_length,
            "seed": self._config.seed,
            "lora": self._config.lora.model_dump(mode="json"),
            "tuning": self._config.tuning,
        }

    def _record(self, parts: RunParts, base: Path, splits: Any) -> RunRecord:
        return RunRecord(self._config, self._t._home, base, splits, parts, self._climb.rungs, self.team.size)

    def _metrics(
        self, state: RunState, schedule: Schedule, tuned: Scores | None, loop: TrainingLoop
    ) -> Metrics:
        last = loop.last_metrics
        return {
            "steps": state.step,
            "total_steps": schedule.total_steps,
            "epochs": round(schedule.epoch_of(state.step), 4),
            "train_loss": state.train_loss,
            "result_step": state.kept_step or state.step,
            **score_metrics("base_", state.base_eval_loss, state.base_token_accuracy),
            **score_metrics("", tuned.loss if tuned else None, tuned.token_accuracy if tuned else None),
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": last.tokens_per_second if last else None,
            "peak_memory_bytes": last.peak_memory_bytes if last else None,
            "wall_s": round(time.monotonic() - self._began, 2),
        }
