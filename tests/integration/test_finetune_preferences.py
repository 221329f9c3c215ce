"""Whole runs on preferences with a tiny random model: what they learn, measure, write and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.integration.finetune_recorder import Recorder, adapter_weights
from tests.integration.preference_runs import METHODS, Watcher, settings, write_pairs

from sage.tools.finetune import LoRATrainer, TrainingCallback
from sage.tools.finetune.planning import plan
from sage_contracts.errors import InvalidDataError, InvalidRequestError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data.jsonl")


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
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {
        f"checkpoint-{kept}",
        f"checkpoint-{kept + 2}",
    }
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

    with pytest.raises(InvalidDataError, match=r"rows 1, .*use method=kto"):
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


@pytest.mark.parametrize("method", METHODS)
def test_a_tokenizer_without_a_padding_or_ending_token_will_do(
    method: str, tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for name, suffix in (("tokenizer_config", ""), ("config", "_id"), ("generation_config", "_id")):
        stored = json.loads((base / f"{name}.json").read_text())
        for token in ("pad_token", "eos_token"):
            stored.pop(token + suffix, None)
        (base / f"{name}.json").write_text(json.dumps(stored))
    usual = settings(tiny_base, data, tmp_path / "usual", method=method, max_steps=2, seed=2**32 - 1)
    bare = settings(base, data, tmp_path / "bare", method=method, max_steps=2, seed=-1)
    wanted, found = (LoRATrainer(config, ()).train() for config in (usual, bare))
    assert found.adapter_dir is not None
    assert found.metrics["reward_accuracy"] == wanted.metrics["reward_accuracy"] == 1
    assert "pad_token" not in json.loads((found.adapter_dir / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("method", ["orpo", "kto"])
def test_of_rows_that_were_cut_those_it_learned_from_are_counted_once(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "Yes " * 30, "rejected": "no " * 40} for n in range(8)]
    rows.append({"prompt": "Number " * 20, "chosen": "Yes.", "rejected": "no"})  # nothing is left of it
    data, held = tmp_path / "data.jsonl", tmp_path / "held.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    held.write_text("\n".join(json.dumps({**row, "prompt": f"{n}!"}) for n, row in enumerate(rows[:8])))
    config = settings(tiny_base, data, tmp_path / "out", method=method, max_steps=-1, num_train_epochs=1)
    config.max_length = 64
    result = LoRATrainer(config, (), validation_path=held).train()
    learned = 16 if method == "kto" else 8
    assert result.meta["train_rows"] == learned
    assert result.meta["dropped_rows"] == (2 if method == "kto" else 1)
    assert result.meta["truncated_rows"] == learned
    card = (tmp_path / "out" / "lora_weights" / "README.md").read_text()
    assert f"{learned} rows were longer and were cut" in card
