"""What a run that went back still knows, and what it no longer may."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.no_numbers import no_number_when
from tests.integration.finetune_recorder import Recorder

from sage.tools.finetune import LoRATrainer, TrainingConfig
from sage_contracts.errors import TrainingFailedError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows for either kind of run."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Number {n}?", "chosen": "Yes please.", "rejected": "no NO no"} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    answers = [{"question": row["prompt"], "answer": row["chosen"]} for row in rows]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return tmp_path


def settings(base: Path, data: Path, method: str, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data / ("answers.jsonl" if method == "sft" else "data.jsonl")),
        "output_dir": str(data / "out"),
        "method": method,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "precision": "fp32",
        "max_length": 128,
        "report_to": [],
    }
    return TrainingConfig.model_validate({**fields, **changes})


def no_number_after(told: list[int], recorder: Recorder) -> AbstractContextManager[None]:
    """Nonsense in the step that follows when so many steps have been told, each time once."""
    waiting = [*told]

    def is_time() -> bool:
        if "training" in recorder.phases and waiting and len(recorder.steps) == waiting[0]:
            waiting.pop(0)
            return True
        return False

    return no_number_when(is_time)


def test_the_bases_loss_outlives_a_way_back_to_before_it_was_measured(tiny_base: Path, data: Path) -> None:
    """After the first way back the only checkpoint is that of step 0; the base is measured after step 1."""
    recorder = Recorder()
    with no_number_after([0, 2], recorder):
        result = LoRATrainer(
            settings(tiny_base, data, "sft", max_steps=4, max_rollbacks=2, save_steps=50), [recorder]
        ).train()
    assert [metrics.step for metrics in recorder.steps] == [1, 2, 1, 2, 3, 4]
    assert [rollback["to_step"] for rollback in result.meta["rollbacks"]] == [0, 0]
    assert result.base_eval_loss == result.metrics["base_eval_loss"] == recorder.evals["base"]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_best_that_was_deleted_is_forgotten_on_the_way_back(
    method: str, tiny_base: Path, data: Path
) -> None:
    """The best was that of step 4 at step 6, and that of step 8 when step 12 went wrong."""
    recorder = Recorder()
    config = settings(
        tiny_base, data, method, max_steps=14, eval_steps=4, save_steps=1, save_total_limit=1, max_rollbacks=1
    )
    with no_number_after([11, 11], recorder), pytest.raises(TrainingFailedError, match="going back once"):
        LoRATrainer(config, [recorder]).train()
    told = [text for _, text in recorder.logs if "Going back to the checkpoint of step 6" in text]
    assert len(told) == 1
    (left,) = (data / "out/checkpoints").glob("checkpoint-*")
    state = json.loads((left / "state.json").read_text())
    assert (left.name, state["best"]) == ("checkpoint-6", None)
    assert state["base_eval_loss"] == recorder.evals["base"]
