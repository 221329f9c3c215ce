"""What a run is made of once its base model is a folder: device, precision, model, tokenizer, optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.hardware import (
    keep_freed_memory,
    pick_device,
    resolve_precision,
    set_threads,
    torch_dtype,
)
from sage.tools.finetune.kernels import apply_liger, kernels_of, varlen_attentions
from sage.tools.finetune.ladder import CPU_TOKEN_BUDGET, token_budget
from sage.tools.finetune.loss_choice import choose_loss
from sage.tools.finetune.losses import AutocastLoss, LossFunction
from sage.tools.finetune.modeling import (
    add_adapters,
    is_whole,
    load_base,
    load_tokenizer,
    load_weights,
    make_optimizer,
    name_base,
    parameter_counts,
    unmatched_targets,
)
from sage.tools.finetune.positions import beyond_positions, positions_of
from sage.tools.finetune.random_numbers import RandomNumbers
from sage.tools.finetune.rendering import ChatRenderer, RenderStats, Sample, Samples
from sage.tools.finetune.row_supply import parts_needed
from sage.tools.finetune.task_data import Splits
from sage.tools.finetune.turn_ends import with_turn_ends
from sage_contracts.config import OomRung, TrainingConfig
from sage_contracts.errors import InvalidDataError

GPU_EVAL_TOKENS = 2048
"""Tokens per forward pass of an evaluation on a GPU."""


class RunParts:
    """Built in the order that fails early: what is cheap to check comes before the weights."""

    def __init__(
        self,
        config: TrainingConfig,
        base: Path,
        tell: TrainingCallback,
        rungs: Sequence[OomRung] = (),
        *,
        load_on: str | None = None,
    ) -> None:
        import torch

        self._config = config
        self._rungs = rungs
        self._tell = tell
        self.device = pick_device()
        self.precision, note = resolve_precision(config.precision, self.device)
        threads = set_threads()
        if self.device == "cpu":
            keep_freed_memory()
        self._warn(note)
        self.tokenizer = load_tokenizer(base)
        self.renderer = ChatRenderer(self.tokenizer, config.max_length)
        self.train_stats = RenderStats()
        """Of the training rows alone, as soon as `count_train_rows` was called."""
        self._positions = positions_of(base)
        torch.manual_seed(config.seed)
        will_move = load_on is not None
        model = load_base(base, config, load_on or self.device, self.precision, will_move=will_move)
        self.renderer.require_known(model.get_input_embeddings().weight.shape[0])
        kernels = kernels_of(self.device, self.precision)
        self._warn(kernels.problem)
        self._kernels = varlen_attentions(kernels.attention)
        if kernels.has_liger:
            apply_liger(model, self._warn)
        self.model = model
        if config.tuning == "lora":
            self.model = add_adapters(model, config.lora)
            name_base(self.model, config.model_name, base)
            self._warn(unmatched_targets(self.model))
        self.optimizer, note = make_optimizer(self.model, config, self.device)
        self._warn(note)
        # fp16's range is too small for the gradients of a mean over many tokens.
        needs_scaling = self.precision == "fp16" and self.device != "cpu"
        self.scaler = torch.amp.GradScaler(self.device) if needs_scaling else None
        self._start = _Start(base, self.model, self.optimizer, self.scaler)
        trained, total = parameter_counts(self.model)
        where = f"{self.device}, {threads} threads" if self.device == "cpu" else self.device
        tell.on_log("info", f"Training {trained:,} of {total:,} parameters in {self.precision} on {where}")

    def restart(self) -> None:
        """Put everything that training changes back to what it was at first."""
        self._start.put_back(self.model, self.optimizer, self.scaler)

    @property
    def token_budget(self) -> int:
        """Tokens per forward pass of training."""
        return token_budget(self._config, self.device, self._rungs)

    @property
    def rows_at_once(self) -> int | None:
        """Rows per forward pass of training; None: as many as the tokens allow, until memory says no."""
        return self._config.per_device_train_batch_size if "halve_batch" in self._rungs else None

    @property
    def eval_token_budget(self) -> int:
        """Tokens per forward pass of an evaluation, which keeps nothing for a backward pass."""
        budget = CPU_TOKEN_BUDGET[self.precision] if self.device == "cpu" else GPU_EVAL_TOKENS
        return min(budget, self.token_budget) if self._rungs else budget

    def render(self, splits: Splits) -> tuple[Samples, Samples, int]:
        """(training samples, held-out samples, rows that no step gets to). Raises: InvalidDataError."""
        train, left = Samples(), len(splits.train)
        for part in parts_needed(self._config, splits.train, lambda: len(train)):
            train.extend(self.renderer.samples(part))
            left -= len(part)
        self.count_train_rows()
        held = self.renderer.samples(splits.validation)
        self.stop_at_turn_ends()
        self.report_cuts("their whole answer")
        if not train:
            raise InvalidDataError(
                f"No row has an answer within max_length={self._config.max_length} tokens. Raise max_length."
            )
        self.tell_rows()
        return train, held, left

    def count_train_rows(self) -> None:
        """Call when all of them are rendered, and no other rows."""
        self.train_stats = replace(self.renderer.stats)

    def report_cuts(self, lost: str) -> None:
        """Warn of rows that were cut, held-out ones included, and of those that `lost` what they are for."""
        stats, limit = self.renderer.stats, self._config.max_length
        if stats.truncated or stats.dropped:
            left_out = f"; {stats.dropped} more lost {lost} and are left out" if stats.dropped else ""
            self._warn(f"{stats.truncated} rows were cut at max_length={limit} tokens{left_out}")

    def tell_rows(self) -> None:
        """Warn where the rows rendered so far are longer than what the base model was made for, or hold the
        marks of its template."""
        self._warn(beyond_positions(self.renderer.stats.longest, self._positions))
        self._warn(self.renderer.marked.note())

    def stop_at_turn_ends(self) -> None:
        """Have the model stop where the rendered rows teach it to: its base may stop at other tokens only."""
        generation = self.model.generation_config
        generation.eos_token_id = with_turn_ends(generation.eos_token_id, self.renderer.turn_end_ids)

    def loss(self, samples: Sequence[Sample]) -> LossFunction:
        """The fast loss, when it is exact for this model."""
        from torch import autocast

        if not is_whole(self.model) or self.precision == "fp32":
            return choose_loss(self.model, samples, self._warn, self._kernels)
        # Its weights stay in fp32; only the work is done in half precision.
        half = (self.device, torch_dtype(self.precision))
        with autocast(*half):
            loss = choose_loss(self.model, samples, self._warn, self._kernels)
        return AutocastLoss(loss, *half)

    def _warn(self, message: str) -> None:
        if message:
            self._tell.on_log("warn", message)


class _Start:
    """What training changes, before it has."""

    def __init__(self, base: Path, model: Any, optimizer: Any, scaler: Any) -> None:
        self._base = base
        # A whole model is read again instead of held twice.
        kept = () if is_whole(model) else _trained(model)
        self._weights = {name: value.detach().clone() for name, value in kept}
        self._optimizer = deepcopy(optimizer.state_dict())
        self._scaler = scaler.state_dict() if scaler else None
        self._random = RandomNumbers.now()

    def put_back(self, model: Any, optimizer: Any, scaler: Any) -> None:
        import torch

        if is_whole(model):
            load_weights(model, self._base)
        else:
            with torch.no_grad():
                for name, value in _trained(model):
                    value.copy_(self._weights[name])
        optimizer.load_state_dict(deepcopy(self._optimizer))
        if scaler:
            scaler.load_state_dict(self._scaler)
        self._random.put_back()


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)
