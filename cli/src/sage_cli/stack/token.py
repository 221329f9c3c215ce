"""The secret that the services of one home share for their internal routes."""

from __future__ import annotations

import secrets
from pathlib import Path

from sage_cli import locate
from sage_contracts.home import Home, write_whole


def internal_token(home: Home) -> str:
    """SAGE_INTERNAL_TOKEN, else the home's own, made once and readable by its owner alone."""
    if given := locate.setting("SAGE_INTERNAL_TOKEN"):
        return given
    path = home.state / "internal_token"
    if token := _read(path):
        return token
    token = secrets.token_urlsafe(32)
    write_whole(path, token + "\n", mode=0o600)
    return token


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
