"""How an upload in parts ends: completed, cancelled, expired, over a restart and on a full disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.fakes.orchestrator_rig import HandClock, ListBell, Rig, open_rig
from tests.fakes.small_disk import files_no_larger_than
from tests.fakes.upload_calls import begin, cancel, complete, kept, param_and_message, send

from sage_orchestrator.main import build_app
from sage_orchestrator.settings import OrchestratorSettings

MIB = 2**20
HOUR_S = 3600


def test_an_upload_ends_once(rig: Rig) -> None:
    upload_id = begin(rig, 3)["id"]
    part_id = send(rig, upload_id, b"abc")["id"]
    done = complete(rig, upload_id, part_id)
    file_id = done["file"]["id"]
    for again in (
        send(rig, upload_id, b"abc", status=409),
        cancel(rig, upload_id, status=409),
    ):
        assert param_and_message(again) == ("upload_id", f"{upload_id} is completed: its file is {file_id}.")
    assert kept(rig.home) == [f"{file_id}.jsonl"]
    assert complete(rig, upload_id, part_id) == done, "whoever has lost the answer asks again"
    assert kept(rig.home) == [f"{file_id}.jsonl"]
    rig.http.delete(f"/v1/files/{file_id}")
    assert complete(rig, upload_id, part_id, status=404)["error"]["code"] == "not_found"


def test_of_completions_that_come_together_one_makes_a_file(rig: Rig) -> None:
    upload_id = begin(rig, 3)["id"]
    part_id = send(rig, upload_id, b"abc")["id"]
    together, answers = threading.Barrier(4), []

    def work() -> None:
        together.wait(10)
        answers.append(complete(rig, upload_id, part_id))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [answers[0]] * 4
    (file,) = rig.get("/v1/files")["data"]
    assert kept(rig.home) == [f"{file['id']}.jsonl"]


def test_a_cancelled_upload_takes_nothing_more(rig: Rig) -> None:
    upload = begin(rig, 6)
    part_id = send(rig, upload["id"], b"abc")["id"]
    assert cancel(rig, upload["id"]) == upload | {"status": "cancelled"}
    assert kept(rig.home) == []
    for refused in (
        send(rig, upload["id"], b"def", status=409),
        complete(rig, upload["id"], part_id, status=409),
        cancel(rig, upload["id"], status=409),
    ):
        assert refused["error"]["param"] == "upload_id"
        assert "is cancelled" in refused["error"]["message"]
    assert kept(rig.home) == []


@pytest.mark.parametrize("rest", [b"", b"def"], ids=["parts gone", "parts joined"])
def test_an_upload_that_is_cancelled_while_it_is_joined_makes_no_file(rig: Rig, rest: bytes) -> None:
    upload_id = begin(rig, 6)["id"]
    ids = [send(rig, upload_id, data)["id"] for data in (b"abc", b"def")]
    last = rig.home / "files" / "parts" / ids[-1]
    last.unlink()
    os.mkfifo(last)  # whoever reads it waits for us
    answers: list[Any] = []
    joining = threading.Thread(target=lambda: answers.append(complete(rig, upload_id, *ids, status=409)))
    joining.start()
    with last.open("wb") as slow:
        cancel(rig, upload_id)
        slow.write(rest)
    joining.join(30)
    assert param_and_message(answers[0])[1].startswith(f"{upload_id} is cancelled")
    assert kept(rig.home) == []
    assert rig.get("/v1/files")["data"] == []


def test_an_upload_that_is_not_there(rig: Rig) -> None:
    for refused in (
        send(rig, "upload-no", b"x", status=404),
        complete(rig, "upload-no", "part-no", status=404),
        cancel(rig, "upload-no", status=404),
    ):
        assert (refused["error"]["code"], refused["error"]["param"]) == ("not_found", "upload_id")


def test_after_an_hour_an_upload_has_expired(rig: Rig) -> None:
    upload_id, young_id = begin(rig, 6)["id"], ""
    part_id = send(rig, upload_id, b"abc")["id"]
    rig.clock.advance(HOUR_S - 1)
    young_id = begin(rig, 3)["id"]
    young_part = send(rig, young_id, b"abc")["id"]
    send(rig, upload_id, b"def")
    rig.clock.advance(1)
    for path in (rig.home / "files" / "parts").iterdir():
        os.utime(path, (rig.clock.now, rig.clock.now))  # young, so that only the end of its upload removes it
    # At once for whoever asks, and soon for the disk.
    refusals = [complete(rig, upload_id, part_id, status=409)]
    rig.parts.uploads.delete_expired()
    refusals += [send(rig, upload_id, b"abc", status=409), cancel(rig, upload_id, status=409)]
    for refused in refusals:
        assert param_and_message(refused)[1].startswith(f"{upload_id} is expired")
    assert kept(rig.home) == [f"parts/{young_part}"]
    assert complete(rig, young_id, young_part)["status"] == "completed"


def test_bytes_without_an_upload_are_removed(rig: Rig) -> None:
    upload_id = begin(rig, 3)["id"]
    part_id = send(rig, upload_id, b"abc")["id"]
    for name in ("part-lost", ".upload-abc"):
        (rig.home / "files" / "parts" / name).write_bytes(b"half")
    # The test's clock is far ahead of the files' times.
    rig.parts.uploads.delete_expired()
    assert kept(rig.home) == [f"parts/{part_id}"]


def test_parts_survive_a_restart(home: Path) -> None:
    with open_rig(home) as rig:
        upload_id = begin(rig, 6)["id"]
        first = send(rig, upload_id, b"abc")["id"]
    with open_rig(home) as rig:
        rig.parts.uploads.delete_expired()
        last = send(rig, upload_id, b"def")["id"]
        done = complete(rig, upload_id, first, last)
        assert rig.http.get(f"/v1/files/{done['file']['id']}/content").content == b"abcdef"


def test_a_running_orchestrator_removes_what_has_expired(home: Path) -> None:
    with open_rig(home) as rig:
        send(rig, begin(rig, 6)["id"], b"abc")
    clock = HandClock(HandClock.now + HOUR_S)
    app = build_app(OrchestratorSettings(home_dir=home), clock=clock, doorbell=ListBell())
    with TestClient(app):
        pause = threading.Event()
        for _ in range(200):
            if not kept(home):
                break
            pause.wait(0.05)
    assert kept(home) == []


def test_a_full_disk_leaves_the_upload_as_it_was(rig: Rig) -> None:
    upload_id = begin(rig, 8 * MIB)["id"]
    first, last = bytes(4 * MIB), b"x" * 4 * MIB
    with files_no_larger_than(3 * MIB):
        refused = send(rig, upload_id, first, status=507)
        assert refused["error"]["code"] == "insufficient_storage"
        assert kept(rig.home) == []
    ids = [send(rig, upload_id, data)["id"] for data in (first, last)]
    before = kept(rig.home)
    with files_no_larger_than(6 * MIB):
        refused = complete(rig, upload_id, *ids, status=507)
        assert "complete the upload again" in refused["error"]["message"]
        assert kept(rig.home) == before
        assert rig.get("/v1/files")["data"] == []
    assert complete(rig, upload_id, *ids)["file"]["bytes"] == 8 * MIB


def test_a_part_whose_bytes_are_gone_is_sent_again(rig: Rig) -> None:
    upload_id = begin(rig, 3)["id"]
    part_id = send(rig, upload_id, b"abc")["id"]
    (rig.home / "files" / "parts" / part_id).unlink()
    param, message = param_and_message(complete(rig, upload_id, part_id, status=404))
    assert param == "part_ids" and part_id in message
    assert kept(rig.home) == []
    assert send(rig, upload_id, b"abc")["id"] == part_id
    assert complete(rig, upload_id, part_id)["status"] == "completed"
