"""Measuring while training: when it ends early, what is kept, and what people get to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.integration.test_finetune_variants import reloaded_loss

from sage.tools.finetune import Evaluation, GeneratedAnswer, LoRATrainer, TrainingCallback, TrainingConfig
from sage.tools.finetune.distributed.team import Team, dealt
from sage.tools.finetune.evaluation import HeldOut
from sage.tools.finetune.losses import PackedLoss, PlainLoss
from sage.tools.finetune.modeling import add_adapters, load_base
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.task_data import prepare


class Watcher(TrainingCallback):
    """Remembers evaluations and answers; may wish to stop once a step is done."""

    def __init__(self, stop_after: int = 0) -> None:
        self.evaluations: list[Evaluation] = []
        self.answers: list[tuple[int, str, str]] = []
        self.logs: list[str] = []
        self.steps = 0
        self._stop_after = stop_after

    def on_step(self, metrics: Any) -> None:
        self.steps += 1

    def on_eval(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        self.answers += [(step, one.prompt, one.answer) for one in answers]

    def on_log(self, level: str, message: str) -> None:
        self.logs.append(message)

    def should_stop(self) -> Literal["save_and_stop"] | None:
        return "save_and_stop" if self._stop_after and self.steps >= self._stop_after else None

    def between(self) -> list[tuple[int, float]]:
        return [(one.step, one.loss) for one in self.evaluations if one.name == "step"]


@pytest.fixture(scope="module")
def contradicting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to learn, and held-out rows that say the opposite: what is learnt soon makes them worse."""
    folder = tmp_path_factory.mktemp("rows")
    for name, answer in (("train", "aaaa bbbb cccc dddd"), ("held", "aaaa zzzz 9999 !!!!")):
        rows = [{"question": f"Number {n}?", "answer": answer} for n in range(16)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder / "train.json", folder / "held.json"


def settings(base: Path, rows: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(rows),
        "output_dir": str(output),
        "max_steps": 24,
        "eval_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "precision": "fp32",
        "save_steps": 1,
        "save_total_limit": 2,
        "max_rollbacks": 0,
        "max_length": 96,
        "lora": {"lora_dropout": 0.0},  # by chance the held-out loss went down and up with it
    }
    return TrainingConfig.model_validate({**fields, **changes})


def test_a_run_ends_early_and_keeps_its_best(
    tiny_base: Path, contradicting: tuple[Path, Path], tmp_path: Path
) -> None:
    rows, held = contradicting
    config = settings(tiny_base, rows, tmp_path, early_stopping_patience=2, sample_prompts=["Number 1?"])
    watcher = Watcher()
    result = LoRATrainer(config, [watcher], validation_path=held).train()

    measured = watcher.between()
    best_step, best_loss = min(measured, key=lambda one: one[1])
    assert best_step < watcher.steps < 24, "it must get better, then worse, then end"
    assert measured[-1][0] == best_step + 2 * 2
    assert result.eval_loss == best_loss
    assert result.metrics["result_step"] == best_step
    # What was saved is what was measured then.
    held_rows = prepare(config, validation_path=held).validation
    assert reloaded_loss(tiny_base, config, result, held_rows) == pytest.approx(best_loss, rel=1e-4)
    # The newest two, and the best.
    kept = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "checkpoints").glob("checkpoint-*")}
    assert kept == {best_step, watcher.steps - 1, watcher.steps}

    names = [one.name for one in watcher.evaluations]
    assert names == ["base", *["step"] * len(measured), "tuned"]
    assert watcher.evaluations[-1].step == best_step
    assert [step for step, prompt, answer in watcher.answers if prompt == "Number 1?" and answer] == [
        0, *(step for step, _ in measured),
    ]  # fmt: skip
    (run,) = (tmp_path / "logs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("answers" in line for line in lines) == len(names) - 1
    assert [line["eval/loss"] for line in lines if "eval/loss" in line][1:] == [loss for _, loss in measured]
    assert {"eval/perplexity", "eval/token_accuracy"} <= lines[1].keys()
    assert b"Number 1?" in next(run.glob("events.out.tfevents.*")).read_bytes()


@pytest.mark.parametrize("last", [4, 5])
def test_without_held_out_rows_the_prompts_are_answered_once_a_step(
    tiny_base: Path, contradicting: tuple[Path, Path], tmp_path: Path, last: int
) -> None:
    changes = {"max_steps": last, "sample_prompts": ["Number 1?"], "validation_fraction": 0}
    watcher = Watcher()
    LoRATrainer(settings(tiny_base, contradicting[0], tmp_path, **changes), [watcher]).train()
    assert [step for step, *_ in watcher.answers] == [0, 2, 4, 5][: last - 1]


def test_without_keep_best_the_last_step_is_the_result(
    tiny_base: Path, contradicting: tuple[Path, Path], tmp_path: Path
) -> None:
    rows, held = contradicting
    config = settings(tiny_base, rows, tmp_path, max_steps=12, keep_best=False)
    watcher = Watcher()
    result = LoRATrainer(config, [watcher], validation_path=held).train()
    assert result.eval_loss == watcher.between()[-1][1] > min(loss for _, loss in watcher.between())
    assert result.metrics["result_step"] == 12


@pytest.mark.parametrize("stop_after", [3, 4])
def test_evaluations_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    tiny_base: Path, contradicting: tuple[Path, Path], tmp_path: Path, stop_after: int
) -> None:
    """Stopped between two evaluations, and at the very step that one is due."""
    rows, held = contradicting

    def run(name: str, *watchers: Watcher) -> Any:
        config = settings(tiny_base, rows, tmp_path / name, max_steps=8)
        for watcher in watchers:
            result = LoRATrainer(config, [watcher], validation_path=held, resume=True, run_id="one").train()
        return result

    whole, first, second = Watcher(), Watcher(stop_after), Watcher()
    expected, found = run("whole", whole), run("halves", first, second)
    assert first.steps == stop_after
    assert first.between() + second.between() == whole.between()
    assert found.metrics["result_step"] == expected.metrics["result_step"]
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=1e-6)


