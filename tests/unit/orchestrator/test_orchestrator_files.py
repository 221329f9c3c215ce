"""Uploads: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.orchestrator_rig import Rig, open_rig, rows
from tests.fakes.small_disk import files_no_larger_than
from tests.fakes.upload_calls import begin, send

MIB = 2**20


def kept(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "files").glob("*"))


def test_upload_is_kept_byte_for_byte(rig: Rig) -> None:
    content = bytes(range(256)) * 9000
    response = rig.http.post(
        "/v1/files", files={"file": ("data.JSONL", content)}, data={"purpose": "fine-tune"}
    )
    uploaded = response.json()
    assert uploaded == {
        "id": uploaded["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": int(rig.clock.now),
        "filename": "data.JSONL",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
    assert rig.http.get(f"/v1/files/{uploaded['id']}/content").content == content
    assert kept(rig.home) == [f"{uploaded['id']}.jsonl"]


def test_only_the_last_part_of_a_path_is_the_name(rig: Rig) -> None:
    file_id = rig.upload(b"x", filename="../../etc/C:\\evil\\rows.csv")
    assert rig.get(f"/v1/files/{file_id}")["filename"] == "rows.csv"


def test_files_are_listed_newest_first_in_pages(rig: Rig) -> None:
    first, second, third = (rig.upload(rows(1)) for _ in range(3))
    rig.upload(rows(1), purpose="user_data")
    page = rig.get("/v1/files", purpose="fine-tune", limit=2)
    assert [item["id"] for item in page["data"]] == [third, second]
    assert (page["has_more"], page["last_id"]) == (True, second)
    rest = rig.get("/v1/files", purpose="fine-tune", limit=2, after=second)
    assert [item["id"] for item in rest["data"]] == [first]
    assert rest["has_more"] is False
    oldest_first = rig.get("/v1/files", purpose="fine-tune", order="asc")
    assert [item["id"] for item in oldest_first["data"]] == [first, second, third]


def test_what_is_listed_can_be_deleted_page_by_page(rig: Rig) -> None:
    ids = {rig.upload(rows(1)) for _ in range(5)}
    seen, after = [], {}
    while (page := rig.get("/v1/files", limit=2, **after))["data"]:
        seen += [item["id"] for item in page["data"]]
        for item in page["data"]:
            assert rig.http.delete(f"/v1/files/{item['id']}").status_code == 200
        after = {"after": page["last_id"]}
    assert (len(seen), set(seen)) == (5, ids)
    assert rig.get("/v1/files", purpose="deleted")["data"] == []


def test_a_page_goes_on_after_a_file_that_expired(rig: Rig) -> None:
    older = rig.upload(rows(1))
    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    edge = rig.http.post("/v1/files", files={"file": ("a.jsonl", rows())}, data=form).json()["id"]
    rig.clock.advance(3601)
    rig.parts.files.delete_expired()
    assert [item["id"] for item in rig.get("/v1/files", after=edge)["data"]] == [older]
    assert rig.http.get(f"/v1/files/{edge}/content").status_code == 404
    assert rig.http.delete(f"/v1/files/{edge}").status_code == 404
    rig.clock.advance(24 * 3600)
    rig.parts.files.delete_expired()
    assert "there is no" in rig.get("/v1/files", after=edge, status=400)["error"]["message"]


def test_no_file_is_listed_of_a_purpose_that_is_not_taken_here(rig: Rig) -> None:
    rig.upload(rows(1))
    assert rig.get("/v1/files", purpose="vision")["data"] == []


def test_a_purpose_that_is_not_taken_is_told_which_are(rig: Rig) -> None:
    answer = rig.http.post("/v1/files", files={"file": ("a.png", b"x")}, data={"purpose": "vision"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "purpose")
    assert error["message"] == (
        "Files are not taken here for 'vision', but for fine-tune, assistants, batch, user_data, evals."
    )


def test_a_deleted_file_is_gone_from_disk(rig: Rig) -> None:
    file_id = rig.upload(rows())
    assert rig.http.delete(f"/v1/files/{file_id}").json() == {
        "id": file_id,
        "object": "file",
        "deleted": True,
    }
    assert kept(rig.home) == []
    assert rig.get(f"/v1/files/{file_id}", status=404)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "said",
    [
        {"expires_after[anchor]": "created_at"},
        {"expires_after[seconds]": "3600"},
        {"expires_after[anchor]": "zzz", "expires_after[seconds]": "3600"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600", "expires_after[days]": "1"},
        {"expires_after": '{"anchor": "created_at", "seconds": 3600}'},
    ],
)
def test_a_lifetime_that_is_half_said_does_not_keep_a_file_for_ever(rig: Rig, said: dict[str, str]) -> None:
    form = {"purpose": "fine-tune", **said}
    response = rig.http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data=form)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "expires_after")
    assert kept(rig.home) == []


def test_a_file_that_a_job_waits_for_cannot_be_deleted(rig: Rig) -> None:
    file_id = rig.upload(rows())
    job = rig.create_job(training_file=file_id)
    refused = rig.http.delete(f"/v1/files/{file_id}")
    assert refused.status_code == 409
    assert job["id"] in refused.json()["error"]["message"]
    rig.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert rig.http.delete(f"/v1/files/{file_id}").status_code == 200


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({"file": ("a.jsonl", b"")}, {"purpose": "fine-tune"}, "file"),
        ({"file": ("a.jsonl", b"{}")}, {"purpose": "training"}, "purpose"),
        ({"file": ("a.jsonl", b"{}")}, {}, "purpose"),
        (
            {"file": ("a.jsonl", b"{}")},
            {"purpose": "fine-tune", "expires_after[seconds]": "9" * 5000},
            "expires_after",
        ),
        ({"other": ("a.jsonl", b"{}")}, {"purpose": "fine-tune"}, "file"),
    ],
)
def test_a_wrong_form_leaves_nothing(
    rig: Rig, files: dict[str, tuple[str, bytes]], data: dict[str, str], param: str
) -> None:
    response = rig.http.post("/v1/files", files=files, data=data)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert kept(rig.home) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({f"f{n}": "a" for n in range(17)}, "more than 16 fields beside the file"),
        ({f"f{n}": "a" * 10_000 for n in range(7)}, "have 65536 bytes together"),
        ({"": "a" * 70_000}, "have 65536 bytes together"),
    ],
)
def test_fields_beside_the_file_are_bounded_together(rig: Rig, fields: dict[str, str], said: str) -> None:
    response = rig.http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data=fields)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert kept(rig.home) == []


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"{}", "application/json"),
        (b"--B\r\nContent-Disposition: form-data; name=file", "multipart/form-data; boundary=B"),
        (b"no boundary in here", "multipart/form-data; boundary=B"),
    ],
)
def test_a_body_that_is_no_form_leaves_nothing(rig: Rig, body: bytes, content_type: str) -> None:
    response = rig.http.post("/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert kept(rig.home) == []


def test_an_announced_size_over_the_limit_is_refused(home: Path) -> None:
    with open_rig(home, max_file_bytes=MIB) as rig:
        response = rig.http.post(
            "/v1/files", files={"file": ("a.txt", b"x" * 2 * MIB)}, data={"purpose": "user_data"}
        )
        assert response.status_code == 413
        assert "1 MiB" in response.json()["error"]["message"]
        assert kept(home) == []


def test_a_size_that_was_not_announced_is_refused_when_it_comes(home: Path) -> None:
    def body() -> Iterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(3):
            yield b"x" * MIB

    with open_rig(home, max_file_bytes=2 * MIB) as rig:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        response = rig.http.post("/v1/files", content=body(), headers=headers)
        assert response.status_code == 413
        assert kept(home) == []


def test_only_files_may_be_larger_than_a_request(home: Path) -> None:
    with open_rig(home, max_body_bytes=1000) as rig:
        assert rig.get(f"/v1/files/{rig.upload(rows(100))}")["bytes"] > 1000
        upload = begin(rig, 5000)["id"]
        assert send(rig, upload, b"x" * 5000)["object"] == "upload.part"
        body = b"{" + b" " * 1000 + b"}"
        for content_type in ("application/json", "multipart/form-data; boundary=B"):
            headers = {"content-type": content_type}
            assert rig.http.post("/v1/uploads", content=body, headers=headers).status_code == 413


def test_a_full_disk_is_said_and_leaves_nothing(rig: Rig) -> None:
    with files_no_larger_than(3 * MIB):
        response = rig.http.post(
            "/v1/files", files={"file": ("a.txt", b"x" * 8 * MIB)}, data={"purpose": "user_data"}
        )
    assert response.status_code == 507
    error = response.json()["error"]
    assert error["code"] == "insufficient_storage"
    assert "free space" in error["message"]
    assert kept(rig.home) == []
    assert rig.get("/v1/files")["data"] == []


def test_what_cannot_fit_is_refused_before_it_is_sent(home: Path) -> None:
    with open_rig(home, max_file_bytes=2**62) as rig:
        headers = {"content-type": "multipart/form-data; boundary=B", "content-length": str(2**60)}
        response = rig.http.post("/v1/files", content=iter([b""]), headers=headers)
        assert response.status_code == 507
        assert kept(home) == []


def test_expired_files_go_unless_a_job_needs_them(rig: Rig) -> None:
    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    needed, unused = (
        rig.http.post("/v1/files", files={"file": ("a.jsonl", rows())}, data=form).json() for _ in range(2)
    )
    assert unused["expires_at"] == int(rig.clock.now) + 3600
    rig.create_job(training_file=needed["id"])
    rig.clock.advance(3601)
    rig.parts.files.delete_expired()
    assert [item["id"] for item in rig.get("/v1/files")["data"]] == [needed["id"]]


def test_what_a_crash_left_of_an_upload_goes_once_it_is_a_day_old(rig: Rig) -> None:
    leftover = rig.home / "files" / ".upload-abc"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    os.utime(leftover, (rig.clock.now, rig.clock.now))
    rig.clock.advance(23 * 3600)
    rig.parts.keep_house()
    assert kept(rig.home) == [".upload-abc"]
    rig.clock.advance(2 * 3600)
    rig.parts.keep_house()
    assert kept(rig.home) == []
