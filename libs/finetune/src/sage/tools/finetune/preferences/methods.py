"""TRL's trainers, given our rows, our optimizer and our way of reporting.

Their own tokenising is left out: the rows are ids already, rendered and cut like those of supervised runs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.ladder import fewest_at_once
from sage.tools.finetune.learning_rate import rate_factor
from sage.tools.finetune.modeling import save_weights
from sage.tools.finetune.preferences.progress import Progress
from sage.tools.finetune.preferences.samples import PairSample, RatedSample, mixed, swapped_answers
from sage.tools.finetune.random_numbers import RandomNumbers
from sage.tools.finetune.run_parts import RunParts
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError

_HEADS = ("lm_head", "embed_out")
"""What models call their output layer."""
NEVER = 10**9
"""A number of steps that no run reaches."""


def require_trainable(config: TrainingConfig) -> None:
    """Raises: InvalidRequestError, for adapters that DPO and KTO cannot train or be compared without."""
    if config.method not in ("dpo", "kto"):
        return
    _require_fixed_reference(config)
    targets = config.lora.target_modules
    heads = [] if isinstance(targets, str) else [t for t in targets if t.rpartition(".")[2] in _HEADS]
    if heads:
        raise InvalidRequestError(
            f"TRL computes {config.method} from the weights of the output layer themselves, so that an "
            f"adapter on {heads[0]} would never train. Leave it out of lora.target_modules, or use "
            "method=orpo.",
            param="lora.target_modules",
        )


def _require_fixed_reference(config: TrainingConfig) -> None:
    """They compare with the model as it was. Raises: InvalidRequestError, where that would move."""
    if config.lora.bias == "none":
        return
    raise InvalidRequestError(
        f"{config.method} compares with the base, which is the model with its adapters switched off; with "
        f"lora.bias={config.lora.bias} the base's own biases train, and it would be compared with itself. "
        "Set lora.bias=none, or use method=orpo, which has no reference.",
        param="lora.bias",
    )


def batch_shape(config: TrainingConfig) -> tuple[int, int]:
    """(rows at once, accumulation) with the effective batch as asked.

    KTO needs two rows at once, for their answers to be swapped. Raises: InvalidRequestError.
    """
    at_once, rows = config.per_device_train_batch_size, config.effective_batch_size
    if config.method != "kto" or at_once > 1:
        return at_once, config.gradient_accumulation_steps
    if rows == 1:
        raise InvalidRequestError(
            "kto compares the answers of a batch: raise gradient_accumulation_steps or "
            "per_device_train_batch_size, so that a batch has two rows or more.",
            param="per_device_train_batch_size",
        )
    at_once = fewest_at_once(config)
    return at_once, rows // at_once


def make_trainer(
    config: TrainingConfig,
    parts: RunParts,
    rows: Sequence[PairSample] | Sequence[RatedSample],
    schedule: Schedule,
    checkpoints: Path,
    progress: Progress[Any],
) -> Any:
    """A trainer of the config's method, ready for `train()`."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from torch.optim.lr_scheduler import LambdaLR
    from transformers.trainer_callback import PrinterCallback

    disable_progress_bar()
    settings, trainer_class = _trl(config.method)
    # The trainers give it a padding token where it has none; ours is saved with the adapter as it came.
    tokenizer = copy.deepcopy(parts.tokenizer)
    # What pads is masked, so that of a tokenizer with neither any token will do.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    rates = LambdaLR(
        parts.optimizer,
        lambda step: (
            progress.rate_scale
            * rate_factor(config.lr_scheduler_type, step, schedule.total_steps, config.warmup_ratio)
        ),
    )
    trained = [(value, value.data) for value in parts.model.parameters() if value.requires_grad]
    trainer = _reporting(trainer_class, progress)(
        model=parts.model,
        args=_arguments(settings, config, parts, schedule, checkpoints),
        train_dataset=Dataset.from_dict(_columns(config, rows)),
        processing_class=tokenizer,
        callbacks=[_callback(progress, rates)],
    )
    if "ref" in parts.model.peft_config:
        # A copy of adapters that do nothing yet: switching them off is the same, and costs no memory.
        parts.model.delete_adapter("ref")
    for parameter, numbers in trained:
        # Of a quantised base the trainers round adapters to bf16, too coarse for small updates; and fp16's
        # scaler has no kernel for it.
        parameter.data = numbers
    trainer.remove_callback(PrinterCallback)
    trainer.optimizer, trainer.lr_scheduler = parts.optimizer, rates
    return trainer