def test_scores_equal_those_from_all_logits_at_once(tiny_base: Path) -> None:
    import torch

    config = TrainingConfig()
    model = add_adapters(load_base(tiny_base, config, "cpu", "fp32"), config.lora).eval()
    source = torch.Generator().manual_seed(4)
    rows = []
    for length in (9, 17, 30):
        ids = torch.randint(2, 250, (length,), generator=source)
        with torch.no_grad():
            choices = model(input_ids=ids[None]).logits[0].argmax(-1)
        labels = torch.roll(choices, 1)  # what the model would choose, but for every third
        labels[::3] = ids[::3]
        rows.append(Sample(ids.tolist(), [-100, -100, *labels[2:].tolist()]))
    expected_loss, hits, labels_seen = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            logits, wanted = (
                model(input_ids=torch.tensor([row.ids])).logits[0, :-1],
                torch.tensor(row.labels[1:]),
            )
            expected_loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            hits += int((logits.argmax(-1) == wanted).sum())
            labels_seen += row.label_count
        assert 0 < hits < labels_seen
        for make in (PlainLoss, partial(PackedLoss, head_chunk=8)):
            loss = make(model)  # PackedLoss changes how the model attends, so it comes last
            scores = HeldOut(model, None, loss, rows, [], 40, TrainingCallback()).measure()
            assert scores is not None
            assert scores.loss == pytest.approx(expected_loss / labels_seen, rel=1e-5)
            assert scores.token_accuracy == pytest.approx(hits / labels_seen)


@pytest.mark.parametrize(
    ("asked", "set_here", "project"),
    [
        (None, None, "sage-finetune"),
        (None, "set-here", "set-here"),
        ("asked-for", "set-here", "asked-for"),
    ],
)
def test_wandb_without_an_account_writes_the_run_offline(
    tiny_base: Path,
    contradicting: tuple[Path, Path],
    tmp_path: Path,
    asked: str | None,
    set_here: str | None,
    project: str,
) -> None:
    """In a process of its own, as wandb keeps one for as long as the program runs."""
    from wandb.proto.wandb_internal_pb2 import RunRecord

    rows, _ = contradicting
    wandb = {"wandb_project": asked, "wandb_run_name": "first try", "wandb_tags": ["small"]}
    config = settings(tiny_base, rows, tmp_path / "out", max_steps=2, report_to=["wandb"], **wandb)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        "import sys; from pathlib import Path\n"
        "from sage.tools.finetune import LoRATrainer, TrainingConfig\n"
        "LoRATrainer(TrainingConfig.model_validate_json(Path(sys.argv[1]).read_text())).train()\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
        "WANDB_CONFIG_DIR": str(tmp_path / "conf"),
        **({"WANDB_PROJECT": set_here} if set_here else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.json")],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "so the run is written offline" in done.stderr
    assert done.stdout == ""
    (run,) = (tmp_path / "out" / "logs").glob("run-*/wandb/offline-run-*/run-*.wandb")
    content = run.read_bytes()
    assert b"train/loss" in content
    assert b"eval/perplexity" in content
    # As its own format has them, not only in the settings that are sent along.
    for said in (RunRecord(project=project), RunRecord(display_name="first try"), RunRecord(tags=["small"])):
        assert said.SerializeToString() in content


def test_patience_without_evaluations_is_refused() -> None:
    with pytest.raises(ValueError, match="set eval_steps too"):
        TrainingConfig(early_stopping_patience=2)


class OneOfTwo(Team):
    """A process whose partner's sums arrive later."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.idled = 0

    def share(self, groups: Sequence[list[int]], work: Callable[[list[int]], int]) -> list[list[int]]:
        return dealt(groups, work, self.size)[self.rank]

    def idle(self, loss: Any) -> None:
        loss()
        self.idled += 1


def test_each_held_out_row_is_measured_by_one_process(tiny_base: Path) -> None:
    model = load_base(tiny_base, TrainingConfig(), "cpu", "fp32")
    samples = [Sample([5 + n, *range(9, 9 + n)], [-100, *range(9, 9 + n)]) for n in range(4, 9)]

    def measured(team: Team) -> Any:
        return HeldOut(model, None, PlainLoss(model), samples, [], 1, TrainingCallback(), team).measure()

    alone, teams = measured(Team()), [OneOfTwo(0), OneOfTwo(1)]
    parts = [measured(team) for team in teams]
    assert sum(part.loss for part in parts) == pytest.approx(alone.loss, rel=1e-5)
    assert sum(part.token_accuracy for part in parts) == pytest.approx(alone.token_accuracy)
    assert all(0 < part.loss < alone.loss for part in parts)
    # Five rows, one at a time: whoever has two keeps step with the other's third.
    assert sorted(team.idled for team in teams) == [0, 1]
