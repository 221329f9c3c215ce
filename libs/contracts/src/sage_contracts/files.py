"""Uploaded files. Source: OpenAI API reference, "Files"."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel


class FilePurpose(StrEnum):
    FINE_TUNE = "fine-tune"
    ASSISTANTS = "assistants"
    BATCH = "batch"
    USER_DATA = "user_data"
    EVALS = "evals"
    FINE_TUNE_RESULTS = "fine-tune-results"
    """Written by us when a job succeeds; nothing is uploaded for it."""


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: FilePurpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None
