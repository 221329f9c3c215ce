"""What a person may say about a training run, and the presets that say it for them."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sage_contracts.errors import UnknownPresetError

TASKS_GROUP = "sage.finetune.tasks"
"""Entry points of this group name the tasks that plug-ins bring."""


class Task(StrEnum):
    """What the tuned model is for; picks the data when the user gives none. Plug-ins may bring more."""

    CODE = "code"
    QA = "qa"
    CHAT = "chat"
    INSTRUCTION = "instruction"
    CUSTOM = "custom"

    @classmethod
    def add(cls, name: str) -> Task:
        """The task of that name, which from now on is one."""
        if name in cls._value2member_map_:
            return cls._value2member_map_[name]  # type: ignore[return-value]
        task = str.__new__(cls, name)
        task._name_, task._value_ = name.upper(), name
        cls._value2member_map_[name] = task
        return task

    @classmethod
    def _missing_(cls, value: object) -> Task | None:
        from importlib.metadata import entry_points

        # Pydantic asks here too: it knows only the members of when a model was defined.
        if isinstance(value, str) and (
            value in cls._value2member_map_ or value in entry_points(group=TASKS_GROUP).names
        ):
            return cls.add(value)
        return None


class PresetName(StrEnum):
    RTX_3060 = "rtx_3060"
    RTX_4090 = "rtx_4090"
    A100 = "a100"
    MINIMAL = "minimal"
    CPU = "cpu"
    AUTO = "auto"


Precision = Literal["auto", "fp32", "fp16", "bf16"]
Tracker = Literal["tensorboard", "wandb"]
Method = Literal["sft", "dpo", "orpo", "kto"]
OomRung = Literal[
    "halve_batch",
    "gradient_checkpointing",
    "load_in_8bit",
    "load_in_4bit",
    "halve_max_length",
    "smaller_rank",
]
"""One remedy for too little memory; the effective batch is always kept."""
CodeKind = Literal["docstring_body", "signature_body", "fill_middle", "question_code"]
"""What is asked about a function of a source tree."""
_MOST = 2**31 - 1
"""Of steps, rows, tokens: what every library that gets to see it can hold."""
PositiveInt = Annotated[int, Field(gt=0, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_path_text)]
"""Text; paths become theirs."""


def _replaced_by(field: str, value: Any) -> tuple[str, ...]:
    """Switches that a setting takes the place of: who asks for it means it instead of what a preset set."""
    quantisations = ("load_in_8bit", "load_in_4bit")
    if field in quantisations and value is True:
        return tuple(other for other in quantisations if other != field)
    return quantisations if (field, value) == ("tuning", "full") else ()


def _default_trackers() -> list[Tracker]:
    return ["tensorboard"]


class _HumanInput(BaseModel):
    # People assign to fields after construction (the published example does): check those too.
    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # JSON cannot say them: a job that has one could not be read again
    )


class LoRAConfig(_HumanInput):
    """Low-rank adapters. Source: Hu et al., "LoRA", arXiv:2106.09685."""

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Fraction = 0.05
    target_modules: list[str] | Literal["all-linear"] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    """Scale by alpha/sqrt(r). Source: Kalajdzievski, arXiv:2312.03732."""
    use_dora: bool = False
    """Train magnitude and direction apart. Source: Liu et al., arXiv:2402.09353."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """B's learning rate over A's. Source: Hayou et al., "LoRA+", arXiv:2402.12354."""


class TrainingConfig(_HumanInput):
    """Everything that decides a training run. The resolved form is stored with the job."""

    model_name: PathText = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    data_path: PathText | None = None
    output_dir: PathText | None = None
    task: Task = Task.CUSTOM
    preset: PresetName | None = None

    method: Method = "sft"
    """Supervised, or a preference method (its data are preference pairs)."""
    preference_beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly DPO and KTO hold the model to its base; the weight of ORPO's odds ratio."""
    tuning: Literal["lora", "full"] = "lora"
    """`full` trains every weight: for small models."""
    trainer: str = "lora"
    """Of those that are registered where the job runs; `lora` is ours."""

    num_train_epochs: Annotated[float, Field(gt=0, le=1_000_000)] = 3
    max_steps: Annotated[int, Field(ge=-1, le=_MOST)] = -1
    """Optimiser steps; -1 leaves it to the epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    optim: Literal["adamw_torch", "paged_adamw_8bit"] = "adamw_torch"
    per_device_train_batch_size: PositiveInt = 1
    gradient_accumulation_steps: PositiveInt = 16
    max_length: PositiveInt = 1024
    """Tokens; longer rows are truncated and counted."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    lora: LoRAConfig = Field(default_factory=LoRAConfig)

    code_kinds: list[CodeKind] = Field(default_factory=list)
    """For the task `code` with source code. Empty: bodies only, of all functions of a tree."""
    validation_fraction: Fraction = 0.1
    max_train_rows: Count = 0
    """0 takes every row."""
    max_eval_rows: Count = 64
    eval_steps: Count = 0
    """Optimiser steps between held-out evaluations; 0 evaluates before and after the run only."""
    early_stopping_patience: Count = 0
    """Evaluations without improvement before the run ends; 0 never ends it early."""
    keep_best: bool = True
    """With `eval_steps`: the adapter of the best evaluation is the result, not the last one's."""
    sample_prompts: list[str] = Field(default_factory=list)
    """Answered by the model at every evaluation and logged, so that a person can read how it gets on."""
    logging_steps: PositiveInt = 1
    save_steps: PositiveInt = 50
    save_total_limit: PositiveInt = 3
    oom_ladder: Literal["least_harm", "published", "off"] | list[OomRung] = "least_harm"
    """What is changed, in which order, when memory does not suffice; `published`: as the product page."""
    oom_may_truncate: bool = False
    """Whether the ladder may shorten `max_length` (rows lose their ends)."""
    max_rollbacks: Count = 2
    """Returns to the last good checkpoint, at a lower learning rate, after NaN or a sustained spike."""
    distributed: Literal["auto", "off", "ddp", "fsdp"] = "auto"
    """Several devices share every step: each with a copy of the model (ddp), or with shards of one (fsdp)."""
    num_devices: Count = 0
    """0 takes every device that is visible."""
    seed: int = 42
    report_to: list[Tracker] = Field(default_factory=_default_trackers)
    wandb_project: str | None = None
    """None: as WANDB_PROJECT says, else `sage-finetune`. The others are left to Weights & Biases likewise."""
    wandb_entity: str | None = None
    wandb_run_name: str | None = None
    wandb_tags: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations: set eval_steps too")
        return self

    @model_validator(mode="after")
    def _one_quantisation(self) -> Self:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other: set one of them")
        if self.tuning == "full" and (self.load_in_8bit or self.load_in_4bit):
            raise ValueError("tuning='full' trains every weight, so none can be quantised: use tuning='lora'")
        if self.tuning == "full" and self.method != "sft":
            raise ValueError(
                f"method={self.method!r} trains adapters on a base that stays: use tuning='lora'"
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        before, said = dict(self.__dict__), set(self.__pydantic_fields_set__)
        try:
            for other in _replaced_by(name, value):
                super().__setattr__(other, False)
            super().__setattr__(name, value)
        except ValidationError:
            # What looks at several fields does so once the new value is in place.
            self.__dict__.update(before)
            object.__setattr__(self, "__pydantic_fields_set__", said)
            raise

    @property
    def effective_batch_size(self) -> int:
        """Rows per optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def require_output_dir(self) -> Path:
        """The output folder, or a ValueError that says which field is missing."""
        if not self.output_dir:
            raise ValueError("output_dir is not set: name the folder that the adapter is written to")
        return Path(self.output_dir).expanduser()


_PRESETS: dict[PresetName, dict[str, Any]] = {
    PresetName.RTX_3060: {
        "load_in_8bit": True,
        "precision": "fp16",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "max_length": 1024,
        "optim": "paged_adamw_8bit",
        "gradient_checkpointing": True,
        "lora": {"r": 8, "lora_alpha": 16},
    },
    PresetName.RTX_4090: {
        "precision": "fp16",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_length": 2048,
        "optim": "adamw_torch",
    },
    PresetName.A100: {
        "precision": "bf16",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_length": 4096,
        "optim": "adamw_torch",
    },
    PresetName.MINIMAL: {
        "load_in_4bit": True,
        "precision": "fp16",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 32,
        "max_length": 512,
        "optim": "paged_adamw_8bit",
        "gradient_checkpointing": True,
        "lora": {"r": 4, "lora_alpha": 8},
    },
    # Measured on two cores with a 135M model: an effective batch of 8 at 2e-4 learns visibly in 40 steps.
    PresetName.CPU: {
        "precision": "auto",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_length": 512,
        "optim": "adamw_torch",
        "learning_rate": 2e-4,
        "num_train_epochs": 1,
    },
}


def preset_fields(name: str | PresetName) -> dict[str, Any]:
    """The fields a preset sets. `auto` sets none here: it is chosen from the machine before this is called.

    Raises: UnknownPresetError, naming the presets there are.
    """
    try:
        preset = PresetName(name)
    except ValueError:
        names = ", ".join(preset.value for preset in PresetName)
        raise UnknownPresetError(
            f"There is no preset {str(name)!r}. Choose one of: {names}.", param="preset"
        ) from None
    return dict(_PRESETS.get(preset, {}))


def overlay(fields: dict[str, Any], sparse: dict[str, Any]) -> dict[str, Any]:
    """Sparse fields over those they were built on: what was said later wins.

    `lora` is overlaid field by field; one quantisation takes the place of the other, and full tuning of both.
    Saying such things together in `sparse` stays a contradiction, for TrainingConfig to refuse.
    """
    merged = {**fields, **sparse}
    for field, value in sparse.items():
        for other in _replaced_by(field, value):
            if other not in sparse and fields.get(other):
                merged[other] = False
    if isinstance(sparse.get("lora"), dict) and isinstance(fields.get("lora"), dict):
        merged["lora"] = {**fields["lora"], **sparse["lora"]}
    return merged


class PresetConfigs:
    """The presets as constructors, as published: `PresetConfigs.rtx_3060()`."""

    @staticmethod
    def named(name: str | PresetName, **overrides: Any) -> TrainingConfig:
        """A fresh TrainingConfig of that preset. Raises: UnknownPresetError."""
        fields = {**preset_fields(name), "preset": PresetName(name)}
        return TrainingConfig.model_validate(overlay(fields, overrides))

    @classmethod
    def rtx_3060(cls) -> TrainingConfig:
        return cls.named(PresetName.RTX_3060)

    @classmethod
    def rtx_4090(cls) -> TrainingConfig:
        return cls.named(PresetName.RTX_4090)

    @classmethod
    def a100(cls) -> TrainingConfig:
        return cls.named(PresetName.A100)

    @classmethod
    def minimal(cls) -> TrainingConfig:
        return cls.named(PresetName.MINIMAL)

    @classmethod
    def cpu(cls) -> TrainingConfig:
        return cls.named(PresetName.CPU)
