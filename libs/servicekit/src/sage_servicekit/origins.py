"""What web pages could make a browser send here, refused before any service reads it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from sage_contracts.errors import ForbiddenError
from sage_servicekit.errors import error_response
from sage_servicekit.names import HOST, is_of_this_machine

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class CheckedOrigins:
    """Refuses what a page could do, to whoever looks at it, with services that want no key.

    A page of any site can post here; browsers then say `Sec-Fetch-Site: cross-site`, programs never do. Old
    browsers, and all to an address without TLS that is not this machine's, only say the page's `Origin`. And
    it can make its own name lead here (DNS rebinding), so that the browser takes this service for its site.
    A service `is_local`, for its machine alone, therefore answers to no name that somebody else could own.

    Where a service `asks_key`, the origin tells nothing: no page sends a key that it does not have, and a
    proxy may have put its own name in place of the Host that the page's browser sent.
    """

    def __init__(self, app: ASGIApp, source: str, *, is_local: bool, asks_key: bool) -> None:
        self._app = app
        self._source = source
        self._is_local = is_local
        self._asks_key = asks_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await error_response(ForbiddenError(problem), self._source)(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        if scope["method"] not in _READING and self._is_of_another_site(scope):
            return "A web page of another site sent this, which may only read. Send it from a program."
        for name, value in scope["headers"] if self._is_local else ():
            host = value.decode("latin-1")
            if name == b"host" and not is_of_this_machine(host):
                return (
                    f"This service is for its own machine and does not answer to {host[:100]!r}: call it"
                    " 127.0.0.1 or localhost. A proxy in front of it has to send `Host: 127.0.0.1`; a gateway"
                    " with SAGE_API_KEYS answers to every name."
                )
        return None

    def _is_of_another_site(self, scope: Scope) -> bool:
        said = dict(scope["headers"])
        if (site := said.get(b"sec-fetch-site")) is not None:
            return bool(site == b"cross-site")
        if self._asks_key or (origin := said.get(b"origin")) is None:
            return False
        # Whatever the ports, as with browsers' `same-site`. `null`, which a page opened from a file has, any
        # page can have by a frame.
        page, here = (_name(value.decode("latin-1")) for value in (origin, said.get(b"host", b"")))
        return page is None or page != here


def _name(text: str) -> str | None:
    """The host of an origin or a Host header, without the port; None where it has none."""
    found = HOST.fullmatch(text.lower().rpartition("://")[2])
    return None if found is None or text == "null" else found[1] or found[2].rstrip(".")
