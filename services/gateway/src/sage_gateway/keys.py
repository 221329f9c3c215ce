"""Who may come in: bearer keys from SAGE_API_KEYS."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from pydantic import SecretStr
from starlette.datastructures import Headers

from sage_contracts.errors import AuthenticationError


def key_check(keys: Sequence[SecretStr]) -> Callable[[Headers], None] | None:
    """What lets only requests with one of the keys in, by their headers; None where there are no keys."""
    expected = [key.get_secret_value().encode() for key in keys]

    def check(headers: Headers) -> None:
        """Raises: AuthenticationError."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        sent = given.encode("latin-1").strip()  # the bytes as they came: headers are read as this encoding
        if scheme.lower() != "bearer" or not sent:
            raise AuthenticationError(
                "No API key: send `Authorization: Bearer KEY` with one of SAGE_API_KEYS."
            )
        # All keys are compared, so that time does not tell which one was nearly right.
        matches = [hmac.compare_digest(sent, key) for key in expected]
        if not any(matches):
            raise AuthenticationError("This API key is not one of the gateway's SAGE_API_KEYS.")

    return check if expected else None
