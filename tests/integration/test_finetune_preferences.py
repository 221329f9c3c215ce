"""Whole runs on preferences with a tiny random model: what they learn and write, how they stop and go on."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.fakes.no_numbers import no_number_when
from tests.integration.finetune_recorder import Recorder, adapter_weights

from sage.tools.finetune import Evaluation, LoRATrainer, StepMetrics, TrainingCallback, TrainingConfig
from sage.tools.finetune.callbacks import GeneratedAnswer
from sage.tools.finetune.planning import plan
from sage_contracts.errors import InvalidDataError, InvalidRequestError, TrainingFailedError

METHODS = ("dpo", "orpo", "kto")


class Watcher(Recorder):
    """Remembers every evaluation between steps."""

    def __init__(self, stop_after: int = 0) -> None:
        super().__init__(stop_after)
        self.between: list[tuple[int, float, bool]] = []
        self.answers: list[tuple[int, str, str]] = []

    def on_eval(self, evaluation: Evaluation) -> None:
        super().on_eval(evaluation)
        if evaluation.name == "step":
            self.between.append((evaluation.step, evaluation.loss, evaluation.is_best))

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        self.answers += [(step, one.prompt, one.answer) for one in answers]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Number {n}?", "chosen": "Yes please.", "rejected": "no NO no"} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(base: Path, data: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "save_steps": 2,
        "max_length": 128,
    }
    return TrainingConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_what_is_preferred(method: str, tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Recorder()
    config = settings(tiny_base, data, tmp_path / "output", method=method)
    result = LoRATrainer(config, [watcher]).train()

    assert result.eval_loss is not None
    assert result.base_eval_loss is not None
    assert result.eval_loss < result.base_eval_loss
    assert result.metrics["reward_accuracy"] == 1
    assert result.metrics["reward_margin"] > max(0, result.metrics["base_reward_margin"])  # type: ignore
    if method != "orpo":  # the base is its own reference
        assert result.metrics["base_reward_accuracy"] == 0.5
        assert result.metrics["base_reward_margin"] == 0
    assert watcher.phases == [
        "data", "base_model", "loading", "base_eval", "training", "eval", "saving",
    ]  # fmt: skip
    assert [metrics.step for metrics in watcher.steps] == [1, 2, 3, 4, 5, 6]
    assert watcher.steps[-1].loss < watcher.steps[0].loss
    assert watcher.steps[-1].eta_s == 0
    assert watcher.steps[-1].token_accuracy is None
    assert watcher.steps[-1].trained_tokens > 6 * 4 * 30
    assert [checkpoint.step for checkpoint in watcher.checkpoints] == [2, 4, 6]
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        "lora_weights", "checkpoints", "logs", "training_config.json", "finetune_meta.json",
    }  # fmt: skip
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (tmp_path / "output" / "lora_weights").iterdir()
    }
    meta = json.loads((tmp_path / "output" / "finetune_meta.json").read_text())
    assert (meta["method"], meta["loss_path"]) == (method, f"trl-{method}")
    assert meta["metrics"]["reward_accuracy"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    method: str, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    whole = LoRATrainer(settings(tiny_base, data, tmp_path / "a", method=method), ()).train()

    config = settings(tiny_base, data, tmp_path / "b", method=method, save_steps=50)
    first = LoRATrainer(config, [Recorder(stop_after=3)], run_id="job").train()
    assert (first.stopped, first.adapter_dir) == ("save_and_stop", None)
    assert not (tmp_path / "b" / "lora_weights").exists()

    watcher = Recorder()
    second = LoRATrainer(config, [watcher], run_id="job", resume=True).train()
    assert [metrics.step for metrics in watcher.steps] == [4, 5, 6]
    assert watcher.phases.count("base_eval") == 0
    assert second.base_eval_loss == whole.base_eval_loss
    assert second.metrics["trained_tokens"] == whole.metrics["trained_tokens"]
    assert second.eval_loss == pytest.approx(whole.eval_loss, rel=1e-4)
    expected = adapter_weights(whole)
    for name, weight in adapter_weights(second).items():
        assert (weight - expected[name]).abs().max() < 1e-5


class Pausing(Recorder):
    """Wants to save and stop in the middle of the fourth step, which has two passes."""

    asked = 0

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        self.asked = 0

    def should_stop(self) -> Literal["save_and_stop"] | None:
        self.asked += 1
        return "save_and_stop" if len(self.steps) == 3 and self.asked >= 3 else None


@pytest.mark.parametrize(("method", "rows"), [("dpo", 24), ("orpo", 24), ("kto", 24), ("dpo", 12)])
def test_a_pause_in_the_middle_of_a_step_costs_no_step_before_it(
    method: str, rows: int, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """With 12 rows, the step that is given up is the first of an epoch."""
    changes = {"method": method, "save_steps": 50, "max_train_rows": rows, "validation_fraction": 0}
    whole = LoRATrainer(settings(tiny_base, data, tmp_path / "a", **changes), ()).train()
    config = settings(tiny_base, data, tmp_path / "b", **changes)
    pausing, rest = Pausing(), Recorder()
    assert LoRATrainer(config, [pausing], run_id="job").train().stopped == "save_and_stop"
    resumed = LoRATrainer(config, [rest], run_id="job", resume=True).train()
    assert [metrics.step for metrics in (*pausing.steps, *rest.steps)] == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.step for checkpoint in pausing.checkpoints] == [3]
    assert resumed.metrics["trained_tokens"] == whole.metrics["trained_tokens"]
    expected = adapter_weights(whole)
    assert all((expected[name] == weight).all() for name, weight in adapter_weights(resumed).items())


@pytest.mark.parametrize("method", ["dpo", "kto"])  # with orpo the chosen answers are learnt besides
def test_a_run_ends_early_and_keeps_its_best(
    method: str, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """The held-out rows prefer the opposite: what is learnt makes them worse."""
    held = tmp_path / "held.jsonl"
    rows = [{"prompt": f"Number {n}?", "chosen": "no NO no", "rejected": "Yes please."} for n in range(6)]
    held.write_text("\n".join(map(json.dumps, rows)))
    changes = {"eval_steps": 1, "early_stopping_patience": 2, "save_steps": 1, "save_total_limit": 1}
    config = settings(tiny_base, data, tmp_path / "out", method=method, max_steps=9, **changes)
    watcher = Watcher()
    result = LoRATrainer(config, [watcher], validation_path=held).train()

    steps, losses, best = zip(*watcher.between, strict=True)
    kept = 1 + losses.index(min(losses))
    assert steps == tuple(range(1, kept + 3)), "two evaluations in a row were no better"
    assert [step for step, is_best in zip(steps, best, strict=True) if is_best][-1] == kept
    assert len(watcher.steps) == kept + 2 < 9
    assert (result.eval_loss, result.metrics["result_step"]) == (min(losses), kept)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {f"checkpoint-{kept}", f"checkpoint-{kept + 2}"}
    from safetensors.torch import load_file

    of_best = load_file(checkpoints / f"checkpoint-{kept}" / "adapter_model.safetensors")
    assert all((of_best[name] == weight).all() for name, weight in adapter_weights(result).items())

    again = Watcher()
    LoRATrainer(config, [again], validation_path=held, resume=True).train()
    assert (again.steps, again.between) == ([], []), "it had ended, only its end was lost"


@pytest.mark.parametrize(("held_out", "last"), [(0.2, 5), (0, 5), (0, 4)])
def test_the_model_answers_the_sample_prompts_at_every_evaluation(
    tiny_base: Path, data: Path, tmp_path: Path, held_out: float, last: int
) -> None:
    changes = {"eval_steps": 2, "sample_prompts": ["Number 1?"], "max_steps": last, "keep_best": False}
    config = settings(tiny_base, data, tmp_path, method="dpo", validation_fraction=held_out, **changes)
    watcher = Watcher()
    LoRATrainer(config, [watcher]).train()
    steps, prompts, answers = zip(*watcher.answers, strict=True)
    assert (steps, set(prompts)) == ((0, 2, 4, 5)[: last - 1], {"Number 1?"})
    assert answers[0] != answers[-1]
    (curve,) = (tmp_path / "logs").glob("run-*/metrics.jsonl")
    assert [json.loads(line)["step"] for line in curve.read_text().splitlines() if "answers" in line] == [
        *steps
    ]

    again = Watcher()
    LoRATrainer(config, [again], resume=True).train()  # finished, but its end was lost
    assert [step for step, *_ in again.answers] == [last]


@pytest.mark.parametrize("stop_after", [3, 4])
def test_evaluations_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    tiny_base: Path, data: Path, tmp_path: Path, stop_after: int
) -> None:
    """Stopped between two evaluations, and at the very step that one is due."""

    def run(name: str, *watchers: Watcher) -> Watcher:
        config = settings(tiny_base, data, tmp_path / name, method="dpo", eval_steps=2)
        for watcher in watchers:
            LoRATrainer(config, [watcher], run_id="job", resume=True).train()
        return watchers[-1]

    whole = run("a", Watcher())
    first = Watcher(stop_after)
    rest = run("b", first, Watcher())
    assert [step for step, _, _ in first.between + rest.between] == [2, 4, 6]
    for one, other in zip(whole.between, first.between + rest.between, strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)


def test_a_checkpoint_that_is_not_whole_or_of_other_settings_is_passed_over(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, data, tmp_path, method="dpo", max_steps=5)
    LoRATrainer(config, [Recorder(stop_after=4)]).train()
    (tmp_path / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()  # killed while it was written
    watcher = Recorder()
    LoRATrainer(config, [watcher], resume=True).train()
    assert watcher.steps[0].step == 3

    again = Recorder()
    LoRATrainer(config, [again], resume=True).train()  # finished, but its end was lost
    assert again.steps == []

    other = Recorder()
    LoRATrainer(config.model_copy(update={"preference_beta": 0.3}), [other], resume=True).train()
    assert other.steps[0].step == 1
    assert any("preference_beta differ" in text for _, text in other.logs)


def test_stop_means_now(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Recorder(stop_after=1, mode="stop")
    result = LoRATrainer(settings(tiny_base, data, tmp_path, method="kto"), [watcher]).train()
    assert (result.stopped, len(watcher.steps), watcher.checkpoints) == ("stop", 1, [])


def test_epochs_decide_the_length_where_no_steps_are_given(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    watcher = Recorder()
    config = settings(
        tiny_base, data, tmp_path, method="dpo", max_steps=-1, num_train_epochs=1, max_train_rows=10
    )
    LoRATrainer(config, [watcher]).train()
    assert [(m.step, m.total_steps) for m in watcher.steps] == [(1, 3), (2, 3), (3, 3)]
    assert watcher.steps[-1].epoch == 1


def test_single_rated_answers_are_for_kto_alone(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    rows = [
        {"prompt": f"Number {n}?", "completion": "Yes." if n % 3 else "nO", "label": bool(n % 3)}
        for n in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3}
    config = settings(tiny_base, path, tmp_path / "out", method="kto", validation_fraction=0.3, **changes)
    result = LoRATrainer(config, ()).train()
    assert result.metrics["reward_accuracy"] is not None
    assert result.metrics["reward_accuracy"] > 0.9

    with pytest.raises(InvalidDataError, match=r"row 1.*use method=kto"):
        LoRATrainer(config.model_copy(update={"method": "dpo"}), ()).train()
    only_wanted = tmp_path / "wanted.jsonl"
    only_wanted.write_text("\n".join(json.dumps({**row, "label": True}) for row in rows))
    with pytest.raises(InvalidDataError, match="no unwanted answer"):
        LoRATrainer(config.model_copy(update={"data_path": str(only_wanted)}), ()).train()
    with pytest.raises(InvalidRequestError, match="two rows or more"):
        LoRATrainer(config.model_copy(update={"gradient_accumulation_steps": 1}), ()).train()


def test_biases_that_train_are_no_reference(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, data, tmp_path / "out", method="dpo", lora={"bias": "all"})
    for begin in (LoRATrainer(config, ()).train, lambda: plan(config, home=tmp_path)):
        with pytest.raises(InvalidRequestError, match=r"lora\.bias=all"):
            begin()
    assert not (tmp_path / "out").exists()


def test_supervised_rows_say_no_preference(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "qa.json"
    path.write_text(json.dumps([{"question": "Why?", "answer": "Because."}]))
    with pytest.raises(InvalidDataError, match=r"row 1.*use method=sft"):
        LoRATrainer(settings(tiny_base, path, tmp_path / "out", method="dpo"), ()).train()


def test_a_diverging_run_fails_with_advice(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, data, tmp_path, method="orpo", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(TrainingFailedError, match="Lower learning_rate"):
        LoRATrainer(config, ()).train()


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


@pytest.mark.parametrize("method", METHODS)
def test_our_held_out_scores_are_those_of_trl(method: str, tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from datasets import Dataset

    from sage.tools.finetune.batching import Schedule
    from sage.tools.finetune.checkpoints import Checkpoints, RunState
    from sage.tools.finetune.preferences.held_out import HeldOut
    from sage.tools.finetune.preferences.methods import make_trainer
    from sage.tools.finetune.preferences.progress import Progress
    from sage.tools.finetune.preferences.samples import mixed, pair_samples, rated_samples
    from sage.tools.finetune.preferences.splits import prepare_preferences
    from sage.tools.finetune.run_parts import RunParts

    data = tmp_path / "mixed.json"
    rows_ = [
        {"prompt": f"{n}?", "chosen": f"{n * 7919}.", "rejected": f"{n * n * 31} no"} for n in range(1, 10)
    ]
    data.write_text(json.dumps(rows_))
    config = settings(
        tiny_base,
        data,
        tmp_path,
        method=method,
        validation_fraction=0,
        max_train_rows=8,
        per_device_train_batch_size=8,
    )
    parts = RunParts(config, tiny_base, TrainingCallback())
    with torch.no_grad():
        for name, weight in parts.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    wanted = prepare_preferences(config).train
    render = rated_samples if method == "kto" else pair_samples
    rows: Any = render(parts.renderer, wanted)  # type: ignore[operator]
    progress = Progress(
        config, Schedule(8, 16, 1, -1, 0), RunState(), Checkpoints(tmp_path, {}), TrainingCallback(), "cpu"
    )
    trainer = make_trainer(config, parts, rows, Schedule(8, 16, 1, -1, 0), tmp_path, progress)
    # TRL's averages are of batches: one row each, except where the batch is what is compared.
    trainer.args.per_device_eval_batch_size = 8 if method == "kto" else 1
    assert isinstance(trainer.train_dataset, Dataset)
    theirs = trainer.evaluate(trainer.train_dataset)

    ours = HeldOut(parts.model, mixed(rows) if method == "kto" else rows, method, 0.1)
    scores = ours.tuned(TrainingCallback())
    assert scores.loss == pytest.approx(theirs["eval_loss"], rel=1e-4)
    if method != "kto":
        assert scores.reward_accuracy == pytest.approx(theirs["eval_rewards/accuracies"])
    assert scores.reward_margin == pytest.approx(theirs["eval_rewards/margins"], rel=1e-3)
    assert 0 < scores.reward_accuracy < 1


def test_a_run_of_few_steps_is_measured_on_all_that_is_held_out(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    rows = [{"prompt": f"Other {n}?", "chosen": "Yes please.", "rejected": "no NO no"} for n in range(4)]
    held.write_text("\n".join(map(json.dumps, rows)))
    config = settings(
        tiny_base, data, tmp_path / "out", method="dpo", max_steps=1, gradient_accumulation_steps=1
    )
    result = LoRATrainer(config, (), validation_path=held).train()
    assert (result.meta["train_rows"], result.meta["held_out_rows"]) == (2, 4)
