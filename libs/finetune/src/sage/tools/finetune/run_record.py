"""What a finished run writes down about itself: where its weights come from, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from sage.tools.finetune.base_models import base_info, hub_name
from sage.tools.finetune.callbacks import perplexity
from sage.tools.finetune.ladder import Rung
from sage.tools.finetune.outputs import package_versions
from sage.tools.finetune.quantisation import base_bits
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.turn_ends import META_FIELD
from sage_contracts.config import TrainingConfig

Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class RunRecord:
    """What finetune_meta.json holds."""

    config: TrainingConfig
    home: Path
    base: Path
    splits: Any
    """Has a `description` and a `fingerprint()`, whatever its rows are."""
    parts: RunParts
    rungs: Sequence[Rung]
    devices: int

    def meta(
        self, metrics: Metrics, *, train_rows: int, held_out_rows: int, loss_name: str
    ) -> dict[str, Any]:
        config, base, parts = self.config, self.base, self.parts
        info = base_info(base)
        return {
            "base_model": str(base.relative_to(self.home)) if base.is_relative_to(self.home) else str(base),
            "base_model_name": config.model_name,
            "base_revision": info.get("revision"),
            "base_licence": info.get("license"),
            "base_upstream": hub_name(config.model_name, base),
            "task": config.task.value,
            "tuning": config.tuning,
            "preset": config.preset.value if config.preset else None,
            "data": self.splits.description,
            "data_sha256": self.splits.fingerprint(),
            "chat_template_sha256": parts.renderer.template_hash,
            META_FIELD: parts.renderer.turn_end_ids,
            "train_rows": train_rows,
            "held_out_rows": held_out_rows,
            "truncated_rows": parts.train_stats.truncated,
            "dropped_rows": parts.train_stats.dropped,
            "devices": self.devices,
            "oom_rungs": [{"name": rung.name, "change": rung.change} for rung in self.rungs],
            "device": parts.device,
            "precision": parts.precision,
            "loss_path": loss_name,
            "metrics": metrics,
            # What the metrics were measured on: bits of a quantised base, null for one in full precision.
            "measured_base_bits": base_bits(config),
            "versions": package_versions(),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def score_metrics(prefix: str, loss: float | None, token_accuracy: float | None) -> dict[str, float | None]:
    """The scores on held-out rows under the names that metrics have.

    None where nothing was measured, or what was is no number: JSON has none for it.
    """
    return {
        f"{prefix}eval_loss": _number(loss),
        f"{prefix}perplexity": None if loss is None else _number(perplexity(loss)),
        f"{prefix}token_accuracy": token_accuracy,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
