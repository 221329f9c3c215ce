"""What the host needs of an engine, asked of every kind: the fake, our own with transformers, and vLLM.

vLLM runs where it is installed in this environment, or where SAGE_VLLM_COMMAND names one.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tests.fakes.fake_engine import WORDS
from tests.fakes.inference_rig import fake_command

from sage_contracts.errors import EngineFailedError, ModelNotFoundError, SageError
from sage_contracts.home import Home
from sage_contracts.models import ResolvedModel
from sage_inference import process_group
from sage_inference.engine_process import EngineProcess
from sage_inference.engines import EngineFactory
from sage_inference.fit import Kind
from sage_inference.models import Adapter, BaseModel, locate
from sage_inference.settings import InferenceSettings
from sage_servicekit.machine import Device, total_memory_bytes

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 128


@dataclass
class Subject:
    engine: EngineProcess
    base: BaseModel
    adapters: list[Adapter]
    large: Adapter
    is_fake: bool

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.engine.client.post(path, json=body, timeout=120)

    async def chat(self, model: str | None = None, **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", self.question(model, **fields))

    async def text(self, model: str | None = None, **fields: Any) -> str:
        answer = await self.chat(model, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    async def stream(self, model: str | None = None, **fields: Any) -> list[str]:
        body = self.question(model, stream=True, **fields)
        async with self.engine.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [line async for line in answer.aiter_lines() if line]

    async def go_on(self, prompt: Any, **fields: Any) -> httpx.Response:
        asked = {"model": self.base.served_name, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        return await self.post("/v1/completions", asked | fields)

    async def continued(self, prompt: Any) -> list[str]:
        """What is said after each prompt."""
        answer = await self.go_on(prompt)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    def token_within(self, whole: str) -> tuple[int, str]:
        """(id, text) of one of an answer's tokens, not the first."""
        from transformers import AutoTokenizer

        if self.is_fake:
            word = whole.split()[2]
            return WORDS.index(word), word
        letter = next(
            letter for letter in whole[1:] if letter.isascii() and letter.isprintable() and letter != " "
        )
        return int(AutoTokenizer.from_pretrained(self.base.location).convert_tokens_to_ids(letter)), letter

    def question(self, model: str | None, **fields: Any) -> dict[str, Any]:
        asked = {"model": model or self.base.served_name, "max_tokens": 16, "temperature": 0}
        return asked | {"messages": [{"role": "user", "content": "hi"}]} | fields


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with adapters, in a home."""
    from tests.fakes.tiny_llama import make_adapter, make_model

    root = tmp_path_factory.mktemp("home")
    base = make_model(root / "base_models/tiny", context=CONTEXT)
    for seed in (1, 2):
        make_adapter(root / f"adapters/one.{seed}", base, seed=seed)
    make_adapter(root / "adapters/large", base, rank=32, seed=3)
    return root


def settings_of(kind: str, home: Path) -> tuple[Kind, InferenceSettings]:
    command = os.environ.get("SAGE_VLLM_COMMAND", "")
    if kind == "fake":
        return "vllm", InferenceSettings(home_dir=home, vllm_command=fake_command("--grandchild"))
    return kind, InferenceSettings(home_dir=home, vllm_command=command, engine_threads=1)  # type: ignore[return-value]


ENGINES = ["fake", "transformers", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def subject(request: pytest.FixtureRequest, models: Path) -> AsyncIterator[Subject]:
    kind, settings = settings_of(request.param, models)
    # In halves, logits of a random model are often equal: which one is chosen is a matter of chance then.
    factory = EngineFactory(settings, kind, Device("cpu", total_memory_bytes()), has_bf16=False)

    def find(name: str, folder: str) -> Adapter:
        resolved = ResolvedModel(id=name, base_model="base_models/tiny", adapter_path=f"adapters/{folder}")
        adapter = locate(resolved, Home(models), kind).adapter
        assert adapter is not None
        return adapter

    base = locate(ResolvedModel(id="base:tiny", base_model="base_models/tiny"), Home(models), kind).base
    engine = await factory.start(factory.plan(base, 8), None)
    adapters = [find("one.1@3", "one.1"), find("one.2@3", "one.2")]
    try:
        await engine.wait_ready()
        yield Subject(engine, base, adapters, find("large@1", "large"), request.param == "fake")
    finally:
        await engine.stop()
        assert process_group.alive(engine.pid) == []


def events(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def said(lines: list[str]) -> str:
    return "".join(
        event["choices"][0]["delta"].get("content") or "" for event in events(lines) if event["choices"]
    )


async def test_it_answers_under_the_bases_name(subject: Subject) -> None:
    answer = (await subject.chat()).json()
    assert answer["model"] == "base:tiny"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 16


async def test_greedy_answers_repeat_and_streams_say_the_same(subject: Subject) -> None:
    whole = await subject.text()
    assert whole == await subject.text()
    lines = await subject.stream(stream_options={"include_usage": True})
    assert said(lines) == whole
    assert lines[-1] == "data: [DONE]"
    first, *_, last, usage = events(lines)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 16


async def test_next_to_no_temperature_is_none(subject: Subject) -> None:
    # vLLM takes 0.01 for whatever is less, and later on in this answer two tokens are almost as likely.
    assert await subject.text(temperature=1e-40, max_tokens=8) == await subject.text(max_tokens=8)


async def test_a_stream_has_usage_only_when_asked(subject: Subject) -> None:
    assert all(not event.get("usage") for event in events(await subject.stream()))


async def test_a_stop_string_ends_the_answer_before_it(subject: Subject) -> None:
    whole = await subject.text(max_tokens=48)
    stop = next(letter for letter in whole[1:] if letter.isascii() and letter.isprintable())
    expected = whole[: whole.index(stop)]
    answer = (await subject.chat(max_tokens=48, stop=stop)).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (expected, "stop")
    assert said(await subject.stream(max_tokens=48, stop=[stop])) == expected


async def test_each_prompt_of_a_list_is_gone_on_from(subject: Subject) -> None:
    [first], [second] = await subject.continued("One"), await subject.continued("Two, three")
    assert await subject.continued(["One"]) == [first]
    assert await subject.continued(["One", "Two, three"]) == [first, second]
    [spelt] = await subject.continued([40, 41, 42])
    assert await subject.continued([[40, 41, 42], [43]]) == [spelt, *await subject.continued([[43]])]


async def test_the_prompts_of_a_list_are_counted_together(subject: Subject) -> None:
    both = (await subject.go_on(["One", "Two, three"])).json()["usage"]
    each = [(await subject.go_on(prompt)).json()["usage"] for prompt in ("One", "Two, three")]
    assert both["completion_tokens"] == 32
    assert both["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in each)
    assert both["total_tokens"] == both["prompt_tokens"] + 32


async def test_a_stream_says_which_prompt_it_goes_on_from(subject: Subject) -> None:
    prompts = ["One", "Two, three"]
    asked = {"model": subject.base.served_name, "prompt": prompts, "max_tokens": 16, "temperature": 0}
    body = asked | {"stream": True, "stream_options": {"include_usage": True}}
    async with subject.engine.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    *pieces, usage = events(lines)
    choices = [choice for piece in pieces for choice in piece["choices"]]
    texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in (0, 1)]
    assert texts == await subject.continued(prompts)
    ends = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"]}
    assert ends == {0: "length", 1: "length"}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 32


async def test_prompts_and_seeds_that_no_model_could_take_are_refused(subject: Subject) -> None:
    for prompt in ([199999], [-5], [[40], [199999]], [], ["One", "long " * 1000]):
        refused = await subject.go_on(prompt)
        assert (refused.status_code, bool(refused.json()["error"]["message"])) == (400, True), prompt
        # vLLM tells some of it in the stream.
        streamed = await subject.go_on(prompt, stream=True)
        assert streamed.status_code in (200, 400) and '"error"' in streamed.text
    for seed in (2**64, -(2**64)):
        assert (await subject.chat(seed=seed)).status_code == 400
    assert (await subject.chat(seed=2**63 - 1)).status_code == 200


async def test_a_stop_token_ends_the_answer_before_it(subject: Subject) -> None:
    whole = await subject.text(max_tokens=48)
    token, text = subject.token_within(whole)
    unfinished = "\N{REPLACEMENT CHARACTER}"  # bytes of a character that got no further: vLLM keeps them back
    expected = whole[: whole.index(text)].rstrip(unfinished)
    answer = (await subject.chat(max_tokens=48, stop_token_ids=[token])).json()["choices"][0]
    assert (answer["message"]["content"].rstrip(unfinished), answer["finish_reason"]) == (expected, "stop")
    assert said(await subject.stream(max_tokens=48, stop_token_ids=[token])).rstrip(unfinished) == expected


async def test_adapters_come_and_go_while_it_runs(subject: Subject) -> None:
    first, second = subject.adapters
    assert (await subject.chat(first.name)).status_code == 404
    await subject.engine.load_adapter(first)
    await subject.engine.load_adapter(second)
    texts = {await subject.text(name) for name in (None, first.name, second.name)}
    assert len(texts) == 3
    assert said(await subject.stream(first.name)) == await subject.text(first.name)
    listed = (await subject.engine.client.get("/v1/models")).json()["data"]
    assert {first.name, second.name, "base:tiny"} <= {card["id"] for card in listed}
    again = await subject.post(
        "/v1/load_lora_adapter", {"lora_name": first.name, "lora_path": str(first.path)}
    )
    assert again.status_code == 400
    await subject.engine.load_adapter(first)  # which is as good as loaded
    for adapter in (first, second):
        await subject.engine.unload_adapter(adapter.name)
        assert (await subject.chat(adapter.name)).status_code == 404
    assert await subject.text() in texts
    await subject.engine.unload_adapter(first.name)


async def test_an_adapter_that_is_not_there_or_does_not_fit(subject: Subject) -> None:
    missing = Adapter("gone@1", subject.large.path.parent / "gone", 8)
    with pytest.raises(ModelNotFoundError, match="gone"):
        await subject.engine.load_adapter(missing)
    try:
        await subject.engine.load_adapter(subject.large)
    except SageError as error:
        assert isinstance(error, EngineFailedError) and "rank" in error.message
    else:
        # No limit: then it also works.
        assert await subject.text(subject.large.name)
        await subject.engine.unload_adapter(subject.large.name)
    assert await subject.text()


async def test_refusals_have_openais_shape(subject: Subject) -> None:
    unknown = await subject.chat("nobody")
    too_many = await subject.chat(max_tokens=CONTEXT * 10)
    too_long = await subject.chat(messages=[{"role": "user", "content": "long " * 1000}])
    assert [answer.status_code for answer in (unknown, too_many, too_long)] == [404, 400, 400]
    for answer in (unknown, too_many, too_long):
        assert answer.json()["error"]["message"]


async def test_those_who_leave_do_not_keep_the_next_waiting(subject: Subject) -> None:
    body = subject.question(None, stream=True, max_tokens=90)
    for _ in range(3):
        async with subject.engine.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_lines())
    assert await subject.text()


async def test_many_at_once_are_all_answered(subject: Subject) -> None:
    import asyncio

    await subject.engine.load_adapter(subject.adapters[0])
    names = [None, subject.adapters[0].name] * 3
    texts = await asyncio.gather(*(subject.text(name) for name in names))
    assert len(set(texts)) == 2
    await subject.engine.unload_adapter(subject.adapters[0].name)


async def test_killing_its_server_is_noticed_and_nothing_is_left(subject: Subject) -> None:
    """The last one: nothing can be asked after it."""
    import asyncio

    os.kill(subject.engine.pid, 9)
    async with asyncio.timeout(10):
        await subject.engine.exited.wait()
    assert "ended by signal 9" in subject.engine.failure("died").message
    await subject.engine.stop()
    assert process_group.alive(subject.engine.pid) == []
