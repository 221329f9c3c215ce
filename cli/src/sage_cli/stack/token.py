"""The secret that the services of one home share for their internal routes."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from sage_contracts.home import Home


def internal_token(home: Home) -> str:
    """SAGE_INTERNAL_TOKEN, else the home's own, made once and readable by its owner alone."""
    if given := os.environ.get("SAGE_INTERNAL_TOKEN"):
        return given
    path = home.state / "internal_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    if token := _read(path):
        return token
    token = secrets.token_urlsafe(32)
    temporary = path.with_name(f".internal_token.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(token + "\n")
    temporary.replace(path)
    return token


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
