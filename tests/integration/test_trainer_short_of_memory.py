"""The real trainer and its real child on a machine whose memory does not suffice: the job ends well."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.short_of_memory import VARIABLE
from tests.fakes.tiny_llama import make_model
from tests.fakes.worker_rig import Rig, rig

from sage_contracts.config import LoRAConfig, TrainingConfig
from sage_contracts.workers import Outcome

TRAINING_S = 180.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Rig]:
    with rig("folders", tmp_path) as made:
        (made.home / "files").mkdir()
        rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(40)]
        (made.home / "files/file-1").write_text("\n".join(json.dumps(row) for row in rows))
        made.env["SAGE_TRAIN_CHILD_COMMAND"] = f'["{sys.executable}", "-m", "tests.fakes.short_of_memory"]'
        made.env["SAGE_TRAIN_THREADS"] = "1"
        made.env["PYTHONPATH"] = f"{ROOT}:{':'.join(sys.path)}"
        yield made


def config(base: Path, **fields: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model_name": str(base),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "max_length": 128,
            "lora": LoRAConfig(r=4, lora_alpha=8),
            "report_to": [],
            **fields,
        }
    )


def test_a_child_that_the_system_kills_is_followed_by_one_that_fits(short: Rig, tiny_base: Path) -> None:
    # Four rows are some 134 tokens, two some 70. Where a chip trains in bf16, passes are filled up.
    settings = config(tiny_base, precision="fp32")
    job = short.records.add_job("job-1", "sums", config=settings, training_path="files/file-1")
    short.start_worker(**{VARIABLE: "kill:100"})
    short.ring("job-1")

    (finish,) = short.records.wait_for(lambda: job.finishes, TRAINING_S)

    assert finish.outcome is Outcome.SUCCEEDED, finish.error_message
    assert job.claims == 1
    assert any("signal SIGKILL" in text and "with halve_batch" in text for text in job.messages)
    assert finish.metrics.oom_rungs == ["halve_batch"]
    (rung,) = finish.meta["oom_rungs"]
    assert rung["change"] == "per_device_train_batch_size 4 → 2, gradient_accumulation_steps 1 → 2"


def test_a_real_limit_on_the_memory_is_met_and_kept(short: Rig, tmp_path: Path) -> None:
    # Some 0.8 MB of activations a token: eight rows of 60 do not fit into what is left, two do.
    base = make_model(tmp_path / "wide", intermediate_size=32_768)
    sizes = {"per_device_train_batch_size": 8, "max_length": 64, "max_steps": 1, "max_eval_rows": 8}
    settings = config(base, precision="fp32", **sizes)  # whatever the chip has units for
    job = short.records.add_job("job-1", "sums", config=settings, training_path="files/file-1")
    # By torch's operations, whatever compiler is here: kernels in C hold less at once.
    limit = {VARIABLE: f"limit:{260 << 20}", "MALLOC_ARENA_MAX": "1", "SAGE_CPU_KERNELS": "0"}
    short.start_worker(**limit)
    short.ring("job-1")

    (finish,) = short.records.wait_for(lambda: job.finishes, TRAINING_S)

    assert finish.outcome is Outcome.SUCCEEDED, finish.error_message
    assert "halve_batch" in finish.metrics.oom_rungs
    assert any("allocate memory" in text and "halve_batch" in text for text in job.messages)
    # Not in the same process, whose heap is full of holes, but in a new one.
    assert any("Going on with what was changed for lack of memory" in text for text in job.messages)
