"""The process that trains: `python -m sage_trainer.child SPEC.json`, or `--wait [BASE]` to be told later.

A child that waits has imported its libraries by then, read the tokenizer of BASE, and done nothing else: no
device is touched, no memory of a job is held. It trains one job like any other and ends.

It says what happens on standard output (see messages.py); everything printed goes to the log. SIGTERM makes
it save a checkpoint and stop; the end of standard input (its parent is gone) ends it at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING

from sage.tools.finetune.storage import storage_errors
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError, SageError, TrainingFailedError
from sage_contracts.home import Home
from sage_contracts.jobs import JobMetrics
from sage_contracts.lifeline import die_first
from sage_servicekit.children import append_output_to, end_with_parent, take_stdout
from sage_trainer.ending import LastWords
from sage_trainer.folders import (
    SOURCE,
    VersionResult,
    give_up_checkpoints,
    named_as_given,
    read_result,
    remove_leftovers,
    take_checkpoints,
    write_version,
)
from sage_trainer.messages import (
    ChildOrder,
    ChildSpec,
    DoneMessage,
    FailedMessage,
    ReadyMessage,
    RestartMessage,
    StoppedMessage,
)
from sage_trainer.retelling import retell
from sage_trainer.telling import RestartNow, StopNow, Telling, log_line
from sage_trainer.unpack import is_archive, tree_name, unpack_tree

if TYPE_CHECKING:
    from sage.tools.finetune import TrainResult

_OOM_SCORE = 500


def train(spec: ChildSpec, tell: Telling) -> DoneMessage | StoppedMessage:
    """Run the job of the spec to its end.

    Raises: SageError; StopNow; RestartNow.
    """
    home, claim = Home(Path(spec.home)), spec.claim
    output_dir = home.resolve(claim.output_dir)
    version_dir = output_dir / "versions" / str(claim.version)
    if (done := read_result(version_dir, claim.job_id)) is not None:
        tell.on_log("info", "An earlier attempt had finished; its result is used")
        return done
    source_dir = output_dir / SOURCE
    remove_leftovers(output_dir)
    take_checkpoints(output_dir, claim.job_id, claim.unfinished_jobs)
    retell(output_dir, claim.told_step, tell)
    try:
        result = _run_engine(spec, tell, output_dir, source_dir)
    finally:
        shutil.rmtree(source_dir, ignore_errors=True)
    if result.stopped:
        return StoppedMessage(step=tell.checkpoint_step)
    tell.on_phase("version", f"Writing version {claim.name}@{claim.version}")
    done = DoneMessage(
        metrics=_job_metrics(result),
        base_model=home.relative(
            version_dir / result.model_dir.name if result.model_dir else result.base_model
        ),
        adapter_path=home.relative(version_dir / result.adapter_dir.name) if result.adapter_dir else None,
        meta=result.meta,
    )
    weights = result.adapter_dir or result.model_dir
    assert weights is not None  # it did not stop
    write_version(weights, version_dir, VersionResult(job_id=claim.job_id, done=done))
    give_up_checkpoints(output_dir, claim.job_id)
    return done


def _run_engine(spec: ChildSpec, tell: Telling, output_dir: Path, source_dir: Path) -> TrainResult:
    home, claim = Home(Path(spec.home)), spec.claim
    training_path, validation_path = (
        named_as_given(home.resolve(stored), filename, source_dir / split) if stored else None
        for split, stored, filename in (
            ("training", claim.training_path, claim.training_filename),
            ("validation", claim.validation_path, claim.validation_filename),
        )
    )
    if training_path is not None and is_archive(training_path):
        tell.on_phase("data", "")
        training_path = unpack_tree(training_path, source_dir / "tree" / tree_name(training_path.name))
    from sage.tools.finetune.callbacks import CALLBACKS
    from sage.tools.finetune.trainer import TRAINERS

    config = claim.config.model_copy(update={"output_dir": str(output_dir)})
    try:
        trainer = TRAINERS.get(config.trainer)
    except KeyError as error:
        raise InvalidRequestError(f"{error.args[0]} (where this job runs)", param="trainer") from error
    return trainer(
        config,
        [tell, *(make() for _, make in CALLBACKS)],
        home=home.root,
        training_path=training_path,
        validation_path=validation_path,
        resume=True,  # take_checkpoints has left only what is to be resumed
        run_id=claim.job_id,
        rungs=spec.rungs,
    ).train()


def _job_metrics(result: TrainResult) -> JobMetrics:
    known = {name: value for name, value in result.metrics.items() if name in JobMetrics.model_fields}
    known |= {"base_eval_loss": result.base_eval_loss, "eval_loss": result.eval_loss}
    # The steps have told these, unless they were taken by an attempt that could not.
    names = {"step": "steps", "epoch": "epochs", "loss": "train_loss"}
    known |= {name: result.metrics.get(of_result) for name, of_result in names.items()}
    rungs = [rung["name"] for rung in result.meta.get("oom_rungs", [])]
    return JobMetrics.model_validate({**known, "phase": "done", "eta_s": 0, "oom_rungs": rungs or None})


def _log_traceback() -> None:
    log_line(traceback.format_exc())


def last_words(spec: ChildSpec, tell: Telling) -> LastWords:
    """`train`, with whatever goes wrong put into words."""
    try:
        with storage_errors(Home(Path(spec.home)).resolve(spec.claim.output_dir)):
            return train(spec, tell)
    except StopNow:
        return StoppedMessage()
    except RestartNow:
        return RestartMessage()
    except SageError as error:
        _log_traceback()
        # A base model that is away may lie on a disk that is.
        may_pass = error.retryable or isinstance(error, ModelNotFoundError)
        return FailedMessage(
            code=error.code, message=error.message, param=error.param, is_explained=True, may_pass=may_pass
        )
    except Exception as error:
        _log_traceback()
        message = f"{type(error).__name__}: {error}"
        may_pass = isinstance(error, OSError) or "CUDA error" in message
        return FailedMessage(code=TrainingFailedError.code, message=message, may_pass=may_pass)


def main() -> int:
    orders = end_with_parent()
    out = take_stdout()
    spec = _awaited_spec(orders, out) if sys.argv[1] == "--wait" else _read_spec(Path(sys.argv[1]))
    # The worker knows what to do when memory runs out. A child that only waits holds none worth taking.
    die_first(_OOM_SCORE)
    tell = Telling(out, Home(Path(spec.home)), spec.device)
    signal.signal(signal.SIGTERM, tell.on_sigterm)
    words = last_words(spec, tell)
    tell.say(words)
    return 1 if isinstance(words, FailedMessage) else 0


def _read_spec(path: Path) -> ChildSpec:
    return ChildSpec.model_validate_json(path.read_bytes())


def _awaited_spec(orders: SimpleQueue[bytes], out: IO[str]) -> ChildSpec:
    """Get ready, wait to be told, and write to that job's log from then on."""
    from sage.tools.finetune.warmth import import_for_training, read_for_training

    import_for_training()
    for base in sys.argv[2:]:
        read_for_training(base, Home.from_env().root)
    out.write(ReadyMessage().model_dump_json() + "\n")
    order = ChildOrder.model_validate_json(orders.get())  # no deadline: the lifeline ends a forgotten child
    append_output_to(order.log)
    return _read_spec(order.spec)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Not `sys.exit`: libraries leave threads behind that would be waited for.
    os._exit(code)
