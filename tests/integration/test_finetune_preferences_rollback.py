"""Runs on preferences whose loss is no number, or too high: how they go back, and when they fail."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import pytest
from tests.fakes.no_numbers import no_number_when
from tests.integration.finetune_recorder import Recorder, adapter_weights
from tests.integration.preference_runs import METHODS, settings, write_pairs

from sage.tools.finetune import LoRATrainer, TrainingCallback, TrainingConfig
from sage_contracts.errors import TrainingFailedError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data.jsonl")


def no_number_in_pass(number: int) -> AbstractContextManager[None]:
    """A machine that once, in its n-th pass of training, computes nonsense."""
    passes = count(1)
    return no_number_when(lambda: next(passes) == number)


class Trainers(TrainingCallback):
    """How many trainers of TRL's there are on the way back."""

    def __init__(self) -> None:
        self.on_the_way: list[int] = []

    def on_log(self, level: str, message: str) -> None:
        from transformers import Trainer

        if "Going back" in message:
            self.on_the_way.append(sum(issubclass(type(thing), Trainer) for thing in gc.get_objects()))


@pytest.mark.parametrize("method", METHODS)
def test_after_a_nan_a_run_begins_again_at_a_lower_rate(
    method: str, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"method": method, "lr_scheduler_type": "constant", "warmup_ratio": 0, "save_steps": 50}
    slow = settings(tiny_base, data, tmp_path / "a", learning_rate=0.3e-2, **changes)
    expected = LoRATrainer(slow, ()).train()

    watcher, trainers = Recorder(), Trainers()
    gc.collect()  # those of other runs
    with no_number_in_pass(5):  # the third step
        result = LoRATrainer(
            settings(tiny_base, data, tmp_path / "b", **changes), [watcher, trainers]
        ).train()
    assert trainers.on_the_way == [0], "its rows and buffers are not to be there twice"
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 1, 2, 3, 4, 5, 6]
    assert [metrics.lr for metrics in watcher.steps] == pytest.approx([1e-2] * 2 + [0.3e-2] * 6)
    warned = [text for level, text in watcher.logs if level == "warn"]
    assert any("no number in step 3. Going back to the start" in text for text in warned)
    (rollback,) = result.meta["rollbacks"]
    assert (rollback["reason"], rollback["step"], rollback["to_step"]) == ("nan", 3, 0)
    assert result.metrics["trained_tokens"] == expected.metrics["trained_tokens"]
    assert (result.base_eval_loss, watcher.phases.count("base_eval")) == (expected.base_eval_loss, 1)
    weights = adapter_weights(expected)
    for name, weight in adapter_weights(result).items():
        assert (weight - weights[name]).abs().max() < 1e-5


def test_after_a_nan_a_run_goes_on_from_the_checkpoint_that_was_proven(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    config = settings(
        tiny_base, data, tmp_path, method="dpo", lr_scheduler_type="constant", warmup_ratio=0, save_steps=1,
        save_total_limit=9, max_steps=9,
    )  # fmt: skip
    watcher = Recorder()
    with no_number_in_pass(15):  # the eighth step
        result = LoRATrainer(config, [watcher]).train()
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [rollback["to_step"] for rollback in result.meta["rollbacks"]] == [1]

    first, second = (
        load_file(tmp_path / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (1, 2)
    )
    furthest = max(float((second[name] - first[name]).abs().max()) for name in first)
    assert furthest < 0.6e-2, "Adam's second step goes as far as its rate, which was cut"


def test_whoever_resumes_a_run_knows_how_often_it_went_back(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, tmp_path, method="dpo", save_steps=50, max_rollbacks=1)
    stopping = Recorder(stop_after=3, mode="stop")
    with no_number_in_pass(5):
        LoRATrainer(config, [stopping]).train()  # two steps, the way back, and another
    with (
        no_number_in_pass(3),
        pytest.raises(TrainingFailedError, match=r"in step 2, also after going back once"),
    ):
        LoRATrainer(config, (), resume=True).train()


def test_a_loss_that_stays_high_is_a_failed_step() -> None:
    from sage.tools.finetune.batching import Schedule
    from sage.tools.finetune.checkpoints import Checkpoints, RunState
    from sage.tools.finetune.preferences.progress import Progress, StepFailed

    for allowed in (2, 0):
        schedule, checkpoints = Schedule(99, 1, 1, -1, 0), Checkpoints(Path("nowhere"), {})
        config = TrainingConfig(method="dpo", max_rollbacks=allowed)
        progress = Progress(config, schedule, RunState(), checkpoints, TrainingCallback(), "cpu")
        losses = [0.7] * 10 + [3.0] * 4 + [0.6] + [3.0] * 5
        for step, loss in enumerate(losses[:-1], 1):
            progress.step_logged(step, {"loss": loss, "learning_rate": 1e-4})
        if allowed:
            with pytest.raises(StepFailed, match=r"stayed at 3.*in step 20"):
                progress.step_logged(20, {"loss": 3.0, "learning_rate": 1e-4})
        else:
            progress.step_logged(20, {"loss": 3.0, "learning_rate": 1e-4})


def test_a_diverging_run_fails_with_advice(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, data, tmp_path, method="orpo", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(TrainingFailedError, match="Lower learning_rate"):
        LoRATrainer(config, ()).train()
