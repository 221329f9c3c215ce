"""A training child without a model: speaks the trainer's protocol and behaves as the job's name says.

quick     three steps and two evaluations, then done
graded    one step, and a held-out loss of 1/r; with r = 1 a traceback
steady    steps until `<output>/go` exists, then done; saves at SIGTERM; resumes where it stopped
stubborn  steps forever and ignores SIGTERM
crash     a traceback and exit code 3, no last words
refuse    last words with an error code of ours
oom       kills itself as the kernel does
bus       a signal ends it, as one does that cannot read a page of its base model
hungry    is killed so after two steps and a checkpoint, until it has been given two rungs
noisy     fills stderr and says what is no message, then done
family    leaves a process of its own behind, which holds standard output open
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import IO

from pydantic import BaseModel

from sage_contracts.jobs import JobMetrics
from sage_servicekit.children import end_with_parent, take_stdout
from sage_trainer.messages import (
    CheckpointMessage,
    ChildSpec,
    DoneMessage,
    EvalMessage,
    FailedMessage,
    LogMessage,
    PhaseMessage,
    StepMessage,
    StoppedMessage,
)

STEP_S = 0.02


class FakeRun:
    def __init__(self, spec: ChildSpec, out: IO[str]) -> None:
        self.spec = spec
        self.out = out
        self.folder = Path(spec.home) / spec.claim.output_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop = threading.Event()
        (self.folder / "child.pid").write_text(str(os.getpid()))

    def say(self, message: BaseModel) -> None:
        self.out.write(message.model_dump_json() + "\n")

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.on_term)
        self.say(PhaseMessage(name="data", detail="Preparing data"))
        self.say(LogMessage(message=f"threads {os.environ.get('OMP_NUM_THREADS')}"))
        return int(getattr(self, self.spec.claim.name.split("-")[0])() or 0)

    def on_term(self, number: int, frame: FrameType | None) -> None:
        self.stop.set()

    def step(self, number: int, total: int) -> None:
        self.say(StepMessage(step=number, total_steps=total, loss=1 / number, learning_rate=1e-4))

    def done(self, eval_loss: float = 1.0) -> None:
        adapter = self.folder / "versions" / str(self.spec.claim.version) / "lora_weights"
        adapter.mkdir(parents=True, exist_ok=True)
        self.say(
            DoneMessage(
                metrics=JobMetrics(base_eval_loss=2.0, eval_loss=eval_loss),
                base_model="base_models/fake",
                adapter_path=str(adapter.relative_to(self.spec.home)),
                meta={"data_sha256": "0"},
            )
        )

    def quick(self) -> None:
        self.say(EvalMessage(of="base", loss=2.0, token_accuracy=0.25))
        for number in range(1, 4):
            self.step(number, 3)
        self.say(EvalMessage(of="tuned", step=3, loss=1.0, token_accuracy=0.5))
        self.done()

    def graded(self) -> None:
        if self.spec.claim.config.lora.r == 1:
            self.crash()
        self.step(1, 1)
        self.done(eval_loss=1 / self.spec.claim.config.lora.r)

    def steady(self) -> None:
        saved = self.folder / "checkpoint"
        number = int(saved.read_text()) if saved.exists() else 0
        if number:
            self.say(LogMessage(message=f"Resumed from step {number}"))
        while not (self.folder / "go").exists():
            number += 1
            self.step(number, 1000)
            if self.stop.wait(STEP_S):
                saved.write_text(str(number))
                self.say(CheckpointMessage(step=number, path=str(saved.relative_to(self.spec.home))))
                self.say(StoppedMessage(step=number))
                return
        self.done()

    def stubborn(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        number = 0
        while not self.stop.wait(STEP_S):
            number += 1
            self.step(number, 1000)

    def crash(self) -> None:
        raise RuntimeError("the fake crashed on purpose")

    def refuse(self) -> None:
        self.say(
            FailedMessage(
                code="invalid_training_file",
                message="Row 7 has no answer",
                param="data_path",
                is_explained=True,
            )
        )

    def oom(self) -> None:
        print("about to allocate", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def bus(self) -> None:
        os.kill(os.getpid(), signal.SIGBUS)

    def hungry(self) -> None:
        saved = self.folder / "checkpoint"
        done = int(saved.read_text()) if saved.exists() else 0
        if done:
            self.say(LogMessage(message=f"Resumed from step {done}"))
        for number in (done + 1, done + 2):
            self.step(number, 6)
        saved.write_text(str(done + 2))
        if len(self.spec.rungs) < 2:
            self.oom()
        self.say(LogMessage(message=f"Rungs: {', '.join(self.spec.rungs)}"))
        self.done()

    def noisy(self) -> None:
        for _ in range(2000):
            print("x" * 1000, file=sys.stderr)
            print("a library prints to standard output")
        self.out.write("this is no message\n")
        self.quick()

    def family(self) -> None:
        orphan = subprocess.Popen(["sleep", "600"], stdout=self.out.fileno())
        (self.folder / "orphan.pid").write_text(str(orphan.pid))
        self.quick()


def main() -> int:
    end_with_parent()
    out = take_stdout()
    spec = ChildSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        return FakeRun(spec, out).run()
    except RuntimeError:
        import traceback

        traceback.print_exc()
        return 3


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # `family` leaves a child on purpose: nothing here waits for it
