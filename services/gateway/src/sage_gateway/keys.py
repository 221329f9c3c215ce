"""Who may come in: bearer keys from SAGE_API_KEYS."""

from __future__ import annotations

import hmac

from fastapi import Request

from sage_contracts.errors import AuthenticationError
from sage_gateway.settings import GatewaySettings


def require_key(request: Request) -> None:
    """Dependency of every public route. Raises: AuthenticationError unless the gateway is open."""
    settings: GatewaySettings = request.app.state.settings
    if not settings.api_keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise AuthenticationError("No API key: send `Authorization: Bearer KEY` with one of SAGE_API_KEYS.")
    # All keys are compared, so that time does not tell which one was nearly right.
    matches = [
        hmac.compare_digest(given.strip().encode(), key.get_secret_value().encode())
        for key in settings.api_keys
    ]
    if not any(matches):
        raise AuthenticationError("This API key is not one of the gateway's SAGE_API_KEYS.")
