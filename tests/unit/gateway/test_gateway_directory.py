from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from sage_chat.backend import BackendName, ChatCall, Reply
from sage_chat.mock import MockBackend
from sage_chat.routing import Route
from sage_contracts.errors import ModelNotFoundError, ServiceUnavailableError
from sage_contracts.jobs import name_fault
from sage_contracts.models import ModelCard
from sage_gateway.directory import ModelDirectory
from sage_gateway.models import make_router
from sage_gateway.proxy import Proxy


class Listed:
    """A backend that only lists models, and counts how often it is asked."""

    def __init__(self, name: BackendName, *models: str) -> None:
        self.name = name
        self.names: list[str] | None = list(models)
        self.asked = 0
        self.is_asked = asyncio.Event()
        self.gate: asyncio.Event | None = None
        """An answer, which is that of the moment it was asked in, waits for it."""

    async def models(self) -> list[ModelCard]:
        self.asked += 1
        self.is_asked.set()
        names = self.names
        await (self.gate.wait() if self.gate else asyncio.sleep(0))
        if names is None:
            raise ServiceUnavailableError("gone")
        return [ModelCard(id=name, created=0) for name in names]

    async def stream(self, call: ChatCall) -> Reply:
        raise NotImplementedError

    async def complete(self, call: ChatCall) -> Reply:
        raise NotImplementedError

    async def embed(self, call: ChatCall) -> Reply:
        raise NotImplementedError


class Stack:
    def __init__(self, tuned_cache_s: float = 60) -> None:
        self.tuned = Listed(BackendName.FINETUNE, "code", "code@1")
        self.vllm = Listed(BackendName.VLLM, "qwen")
        self.openai = Listed(BackendName.OPENAI)
        self.ollama = Listed(BackendName.OLLAMA, "llama3.2:1b")
        backends = {backend.name: backend for backend in (self.tuned, self.vllm, self.openai, self.ollama)}
        self.directory = ModelDirectory(
            backends | {BackendName.MOCK: MockBackend()},
            default_model="code",
            tuned_cache_s=tuned_cache_s,
            served_cache_s=60,
        )


async def test_the_list_has_every_backend_and_each_id_is_routable() -> None:
    stack = Stack()
    names = [card.id for card in await stack.directory.listing()]
    assert names == ["code", "code@1", "vllm/qwen", "ollama/llama3.2:1b", "mock"]
    routes = [(await stack.directory.route(name)).backend for name in names]
    assert routes == ["finetune", "finetune", "vllm", "ollama", "mock"]


async def test_lists_are_believed_for_a_while_and_asked_for_once() -> None:
    stack = Stack()
    await asyncio.gather(*(stack.directory.route("code") for _ in range(20)))
    assert stack.tuned.asked == 1 and stack.vllm.asked == 0


async def test_a_model_that_was_just_trained_is_found_at_once() -> None:
    stack = Stack()
    await stack.directory.route("code")
    assert stack.tuned.names is not None
    stack.tuned.names.append("qa")
    assert (await stack.directory.route("qa")).backend is BackendName.FINETUNE


@pytest.mark.parametrize("name", ["code", "code@1", "code@1:ckpt-step-2"])
async def test_a_tuned_model_is_nobody_elses_while_the_registry_is_away(name: str) -> None:
    stack = Stack(tuned_cache_s=0)
    stack.ollama.names = [f"{name}:latest", "llama3.2:1b"]
    await stack.directory.route(name)
    stack.tuned.names = None
    assert await stack.directory.route(name) == Route(BackendName.FINETUNE, name)
    assert (await stack.directory.route("llama3.2:1b")).backend is BackendName.OLLAMA
    with pytest.raises(ServiceUnavailableError):
        await stack.directory.route("qa")


async def test_a_model_that_was_deleted_is_not_remembered() -> None:
    stack = Stack(tuned_cache_s=0)
    stack.ollama.names = ["code:latest"]
    await stack.directory.route("code")
    stack.tuned.names = []
    assert (await stack.directory.route("code")).backend is BackendName.OLLAMA
    stack.tuned.names = None
    assert (await stack.directory.route("code")).backend is BackendName.OLLAMA


async def test_the_list_is_never_of_before() -> None:
    stack = Stack()
    await stack.directory.listing()
    stack.tuned.names = ["code", "code@1", "qa", "qa@1"]
    assert {"qa", "qa@1"} <= {card.id for card in await stack.directory.listing()}
    assert stack.vllm.asked == 1


async def test_a_list_that_was_asked_for_before_does_not_answer_a_later_question() -> None:
    stack = Stack()
    stack.tuned.gate = asyncio.Event()
    early = asyncio.create_task(stack.directory.listing())
    await stack.tuned.is_asked.wait()
    late = asyncio.create_task(stack.directory.listing())
    await asyncio.sleep(0)
    stack.tuned.names = ["qa"]
    stack.tuned.gate.set()
    assert "qa" not in {card.id for card in await early}
    assert "qa" in {card.id for card in await late}


async def test_a_deleted_model_is_gone_at_once() -> None:
    stack, orchestrator, app = Stack(), FastAPI(), FastAPI()

    @orchestrator.delete("/v1/models/{name}")
    def delete(name: str) -> dict[str, str]:
        stack.tuned.names = []
        return {"id": name}

    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(orchestrator)) as to_orchestrator,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client,
    ):
        app.include_router(
            make_router(stack.directory, Proxy(to_orchestrator, "orchestrator", "http://part"))
        )
        await stack.directory.route("code")
        assert (await client.delete("/v1/models/code")).json() == {"id": "code"}
    with pytest.raises(ModelNotFoundError):
        await stack.directory.route("code")


async def test_default_and_nothing_mean_the_default_model() -> None:
    directory = Stack().directory
    assert (await directory.route("")).model == (await directory.route("default")).model == "code"


@pytest.mark.parametrize("name", [*BackendName, "default", "code"])
async def test_a_name_that_would_be_routed_elsewhere_is_refused_to_tuned_models(name: str) -> None:
    stack = Stack()
    stack.tuned.names = [str(name), "other"]
    directory = ModelDirectory(
        {BackendName.FINETUNE: stack.tuned, BackendName.MOCK: MockBackend()},
        default_model="other",
        tuned_cache_s=60,
        served_cache_s=60,
    )
    reached = await directory.route(name) == Route(BackendName.FINETUNE, name)
    assert reached is (name_fault(name) is None)


async def test_a_silent_backend_hides_no_other() -> None:
    stack = Stack()
    stack.vllm.names = None
    assert [card.id for card in await stack.directory.listing()][-2:] == ["ollama/llama3.2:1b", "mock"]
    with pytest.raises(ModelNotFoundError, match=r"code, code@1, ollama/llama3.2:1b, mock"):
        await stack.directory.route("zzz")


async def test_without_the_registry_bare_names_wait_for_it() -> None:
    stack = Stack()
    stack.tuned.names = None
    with pytest.raises(ServiceUnavailableError):
        await stack.directory.route("code")
    assert (await stack.directory.route("qwen")).backend is BackendName.VLLM
