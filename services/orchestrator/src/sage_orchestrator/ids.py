"""Public ids: a prefix that says what it names, and 24 random hex digits."""

from __future__ import annotations

import secrets
from typing import Literal

Prefix = Literal["ftjob", "ftevent", "ftckpt", "file", "merge", "sweep", "upload", "part"]


def new_id(prefix: Prefix) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
