"""Requests to /v1/uploads, and what they leave on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fakes.orchestrator_rig import Rig


def begin(rig: Rig, size_bytes: int, *, status: int = 200, **fields: Any) -> Any:
    body = {"filename": "rows.jsonl", "bytes": size_bytes, "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return rig.post("/v1/uploads", body | fields, status=status)


def send(rig: Rig, upload_id: str, data: bytes, *, status: int = 200, name: str = "data") -> Any:
    response = rig.http.post(f"/v1/uploads/{upload_id}/parts", files={name: ("upload", data)})
    assert response.status_code == status, response.text
    return response.json()


def complete(rig: Rig, upload_id: str, *part_ids: str, status: int = 200, **fields: Any) -> Any:
    return rig.post(f"/v1/uploads/{upload_id}/complete", {"part_ids": part_ids} | fields, status=status)


def cancel(rig: Rig, upload_id: str, *, status: int = 200) -> Any:
    return rig.post(f"/v1/uploads/{upload_id}/cancel", status=status)


def kept(home: Path) -> list[str]:
    """All files under the folder for files, parts included."""
    folder = home / "files"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def param_and_message(answer: Any) -> tuple[str, str]:
    return answer["error"]["param"], answer["error"]["message"]
