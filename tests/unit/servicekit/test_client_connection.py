"""Work ends with its client, and never quietly goes on for nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sage_servicekit.connection import ClientLeftError, unless_client_leaves


class Client:
    """Sends its body, then stays until told to leave."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    async def receive(self) -> dict[str, Any]:
        return await self.messages.get()

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


async def test_work_that_is_done_in_time_has_its_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await unless_client_leaves(Client().receive, work()) == 7


async def test_work_is_cancelled_and_waited_for_when_the_client_leaves() -> None:
    client, ends = Client(), []

    async def work() -> None:
        client.leave()
        try:
            await asyncio.Event().wait()
        finally:
            # An end that takes a while, such as closing the upstream.
            await asyncio.sleep(0)
            ends.append("ended")

    with pytest.raises(ClientLeftError):
        await unless_client_leaves(client.receive, work())
    assert ends == ["ended"]


async def test_errors_of_the_work_are_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await unless_client_leaves(Client().receive, work())


async def test_cancelling_the_request_ends_the_work() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    request = asyncio.create_task(unless_client_leaves(Client().receive, work()))
    await begun.wait()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert request.cancelled()
    assert ended.is_set()
