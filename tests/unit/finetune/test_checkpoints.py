"""Whose checkpoints are whose, also across versions of this program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage_contracts.config import LoRAConfig

RUN: dict[str, Any] = {
    "run_id": "job",
    "seed": 42,
    "lora": LoRAConfig().model_dump(mode="json"),
    "tuning": "lora",
}


def run(**changes: Any) -> dict[str, Any]:
    return {**RUN, **changes}


def older_run() -> dict[str, Any]:
    """As it was written down before full tuning and DoRA were known."""
    lora = {key: value for key, value in RUN["lora"].items() if key != "use_dora"}
    return {"run_id": "job", "seed": 42, "lora": lora}


def newest(folder: Path, fingerprint: dict[str, Any]) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return Checkpoints(folder, fingerprint).newest_whole(warnings.append), warnings


def seal(folder: Path, fingerprint: dict[str, Any]) -> Path:
    target = folder / "checkpoint-3"
    target.mkdir()
    Checkpoints(folder, fingerprint).seal(target, RunState(step=3))
    return target


def test_a_checkpoint_from_before_a_setting_was_known_is_of_a_run_that_leaves_it_alone(
    tmp_path: Path,
) -> None:
    assert newest(tmp_path, run()) == (None, [])
    saved = seal(tmp_path, older_run())
    assert newest(tmp_path, run()) == (saved, [])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tuning": "full"}, "tuning"),
        ({"lora": LoRAConfig(use_dora=True).model_dump(mode="json")}, "lora"),
        ({"seed": 7}, "seed"),
        ({"run_id": "another"}, "run_id"),
        ({"data_sha256": "5e1f"}, "data_sha256"),
    ],
)
def test_it_is_of_another_run_where_that_uses_the_setting(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    seal(tmp_path, older_run())
    warning = f"Checkpoint checkpoint-3 is not used: it is of another run ({named} differ)"
    assert newest(tmp_path, run(**changes)) == (None, [warning])
