"""Files that come in parts: joined whole, or not at all."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.orchestrator_rig import Rig, open_rig, rows
from tests.fakes.upload_calls import begin, complete, kept, param_and_message, send

MIB = 2**20
HOUR_S = 3600


def test_parts_become_a_file_in_the_order_of_their_ids(rig: Rig) -> None:
    content = rows(40)
    pieces = [content[start : start + 500] for start in range(0, len(content), 500)]
    upload = begin(rig, len(content), filename="C:\\data\\Rows.JSONL")
    now = int(rig.clock.now)
    assert upload == {
        "id": upload["id"],
        "object": "upload",
        "bytes": len(content),
        "created_at": now,
        "filename": "Rows.JSONL",
        "purpose": "fine-tune",
        "status": "pending",
        "expires_at": now + HOUR_S,
        "file": None,
    }
    parts = {number: send(rig, upload["id"], pieces[number]) for number in reversed(range(len(pieces)))}
    assert parts[0] == {
        "id": parts[0]["id"],
        "object": "upload.part",
        "created_at": now,
        "upload_id": upload["id"],
    }
    assert rig.get("/v1/files")["data"] == []
    rig.clock.advance(60)
    md5 = hashlib.md5(content).hexdigest().upper()
    done = complete(rig, upload["id"], *(parts[number]["id"] for number in range(len(pieces))), md5=md5)
    file = done["file"]
    assert done == upload | {"status": "completed", "file": file}
    assert (file["bytes"], file["created_at"], file["expires_at"]) == (len(content), now + 60, None)
    assert file == rig.get(f"/v1/files/{file['id']}")
    assert rig.http.get(f"/v1/files/{file['id']}/content").content == content
    assert kept(rig.home) == [f"{file['id']}.jsonl"]
    job = rig.create_job(training_file=file["id"])
    assert job["training_file"] == file["id"]
    rig.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert rig.http.delete(f"/v1/files/{file['id']}").json()["deleted"] is True
    assert kept(rig.home) == []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=6), data=st.data())
def test_any_parts_in_any_order(rig: Rig, pieces: list[bytes], data: st.DataObject) -> None:
    content = b"".join(pieces)
    upload_id = begin(rig, len(content))["id"]
    ids: dict[int, str] = {}
    for number in data.draw(st.permutations(range(len(pieces)))):
        ids[number] = send(rig, upload_id, pieces[number])["id"]
    done = complete(rig, upload_id, *(ids[number] for number in range(len(pieces))))
    assert rig.http.get(f"/v1/files/{done['file']['id']}/content").content == content


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": "many"}, 400, "bytes"),
        ({"bytes": 2**31 + 1}, 413, "bytes"),
        ({"filename": ""}, 400, "filename"),
        ({"filename": None}, 400, "filename"),
        ({"purpose": "fine-tune-results"}, 400, "purpose"),
        ({"purpose": "training"}, 400, "purpose"),
        ({"mime_type": None}, 400, "mime_type"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, 400, "expires_after"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, 400, "expires_after.anchor"),
        ({"parts": 3}, 400, "parts"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_at_once(
    rig: Rig, fields: dict[str, Any], status: int, param: str
) -> None:
    assert begin(rig, 5, status=status, **fields)["error"]["param"] == param


def test_the_file_expires_as_its_upload_asked(rig: Rig) -> None:
    upload = begin(rig, 2, expires_after={"anchor": "created_at", "seconds": 7200})
    assert upload["expires_at"] == int(rig.clock.now) + HOUR_S
    rig.clock.advance(100)
    file = complete(rig, upload["id"], send(rig, upload["id"], b"{}")["id"])["file"]
    assert file["expires_at"] == int(rig.clock.now) + 7200


def test_what_cannot_fit_on_the_disk_is_refused_before_it_is_sent(home: Path) -> None:
    with open_rig(home, max_file_bytes=2**62) as rig:
        assert begin(rig, 2**59, status=507)["error"]["code"] == "insufficient_storage"


def test_parts_never_have_more_than_the_upload(rig: Rig) -> None:
    upload_id = begin(rig, 10)["id"]
    first = send(rig, upload_id, b"123456")["id"]
    for too_much in (b"12345", b"x" * 11, b"x" * MIB):
        param, message = param_and_message(send(rig, upload_id, too_much, status=400))
        assert param == "data" and "10 `bytes`" in message
    assert kept(rig.home) == [f"parts/{first}"]
    second = send(rig, upload_id, b"7890")["id"]
    assert complete(rig, upload_id, first, second)["file"]["bytes"] == 10


def test_parts_that_come_together_share_the_room(rig: Rig) -> None:
    upload_id = begin(rig, 8)["id"]
    together, statuses = threading.Barrier(6), []

    def work(number: int) -> None:
        together.wait(10)
        files = {"data": ("upload", str(number).encode() * 3)}
        statuses.append(rig.http.post(f"/v1/uploads/{upload_id}/parts", files=files).status_code)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(statuses) == [200, 200, 400, 400, 400, 400]
    assert len(kept(rig.home)) == 2


def test_a_part_has_at_most_64_mib(rig: Rig) -> None:
    upload_id = begin(rig, 100 * MIB)["id"]
    refused = send(rig, upload_id, bytes(64 * MIB + 1), status=413)
    assert param_and_message(refused) == ("data", "A part has at most 64 MiB: send smaller ones.")
    assert kept(rig.home) == []
    send(rig, upload_id, bytes(64 * MIB))


@pytest.mark.parametrize(("name", "data"), [("file", b"x"), ("data", b"")])
def test_a_wrong_form_leaves_nothing(rig: Rig, name: str, data: bytes) -> None:
    upload_id = begin(rig, 5)["id"]
    assert send(rig, upload_id, data, status=400, name=name)["error"]["param"] == "data"
    assert kept(rig.home) == []


def test_a_part_that_breaks_off_leaves_nothing(rig: Rig) -> None:
    upload_id = begin(rig, 5)["id"]
    response = rig.http.post(
        f"/v1/uploads/{upload_id}/parts",
        content=b'--B\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\nabc',
        headers={"content-type": "multipart/form-data; boundary=B"},
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "data")
    assert kept(rig.home) == []


def test_a_part_that_is_sent_again_is_the_same_part(rig: Rig) -> None:
    """As after an answer that was lost: the client repeats it, and the whole still fits."""
    upload_id = begin(rig, 6)["id"]
    first = send(rig, upload_id, b"abc")["id"]
    last = send(rig, upload_id, b"def")["id"]
    assert [send(rig, upload_id, b"abc")["id"], send(rig, upload_id, b"def")["id"]] == [first, last]
    done = complete(rig, upload_id, first, last)
    assert rig.http.get(f"/v1/files/{done['file']['id']}/content").content == b"abcdef"


def test_a_part_counts_as_often_as_it_was_sent(rig: Rig) -> None:
    upload_id = begin(rig, 6)["id"]
    part_id = send(rig, upload_id, b"abc")["id"]
    param, message = param_and_message(complete(rig, upload_id, part_id, part_id, status=400))
    assert param == "part_ids" and "2 times" in message
    assert send(rig, upload_id, b"abc")["id"] == part_id
    done = complete(rig, upload_id, part_id, part_id)
    assert rig.http.get(f"/v1/files/{done['file']['id']}/content").content == b"abcabc"


def test_a_completion_that_is_wrong_can_be_put_right(rig: Rig) -> None:
    upload_id, other_id = begin(rig, 6)["id"], begin(rig, 6)["id"]
    first, last = (send(rig, upload_id, data)["id"] for data in (b"abc", b"def"))
    foreign = send(rig, other_id, b"def")["id"]
    md5 = hashlib.md5(b"abcdef").hexdigest()
    wrong: list[tuple[list[str], dict[str, Any], str, str]] = [
        ([first], {}, "part_ids", "3 bytes together"),
        ([first, foreign], {}, "part_ids", foreign),
        ([first, "part-no"], {}, "part_ids", "part-no"),
        ([], {}, "part_ids", "at least 1 item"),
        ([last, first], {"md5": md5}, "md5", md5),
        ([first, last], {"md5": "abc"}, "md5", "pattern"),
    ]
    before = kept(rig.home)
    for part_ids, fields, param, words in wrong:
        refused = param_and_message(complete(rig, upload_id, *part_ids, status=400, **fields))
        assert refused[0] == param and words in refused[1]
        assert kept(rig.home) == before
    assert complete(rig, upload_id, first, last, md5=md5)["status"] == "completed"


def test_parts_that_are_not_named_are_not_kept(rig: Rig) -> None:
    upload_id = begin(rig, 6)["id"]
    twice, _, _ = (send(rig, upload_id, data)["id"] for data in (b"abc", b"def", b"abc"))
    file = complete(rig, upload_id, twice, twice)["file"]
    assert kept(rig.home) == [f"{file['id']}.jsonl"]
