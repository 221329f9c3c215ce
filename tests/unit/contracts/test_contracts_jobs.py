"""The job's states, what a request may say, and the layout of the home."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sage_contracts.home import Home, replaced_whole, write_whole
from sage_contracts.jobs import CreateJobRequest, JobStatus
from sage_contracts.workers import ClaimRequest, TrainClaim


def test_nothing_leaves_a_terminal_state() -> None:
    terminal = {status for status in JobStatus if status.is_terminal}
    assert terminal == {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    assert not any(status.can_become(target) for status in terminal for target in JobStatus)


def test_every_state_can_be_reached_and_left() -> None:
    reached = {JobStatus.VALIDATING_FILES}
    while True:
        further = {target for status in reached for target in JobStatus if status.can_become(target)}
        if further <= reached:
            break
        reached |= further
    assert reached == set(JobStatus)
    for status in JobStatus:
        assert status.is_terminal or status.can_become(JobStatus.CANCELLED)


def test_only_a_queued_job_is_started() -> None:
    assert [status for status in JobStatus if status.can_become(JobStatus.RUNNING)] == [JobStatus.QUEUED]


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "../up", "a b", "-x", "x" * 65, "a@1", "base:x", "line\nbreak"]
)
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="suffix"):
        CreateJobRequest.model_validate({"model": "m", "suffix": name})


@pytest.mark.parametrize("name", ["code", "Code-2.5_x", "0", "x" * 64])
def test_plain_names_are_accepted(name: str) -> None:
    assert CreateJobRequest.model_validate({"model": "m", "suffix": name}).suffix == name


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"hyperparameters": {"batch_size": "big"}}, "batch_size"),
        ({"hyperparameters": {"learning_rate": 1}}, "learning_rate"),
        ({"method": {"type": "grpo"}}, "type"),
        ({"sage": {"task": "poetry"}}, "task"),
        ({"trainingfile": "file-1"}, "trainingfile"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ],
)
def test_a_wrong_request_names_the_field(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        CreateJobRequest.model_validate({"model": "m", **fields})


def test_messages_between_services_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="extra"):
        ClaimRequest.model_validate({"worker_id": "w", "extra": 1})
    with pytest.raises(ValidationError):
        TrainClaim.model_validate({"job_id": "j"})


def test_paths_are_stored_relative_so_that_homes_can_move(tmp_path: Path) -> None:
    home = Home(tmp_path)
    inside, outside = tmp_path / "files" / "a", Path("/elsewhere/b")
    assert home.relative(inside) == "files/a"
    assert home.relative(outside) == "/elsewhere/b"
    assert Home(Path("/moved")).resolve(home.relative(inside)) == Path("/moved/files/a")
    assert home.resolve("/elsewhere/b") == outside


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o644
    target = tmp_path / "taken"
    target.mkdir()
    (target / "x").touch()
    with pytest.raises(OSError):
        write_whole(target, "cannot replace a folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deep", "taken"]


def test_a_secret_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for _ in range(2):
        write_whole(path, "secret", mode=0o600)
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_not_finished_takes_no_place_and_leaves_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link"
    with replaced_whole(link) as unfinished:
        unfinished.symlink_to("one")
    with pytest.raises(RuntimeError), replaced_whole(link) as unfinished:
        unfinished.symlink_to("two")
        raise RuntimeError
    assert str(link.readlink()) == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_contracts_need_pydantic_alone() -> None:
    script = """
import pkgutil, sys, importlib, sage_contracts
for module in pkgutil.iter_modules(sage_contracts.__path__):
    importlib.import_module(f"sage_contracts.{module.name}")
print(sorted({"torch", "transformers", "fastapi", "httpx", "sqlalchemy", "celery"} & set(sys.modules)))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.strip() == "[]"
