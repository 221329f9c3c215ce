"""Our own engine answers one request at a time; a stream that waits in line is told so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.held_generator import HeldGenerator

from sage_inference.transformers_engine.engine import Engine, Names
from sage_inference.transformers_engine.server import build_app

TIMEOUT_S = 30.0


@pytest.fixture
def generator() -> Iterator[HeldGenerator]:
    generator = HeldGenerator()
    yield generator
    generator.go_on.set()


@pytest.fixture
def client(generator: HeldGenerator) -> Iterator[httpx.Client]:
    with ThreadPoolExecutor(max_workers=1) as thread:
        engine = Engine(generator, thread, Names(["m"], "m"), comment_interval_s=0.01)
        with serving(build_app(engine)) as url, httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            yield client
            generator.go_on.set()


def question(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields


def stream(client: httpx.Client) -> AbstractContextManager[httpx.Response]:
    return client.stream("POST", "/v1/chat/completions", json=question(stream=True))


def said(lines: Iterator[str]) -> str:
    """The text of the events that are left; comments may be among them."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(event["choices"][0].get("delta", {}).get("content", "") for event in events)


def test_a_stream_that_waits_its_turn_is_told_so_and_then_answered(
    client: httpx.Client, generator: HeldGenerator
) -> None:
    with stream(client) as first:
        firsts = first.iter_lines()
        # The opening event; the model has begun.
        assert json.loads(next(line for line in firsts if line.startswith("data:"))[6:])
        with stream(client) as second:
            seconds = second.iter_lines()
            assert second.headers["content-type"].startswith("text/event-stream")
            assert next(seconds) == ": waiting for 1 answer before this one"
            with stream(client) as third:
                assert next(third.iter_lines()) == ": waiting for 2 answers before this one"
            generator.go_on.set()
            assert said(firsts) == "first last"
            assert said(seconds) == "first last"


def test_an_answer_in_one_piece_has_no_room_for_it(client: httpx.Client, generator: HeldGenerator) -> None:
    with stream(client) as first, ThreadPoolExecutor(max_workers=1) as elsewhere:
        firsts = first.iter_lines()
        next(firsts)
        whole = elsewhere.submit(client.post, "/v1/chat/completions", json=question())
        with stream(client) as last:
            assert next(last.iter_lines()).startswith(": waiting for ")
        generator.go_on.set()
        assert said(firsts)
        message = whole.result(TIMEOUT_S).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "first last", "refusal": None}
