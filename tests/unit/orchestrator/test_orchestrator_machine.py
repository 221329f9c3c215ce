"""A short walk through the job's state machine; the long ones are among the integration tests."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.fakes.orchestrator_machine import run_job_machine


def test_random_workers_owners_and_losses(tmp_path: Path, migrated: Path) -> None:
    run_job_machine(f"sqlite:///{shutil.copy(migrated, tmp_path)}", examples=8)
