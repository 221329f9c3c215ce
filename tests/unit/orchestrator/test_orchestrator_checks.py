"""Files that would take a process down with them, and templates that never end: the orchestrator lives on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.orchestrator_rig import Rig, open_rig, rows
from tests.unit.orchestrator.test_orchestrator_jobs import JOBS, never_checking, until

from sage_contracts.config import Task
from sage_contracts.errors import InvalidDataError
from sage_contracts.home import Home
from sage_contracts.jobs import CreateJobRequest
from sage_orchestrator.jobs.checking import DataFile, FileChecks

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
