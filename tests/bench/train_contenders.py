"""One contender of train_speed.py, in a process of its own: `python train_contenders.py NAME FOLDER`.

FOLDER holds setting.json and the rows; the result goes to FOLDER/NAME.json. Times are wall-clock, so that the
driver can count from the moment it started the process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA = 8, 16


def counting(trainer_class: Any, setting: dict[str, Any]) -> tuple[list[dict[str, float]], Any]:
    """(a list that grows by one entry a step, a callback for a transformers Trainer that fills it).

    Training ends with SystemExit where fp32 is asked for and the weights are in another format.
    """
    from transformers import TrainerCallback

    steps: list[dict[str, float]] = []
    seen = {"labels": 0, "tokens": 0}
    usual = trainer_class.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen["labels"] += int((inputs["labels"] != -100).sum())
        seen["tokens"] += real_tokens(inputs)
        return usual(self, model, inputs, *rest, **named)

    trainer_class.training_step = training_step

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **named: Any) -> None:
            formats = {str(weights.dtype) for weights in model.parameters()}
            if setting["precision"] == "fp32" and formats != {"torch.float32"}:
                raise SystemExit(f"asked for fp32, but weights are in {formats}")

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            steps.append({"at": time.time(), **seen})

    return steps, Clock()


def real_tokens(inputs: Any) -> int:
    """Tokens without padding, whether the mask is a row of flags, a square per row, or not there at all."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return int(inputs["input_ids"].numel())
    if mask.dim() == 4:  # additive: a real token may at least see itself
        return int((mask[:, 0].diagonal(dim1=1, dim2=2) == 0).sum())
    return int((mask != 0).sum())


def common(setting: dict[str, Any], out: Path) -> dict[str, Any]:
    """Arguments that both peers, as transformers Trainers, know."""
    return {
        "output_dir": str(out),
        "max_steps": setting["steps"],
        "learning_rate": setting["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **({} if setting["precision"] == "auto" else {"bf16": setting["precision"] == "bf16"}),
        "seed": 42,
        "disable_tqdm": True,
    }


def trl(folder: Path, setting: dict[str, Any], *, packed: bool) -> list[dict[str, float]]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from trl import SFTConfig, SFTTrainer

    rows = json.loads((folder / "tokens.json").read_text())
    data = Dataset.from_list(
        [
            {"input_ids": row["ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in rows
        ]
    )
    steps, clock = counting(Trainer, setting)
    options: dict[str, Any] = {"per_device_train_batch_size": setting["batch"]}
    if packed:
        options = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": setting["packs"],
            "gradient_checkpointing": False,
            "packing": True,
            "packing_strategy": "bfd",
            "max_length": setting["pack_tokens"],
        }
    name = "trl_packed" if packed else "trl_defaults"
    # Half the weights to read: what whoever wants TRL quick in bf16 does. LLaMA-Factory does it by itself.
    dtype = torch.bfloat16 if setting["precision"] == "bf16" and packed else torch.float32
    model = AutoModelForCausalLM.from_pretrained(setting["base"], dtype=dtype)
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(setting["base"]),
        train_dataset=data,
        args=SFTConfig(**common(setting, folder / name), completion_only_loss=True, **options),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=setting["dropout"],
            target_modules=TARGETS,
        ),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(folder / name))
    return steps


def llama_factory(folder: Path, setting: dict[str, Any], *, packed: bool) -> list[dict[str, float]]:
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer

    steps, clock = counting(Trainer, setting)
    name = "lf_packed" if packed else "lf_defaults"
    arguments = {
        **common(setting, folder / name),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "model_name_or_path": setting["base_in_format"],
        "dataset_dir": str(folder),
        "dataset": "rows",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": setting["dropout"],
        "lora_target": ",".join(TARGETS),
        "per_device_train_batch_size": setting["batch"],
        "overwrite_cache": True,
    }
    if packed:
        arguments |= {
            "packing": True,
            "neat_packing": True,
            "cutoff_len": setting["pack_tokens"],
            "disable_gradient_checkpointing": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": setting["packs"],
        }
    run_exp(arguments, callbacks=[clock])
    return steps


def held_out(folder: Path, setting: dict[str, Any]) -> dict[str, float]:
    """Mean loss per label of the base and of every adapter, all computed by transformers' plain forward."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = json.loads((folder / "held.json").read_text())

    def loss_of(model: Any) -> float:
        summed, labels = 0.0, 0
        with torch.no_grad():
            for row in rows:
                logits = model(input_ids=torch.tensor([row["ids"]]), use_cache=False).logits[0, :-1]
                wanted = torch.tensor(row["labels"][1:])
                summed += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                labels += int((wanted != -100).sum())
        return summed / labels

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(setting["base"], dtype=torch.float32).eval()

    found = {"base": loss_of(base())}
    for name, adapter in setting["adapters"].items():
        found[name] = loss_of(PeftModel.from_pretrained(base(), adapter).eval())
    return found


def gemm(folder: Path, setting: dict[str, Any]) -> dict[str, float]:
    """GFLOP/s of matrix products at the model's sizes, forward and backward, weighted by their FLOPs."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(setting["base"])
    width, inner = config.hidden_size, config.intermediate_size
    kv = width * config.num_key_value_heads // config.num_attention_heads
    layer = [
        (width, width),
        (width, kv),
        (width, kv),
        (width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting["chosen_precision"]]
    found = {}
    for tokens in (512, 1024):
        seconds = flops = 0.0
        for size_in, size_out in layer:
            sizes = ((tokens, size_in), (size_out, size_in), (tokens, size_out))
            x, w, y = (torch.randn(size, dtype=dtype) for size in sizes)
            seconds += fastest(lambda x=x, w=w: torch.mm(x, w.t())) + fastest(lambda y=y, w=w: torch.mm(y, w))
            flops += 4 * tokens * size_in * size_out
        found[str(tokens)] = flops / seconds / 1e9
    return found


def fastest(work: Any, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


CONTENDERS = {
    "trl_defaults": lambda folder, setting: trl(folder, setting, packed=False),
    "trl_packed": lambda folder, setting: trl(folder, setting, packed=True),
    "lf_defaults": lambda folder, setting: llama_factory(folder, setting, packed=False),
    "lf_packed": lambda folder, setting: llama_factory(folder, setting, packed=True),
    "held_out": held_out,
    "gemm": gemm,
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    setting = json.loads((folder / "setting.json").read_text())
    result = CONTENDERS[name](folder, setting)
    (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
