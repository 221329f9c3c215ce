"""README.md beside the weights: what the model is, what it learned from, how good it got, how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sage.tools.finetune.base_models import is_hub_id
from sage.tools.finetune.quantisation import base_bits
from sage.tools.finetune.turn_ends import META_FIELD
from sage_contracts.config import TrainingConfig

_METHODS = {"sft": "supervised fine-tuning", "dpo": "DPO", "orpo": "ORPO", "kto": "KTO"}


Form = Literal["adapter", "full", "merged"]
"""What lies beside the card: an adapter, a model tuned in full, or a base with an adapter merged into it."""


def model_card(config: TrainingConfig, meta: dict[str, Any], *, is_merged: bool = False) -> str:
    """Markdown with the front matter that model hubs read. `meta` is what finetune_meta.json holds.

    `is_merged`: the card is for the base with the adapter merged into it.
    """
    name = Path(config.output_dir or "model").name
    form: Form = "full" if config.tuning == "full" else "merged" if is_merged else "adapter"
    sections = [_front_matter(config, meta, form), f"# {name}", _summary(config, meta, form)]
    sections += ["## How good it is", _quality(config, meta, form)]
    sections += ["## What it learned from", _data(config, meta)]
    sections += ["## How it was trained", _training(config, meta)]
    sections += ["## How to use it", _usage(config, meta, name, form)]
    sections += ["## Licence", _licence(config, meta)]
    return "\n\n".join(sections) + "\n"


def _front_matter(config: TrainingConfig, meta: dict[str, Any], form: Form) -> str:
    fields: dict[str, Any] = {}
    base = _hub_name(config, meta)
    if is_hub_id(base):  # hubs refuse a card that names a folder
        fields["base_model"] = base
    fields |= {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sage-finetune", config.task.value, *([] if form == "full" else ["lora"])],
    }
    if meta.get("base_licence"):
        fields["license"] = meta["base_licence"]
    # JSON is YAML, and quotes what needs it.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _hub_name(config: TrainingConfig, meta: dict[str, Any]) -> str:
    """Where a built-in base came from: others know it by that name."""
    return str(meta.get("base_upstream") or config.model_name)


def _summary(config: TrainingConfig, meta: dict[str, Any], form: Form) -> str:
    method, base = _METHODS[config.method], f"`{config.model_name}`"
    if meta.get("base_revision"):
        base += f", revision `{meta['base_revision']}`"
    what = {
        "adapter": f"A LoRA adapter tuned by {method} on top of {base}",
        "full": f"All weights tuned by {method} on top of {base}",
        "merged": f"A LoRA adapter, tuned by {method}, merged into {base}",
    }[form]
    when = meta["created_at"][:10]
    return f"{what}, for the task *{config.task.value}*. Made by SAGE Finetune on {when}."


def _quality(config: TrainingConfig, meta: dict[str, Any], form: Form) -> str:
    metrics = meta["metrics"]
    kinds = [("loss", "eval_loss", "{:.4f}"), ("perplexity", "perplexity", "{:.4g}")]
    kinds += [
        ("token accuracy", "token_accuracy", "{:.1%}"),
        ("better answer preferred", "reward_accuracy", "{:.1%}"),
    ]
    rows = [
        f"| {label} | {shown.format(metrics[f'base_{key}'])} | {shown.format(metrics[key])} |"
        for label, key, shown in kinds
        if metrics.get(key) is not None and metrics.get(f"base_{key}") is not None
    ]
    if not rows:
        return "No rows were held out, so nothing was measured."
    table = "\n".join(["| | base | tuned |", "|---|---|---|", *rows])
    return (
        f"On {meta['held_out_rows']} rows that it did not see in training:\n\n{table}\n\n"
        f"{_measured_on(base_bits(config), form)}That is how well it predicts answers like those of its "
        "data; ask it what matters to you before you rely on it."
    )


def _measured_on(bits: int | None, form: Form) -> str:
    """A paragraph where that is not what lies beside the card, or what its code loads; else ""."""
    if form == "merged" and bits:
        return (
            f"It was measured before merging, with the adapter on the base in {bits} bits, as it was "
            "trained. These weights are the base's in full precision with the adapter in them: they were not "
            "measured, and their figures are others.\n\n"
        )
    if form == "merged":
        return (
            "It was measured before merging, with the adapter beside its base, and not on these weights.\n\n"
        )
    if bits:
        return (
            f"It was measured on the base in {bits} bits, as it was trained. On the base in full precision, "
            "which the code below loads, its figures are others.\n\n"
        )
    return ""


def _data(config: TrainingConfig, meta: dict[str, Any]) -> str:
    cut = f" {meta['truncated_rows']} rows were longer and were cut." if meta.get("truncated_rows") else ""
    return (
        f"{meta['train_rows']} rows ({meta['data']}), of at most {config.max_length} tokens.{cut} "
        f"SHA-256 of the data: `{meta['data_sha256']}`."
    )


def _training(config: TrainingConfig, meta: dict[str, Any]) -> str:
    return "\n".join(f"- {fact}" for fact in _facts(config, meta))


def _facts(config: TrainingConfig, meta: dict[str, Any]) -> Iterator[str]:
    metrics, lora = meta["metrics"], config.lora
    yield f"{metrics['steps']} steps of {config.effective_batch_size} rows, seed {config.seed}"
    yield f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type}, {meta['precision']}"
    if config.tuning == "lora":
        kinds = [("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora), ("LoRA+", lora.loraplus_lr_ratio)]
        kind = ", ".join(name for name, is_used in kinds if is_used) or "LoRA"
        targets = (
            lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
        )
        yield f"{kind} r={lora.r}, alpha={lora.lora_alpha}, on {targets}"
    if bits := base_bits(config):
        yield f"the frozen base in {bits}-bit"
    if metrics.get("result_step") not in (None, metrics["steps"]):
        yield f"the weights are those of step {metrics['result_step']}, the best on the held-out rows"
    for one in meta.get("rollbacks", []):
        yield f"went back from step {one['step']} to {one['to_step']}, because of its loss ({one['reason']})"
    yield f"on {meta['device']}; " + ", ".join(f"{name} {found}" for name, found in meta["versions"].items())
    yield "every setting: `training_config.json`; every figure: `finetune_meta.json`"


def _usage(config: TrainingConfig, meta: dict[str, Any], name: str, form: Form) -> str:
    imports, load = "", 'model = AutoModelForCausalLM.from_pretrained(".")'
    if form == "adapter":
        imports = "from peft import PeftModel\n"
        load = (
            f'base = AutoModelForCausalLM.from_pretrained("{_hub_name(config, meta)}")\n'
            'model = PeftModel.from_pretrained(base, ".")'
        )
        if ends := meta.get(META_FIELD):
            load += f"\nmodel.generation_config.eos_token_id = {ends}  # its answers end there"
    return (
        f"With SAGE Finetune:\n\n```bash\nsage chat --backend finetune --finetune-model {name}\n```\n\n"
        f"In Python, in this folder:\n\n```python\n{imports}"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n{load}\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n\n'
        "Ask it through its chat template, which is the one it was trained with "
        f"(SHA-256 `{meta['chat_template_sha256']}`)."
    )


def _licence(config: TrainingConfig, meta: dict[str, Any]) -> str:
    known = meta.get("base_licence")
    about = f"is `{known}`" if known else "is not known here: look it up before you pass this on"
    return (
        f"The licence of the base model, `{config.model_name}`, {about}. It binds what is derived from it, "
        "these weights included; so may the licence of the data."
    )
