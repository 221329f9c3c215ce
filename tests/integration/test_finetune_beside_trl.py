"""Our loop and TRL's trainer, from the same adapters over the same rows, arrive at the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune import LoRATrainer, TrainingConfig
from sage.tools.finetune.data import load_conversations
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.losses import PlainLoss
from sage.tools.finetune.modeling import add_adapters, load_base, load_tokenizer
from sage.tools.finetune.rendering import ChatRenderer, Sample

ROWS, HELD_ROWS, STEPS, RATE = 12, 6, 6, 1e-2


def rows(count: int, start: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {n} + {n % 3}?", "answer": f"It is {n + n % 3}, I think{'.' * (n % 4)}"}
        for n in range(start, start + count)
    ]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    made = []
    for name, part in (("train", rows(ROWS, 0)), ("held", rows(HELD_ROWS, 500))):
        made.append(tmp_path / f"{name}.jsonl")
        made[-1].write_text("\n".join(map(json.dumps, part)))
    return made[0], made[1]


def configured(base: Path, output: Path) -> TrainingConfig:
    return TrainingConfig(
        model_name=str(base),
        output_dir=str(output),
        max_steps=STEPS,
        # Every step sees every row, so that the two programs' orders of rows do not matter.
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        weight_decay=0,
        precision="fp32",
        report_to=[],
        lora={"lora_dropout": 0},
    )


def loss_of_trl(base: Path, config: TrainingConfig, train: list[Sample], held: list[Sample]) -> float:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(config.seed)
    model = add_adapters(load_base(base, config, "cpu", "fp32"), config.lora)
    columns = [
        {"input_ids": list(row.ids), "completion_mask": [int(label != IGNORED) for label in row.labels]}
        for row in train
    ]
    arguments: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": config.max_grad_norm,
    }  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        processing_class=load_tokenizer(base),
        train_dataset=Dataset.from_list(columns),
        args=SFTConfig(
            output_dir=f"{config.output_dir}-trl", completion_only_loss=True, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            **arguments,
        ),
    )  # fmt: skip
    trainer.train()
    trained = trainer.model.eval()
    with torch.no_grad():
        return float(PlainLoss(trained)(held)) / sum(row.label_count for row in held)


def test_the_held_out_loss_after_some_steps_is_that_of_trl(
    tiny_base: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    train_file, held_file = files
    config = configured(tiny_base, tmp_path / "ours")
    result = LoRATrainer(config, (), training_path=train_file, validation_path=held_file).train()

    renderer = ChatRenderer(load_tokenizer(tiny_base), config.max_length)
    train, held = (renderer.samples(load_conversations(path)) for path in files)
    expected = loss_of_trl(tiny_base, config, train, held)

    assert result.base_eval_loss is not None
    assert result.eval_loss is not None
    assert result.eval_loss < result.base_eval_loss - 0.05, "the steps must have moved the model"
    assert result.eval_loss == pytest.approx(expected, rel=1e-3)
