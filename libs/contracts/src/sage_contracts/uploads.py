"""Files that are uploaded in parts. Source: OpenAI API reference, "Uploads"."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sage_contracts.files import FileObject

PART_LIMIT_BYTES = 64 * 2**20
"""Of one part, as at OpenAI; its SDK cuts files into pieces of exactly this size."""
UPLOAD_PATHS = ("/v1/files", "/v1/uploads/{upload_id}/parts")
"""Where the bytes of files are sent to: passed on and written as they come, never held whole."""
UPLOAD_LIFE_S = 3600
"""After this an upload that was not completed expires, as at OpenAI."""


class UploadStatus(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self is not UploadStatus.PENDING


class ExpiresAfter(BaseModel):
    """When the completed file goes by itself; counted from its creation."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int


class CreateUploadRequest(BaseModel):
    """POST /v1/uploads."""

    model_config = ConfigDict(extra="forbid")

    filename: Annotated[str, Field(min_length=1, max_length=4096)]
    bytes: Annotated[int, Field(ge=1)]
    """Of the whole file."""
    mime_type: str
    """Not looked at: the format is told by the name and the content."""
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUploadRequest(BaseModel):
    """POST /v1/uploads/{id}/complete."""

    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[list[str], Field(min_length=1)]
    """In the order of the file."""
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None
    """Of the whole file, in hexadecimal digits."""


class UploadObject(BaseModel):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: UploadStatus
    expires_at: int
    file: FileObject | None = None
    """The file that its completion made."""


class UploadPart(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