def save_last_step(trainer: Any, progress: Progress[Any]) -> None:
    """Give up the step that is under way, and save as of the one before, unless that is done."""
    trainer.model.zero_grad(set_to_none=True)
    if progress.random is None or progress.state.step <= progress.saved_step:
        return
    progress.random.put_back()
    trainer._save_checkpoint(trainer.model, trial=None)
    progress.saved(Path(trainer.args.output_dir) / f"checkpoint-{progress.state.step}")


def _trl(method: str) -> tuple[Any, Any]:
    """(the arguments' class, the trainer's class)"""
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer
    if method == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOConfig, KTOTrainer
    # It says on import that it may change; our tests would notice.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOConfig, ORPOTrainer


def _arguments(
    settings: Any, config: TrainingConfig, parts: RunParts, schedule: Schedule, checkpoints: Path
) -> Any:
    at_once, accumulation = batch_shape(config)
    is_cpu = parts.device == "cpu"
    arguments = settings(
        output_dir=str(checkpoints),
        beta=config.preference_beta,
        max_length=config.max_length,
        max_steps=schedule.total_steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        fp16=parts.precision == "fp16" and not is_cpu,
        bf16=parts.precision == "bf16" and not is_cpu,
        use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        seed=config.seed % 2**32,  # numpy takes no others
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=min(config.save_steps, NEVER),
        save_total_limit=None,  # older ones go when the new one is known to be whole
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    # Else a batch goes to every GPU that is visible: DPO and KTO refuse that, ORPO takes so many batches.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _columns(
    config: TrainingConfig, rows: Sequence[PairSample] | Sequence[RatedSample]
) -> dict[str, list[Any]]:
    """The rows as the trainers' collators want them after tokenising: (tokens,) arrays, a row each."""
    pairs = [row for row in rows if isinstance(row, PairSample)]
    if config.method == "dpo":
        return {
            "prompt_ids": [_ids(row.prompt) for row in pairs],
            "chosen_ids": [_ids(row.chosen) for row in pairs],
            "rejected_ids": [_ids(row.rejected) for row in pairs],
        }
    if config.method == "orpo":
        chosen = _orpo_columns("chosen", [(row.prompt, row.chosen) for row in pairs])
        return chosen | _orpo_columns("rejected", [(row.prompt, row.rejected) for row in pairs])
    rated = mixed([row for row in rows if isinstance(row, RatedSample)])
    return {
        "prompt_ids": [_ids(row.prompt) for row in rated],
        "completion_ids": [_ids(row.answer) for row in rated],
        "KL_completion_ids": [_ids(other) for other in swapped_answers(rated, batch_shape(config)[0])],
        "label": [row.is_desirable for row in rated],
    }


def _orpo_columns(name: str, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, list[Any]]:
    return {
        f"{name}_input_ids": [_ids([*prompt, *answer]) for prompt, answer in texts],
        f"{name}_attention_mask": [_ids([1] * (len(prompt) + len(answer))) for prompt, answer in texts],
        f"{name}_labels": [_ids([*[IGNORED] * len(prompt), *answer]) for prompt, answer in texts],
    }


def _ids(tokens: Sequence[int]) -> Any:
    """As Arrow takes them without an object for each token, a lot of memory for all rows at once."""
    import numpy

    return numpy.asarray(tokens, dtype=numpy.int32)


def _reporting(trainer_class: Any, progress: Progress[Any]) -> Any:
    """The trainer with what happens between its callbacks."""

    class Reporting(trainer_class):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            progress.forward(inputs)
            return super().training_step(model, inputs, *rest, **more)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # of DPO and KTO: tokenised already

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature  # of ORPO: likewise

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """The run writes its own."""

        def _save(self, output_dir: str, state_dict: Any = None) -> None:
            # Their own way asks the Hub about the base, and keeps an output layer that has adapters whole.
            save_weights(self.model, Path(output_dir))

        def _send_telemetry(self) -> None:
            """What is trained here is nobody else's business."""

    return Reporting


def _callback(progress: Progress[Any], rates: Any) -> Any:
    from transformers import TrainerCallback

    class Telling(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._has_begun = False
            # A checkpoint brings the rate that was to be next when it was written: a rollback cuts it.
            for group, share in zip(rates.optimizer.param_groups, rates.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * share(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self._has_begun:
                progress.began()
            self._has_begun = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:  # the summary at the end
                return
            progress.step_logged(state.global_step, logs)
            if progress.wish() or progress.has_ended_early:
                control.should_save = control.should_training_stop = True
            elif progress.is_best_now:
                control.should_save = True
            progress.random = RandomNumbers.now()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Telling()
