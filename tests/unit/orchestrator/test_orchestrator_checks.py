"""Training files are checked beside the orchestrator and in the background: it outlives what is in one."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from tests.fakes.orchestrator_rig import Rig, open_rig, rows

from sage_contracts.config import Task
from sage_contracts.errors import (
    InvalidDataError,
    ModelNotFoundError,
    NotFoundError,
    SageError,
    ServiceUnavailableError,
    StorageFullError,
)
from sage_contracts.home import Home
from sage_contracts.jobs import CreateJobRequest, JobStatus
from sage_orchestrator.jobs.checking import DataFile, FileChecks
from sage_orchestrator.jobs.service import JobService

JOBS = "/v1/fine_tuning/jobs"
MIB = 2**20
LARGE_IN_MEMORY = b'{"x":[' + b"{}," * (5 * MIB) + b"{}]}\n"
"""A row of 15 MiB that takes 400 as objects."""


def endless_base(rig: Rig) -> str:
    """A base model whose template never ends, as far as anybody would wait."""
    folder = rig.home / "base_models" / "org--endless"
    folder.mkdir(parents=True)
    loops = "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    (folder / "chat_template.jinja").write_text(loops + "{{ messages[0]['content'] }}")
    return "org/endless"


def failure(rig: Rig, content: bytes, filename: str = "rows.jsonl", model: str = "smollm2-135m") -> Any:
    """How a job ends whose file is checked in the background."""
    job = rig.post(JOBS, {"model": model, "training_file": rig.upload(content, filename)})
    assert job["status"] == "validating_files"
    until(lambda: rig.job(job["id"])["status"] != "validating_files")
    return rig.job(job["id"])["error"]


def test_a_row_that_needs_too_much_memory_is_refused(home: Path) -> None:
    with open_rig(home, check_memory_bytes=128 * MIB) as rig:
        file_id = rig.upload(gzip.compress(rows() + b"\n" + LARGE_IN_MEMORY, 1), "rows.jsonl.gz")
        error = rig.post(JOBS, {"model": "smollm2-135m", "training_file": file_id}, status=400)["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "rows.jsonl.gz could not be checked within 128 MiB of memory: split it" in error["message"]


def test_in_the_background_it_fails_the_job(home: Path) -> None:
    with open_rig(home, sync_validation_bytes=100, check_memory_bytes=128 * MIB) as rig:
        error = failure(rig, rows() + b"\n" + LARGE_IN_MEMORY)
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "128 MiB of memory" in error["message"]


def test_a_check_that_dies_mute_says_how(tmp_path: Path) -> None:
    checks = FileChecks(Home(tmp_path), memory_bytes=128 * MIB, timeout_s=60, at_once_s=60)
    unreadable = DataFile(
        home=tmp_path,
        path=Path("/proc/self/mem"),
        filename="rows.jsonl",
        task=Task.CUSTOM,
        method="sft",
        model="smollm2-135m",
        is_held_out=False,
    )
    with pytest.raises(
        InvalidDataError, match=r"rows\.jsonl could not be checked: .* ended with exit code 1,"
    ):
        checks.check(unreadable)
    assert "OSError" in (tmp_path / "logs" / "checks.log").read_text()


def test_a_template_that_never_ends_fails_the_job(home: Path) -> None:
    with open_rig(home, sync_validation_s=0.5, check_timeout_s=1) as rig:
        error = failure(rig, rows(), model=endless_base(rig))
    assert error["code"] == "invalid_training_file"
    assert "within 1 s" in error["message"] and "chat template of org/endless" in error["message"]


def test_a_check_ends_with_its_orchestrator_and_is_begun_again(home: Path) -> None:
    for _ in range(4):
        with open_rig(home, sync_validation_s=0.01) as rig:
            if not rig.get(JOBS)["data"]:
                body = {"model": endless_base(rig), "training_file": rig.upload(rows())}
                assert rig.post(JOBS, body)["status"] == "validating_files"
            until(lambda: rig.parts.being_checked)
    with open_rig(home) as rig:
        assert rig.get(JOBS)["data"][0]["status"] == "validating_files"


class Ending(FileChecks):
    """The process ends with every check."""

    def check(self, file: DataFile) -> None:
        raise SystemExit


def test_a_check_that_twice_ended_the_process_is_not_begun_again(home: Path) -> None:
    with open_rig(home) as rig:
        checks = Ending(Home(home), memory_bytes=MIB, timeout_s=1, at_once_s=1)
        service = never_checking(rig, Home(home), checks)
        request = CreateJobRequest(model="smollm2-135m", training_file=rig.upload(rows(50)))
        job_id = service.create(request).id
        for _ in range(2):
            with pytest.raises(SystemExit):
                service.finish_validation(job_id)
            assert rig.job(job_id)["status"] == "validating_files"
        service.finish_validation(job_id)
        job = rig.job(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "invalid_training_file")
        assert "was begun 2 times" in job["error"]["message"]
        assert rig.messages(job_id)[-1] == job["error"]["message"]


@pytest.mark.parametrize(("more", "status"), [(b"", 200), (b'\n{"question": "why?"}', 400)])
def test_what_another_process_finds_is_answered_at_once(rig: Rig, more: bytes, status: int) -> None:
    file_id = rig.upload(gzip.compress(rows(50) + more), "rows.jsonl.gz")
    answer = rig.post(JOBS, {"model": "smollm2-135m", "training_file": file_id}, status=status)
    if more:
        assert "row 51, field answer" in answer["error"]["message"]
    else:
        assert answer["status"] == "queued"


def until(condition: Any, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def test_large_files_are_checked_in_the_background(home: Path) -> None:
    with open_rig(home, sync_validation_bytes=100) as rig:
        good, bad = rig.upload(rows(50)), rig.upload(rows(50) + b'\n{"question": "why?"}')
        # Both at once: the first answer must not wait for the check.
        jobs = [rig.post(JOBS, {"model": "smollm2-135m", "training_file": one}) for one in (good, bad)]
        assert [job["status"] for job in jobs] == ["validating_files"] * 2
        until(lambda: all(rig.job(job["id"])["status"] != "validating_files" for job in jobs))
        queued, failed = (rig.job(job["id"]) for job in jobs)
        assert queued["status"] == "queued" and rig.sweep() == [queued["id"]]
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "invalid_training_file"
        assert "row 51" in failed["error"]["message"]


def never_checking(rig: Rig, home: Home, checks: FileChecks | None = None) -> JobService:
    """Creates jobs as a process does that dies before it looks at their files."""
    return JobService(
        rig.parts.database,
        home,
        rig.clock,
        models=rig.parts.models,
        checks=checks or rig.parts.checks,
        sync_validation_bytes=100,
        training_device=lambda: None,
        wake=lambda: None,
        check_later=lambda job_id: None,
    )


def test_a_check_that_a_restart_interrupted_is_taken_up(home: Path) -> None:
    with open_rig(home) as rig:
        file_id = rig.upload(rows(50))
        request = CreateJobRequest(model="smollm2-135m", training_file=file_id)
        job = never_checking(rig, Home(home)).create(request)
        assert job.status is JobStatus.VALIDATING_FILES
    with open_rig(home) as rig:
        until(lambda: rig.job(job.id)["status"] == "queued")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_that_is_deleted_while_jobs_are_made_is_named(rig: Rig, param: str) -> None:
    ids = {name: rig.upload(rows(50)) for name in ("training_file", "validation_file")}
    # The second, which needs no file, is looked at when the first one's have been found.
    requests = [
        CreateJobRequest(model="smollm2-135m", **fields) for fields in (ids, {"sage": {"task": "code"}})
    ]
    resolved = []

    def delete_at_the_second() -> None:
        resolved.append(1)
        if len(resolved) == 2:
            rig.http.delete(f"/v1/files/{ids[param]}").raise_for_status()

    service = JobService(
        rig.parts.database,
        Home(rig.home),
        rig.clock,
        models=rig.parts.models,
        checks=rig.parts.checks,
        sync_validation_bytes=100,
        training_device=delete_at_the_second,
        wake=lambda: None,
        check_later=lambda job_id: None,
    )
    with pytest.raises(NotFoundError, match=ids[param]) as caught:
        service.create_together(requests)
    assert caught.value.param == param
    assert rig.get(JOBS)["data"] == []


@dataclass(frozen=True)
class RefusingHome(Home):
    """Whoever reads an uploaded file meets an error."""

    error: SageError

    def resolve(self, stored: str) -> Path:
        if stored.startswith("files/"):
            raise self.error
        return super().resolve(stored)


@pytest.mark.parametrize("error", [StorageFullError("The disk is full"), ServiceUnavailableError("busy")])
def test_a_check_that_was_cut_short_says_nothing_about_the_files(home: Path, error: SageError) -> None:
    with open_rig(home) as rig:
        file_id = rig.upload(rows(50))
        service = never_checking(rig, RefusingHome(home, error))
        job = service.create(CreateJobRequest(model="smollm2-135m", training_file=file_id))
        with pytest.raises(type(error)):
            service.finish_validation(job.id)
        assert rig.job(job.id)["status"] == "validating_files"


def test_a_check_that_no_later_one_would_pass_ends_the_job(home: Path) -> None:
    with open_rig(home) as rig:
        file_id = rig.upload(rows(50))
        service = never_checking(rig, RefusingHome(home, ModelNotFoundError("The base model is gone")))
        job = service.create(CreateJobRequest(model="smollm2-135m", training_file=file_id))
        service.finish_validation(job.id)
        assert rig.job(job.id)["status"] == "failed"
        assert "The base model is gone" in rig.job(job.id)["error"]["message"]


def test_a_check_whose_outcome_could_not_be_written_is_made_again(home: Path) -> None:
    with open_rig(home, sync_validation_bytes=100) as rig:
        refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ABORT, 'not now'); END"
        with rig.parts.database.write() as session:
            session.execute(text(refuse))
        file_id = rig.upload(rows(50))
        job = rig.post(JOBS, {"model": "smollm2-135m", "training_file": file_id})
        until(lambda: not rig.parts.being_checked)
        assert rig.job(job["id"])["status"] == "validating_files"
        with rig.parts.database.write() as session:
            session.execute(text("DROP TRIGGER refuse"))
        rig.parts.keep_house()
        until(lambda: rig.job(job["id"])["status"] == "queued")
        assert rig.sweep() == [job["id"]]
