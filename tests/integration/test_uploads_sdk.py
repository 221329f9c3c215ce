"""Files in parts through gateway and orchestrator as processes, by the official SDK."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from tests.fakes.orchestrator_process import running_orchestrator
from tests.fakes.service_processes import GatewayProcess, running_gateway

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running_gateway(tmp_path_factory.mktemp("stack")) as process:
        yield process


@pytest.fixture
def sdk(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def begin(sdk: openai.OpenAI, size_bytes: int) -> openai.types.Upload:
    return sdk.uploads.create(
        bytes=size_bytes, filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )


def parts_in(gateway: GatewayProcess) -> list[Path]:
    return list((gateway.home / "files" / "parts").iterdir())


def rows(count: int) -> bytes:
    pairs = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(count)]
    return "\n".join(json.dumps(pair) for pair in pairs).encode()


def test_a_file_in_several_parts_is_a_file_to_train_on(
    gateway: GatewayProcess, sdk: openai.OpenAI, tmp_path: Path
) -> None:
    content = rows(200)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    upload = sdk.uploads.upload_file_chunked(
        file=path,
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=1000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert (upload.status, upload.bytes, upload.filename) == ("completed", len(content), "pairs.jsonl")
    assert upload.file is not None and upload.expires_at == upload.created_at + 3600
    assert sdk.files.retrieve(upload.file.id) == upload.file
    assert sdk.files.content(upload.file.id).read() == content
    assert parts_in(gateway) == []
    job = sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file=upload.file.id)
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert sdk.files.delete(upload.file.id).deleted is True


async def test_parts_sent_together_are_joined_as_named(gateway: GatewayProcess) -> None:
    pieces = [bytes([number]) * (number * MIB // 4 + 1) for number in range(8)]
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as sdk:
        upload = await sdk.uploads.create(
            bytes=sum(map(len, pieces)), filename="x.bin", mime_type="any/thing", purpose="user_data"
        )
        sent = (sdk.uploads.parts.create(upload.id, data=piece) for piece in pieces)
        ids = [part.id for part in await asyncio.gather(*sent)]
        done = await sdk.uploads.complete(upload.id, part_ids=list(reversed(ids)))
        assert done.file is not None
        assert (await sdk.files.content(done.file.id)).content == b"".join(reversed(pieces))


def test_mistakes_raise_the_sdks_classes(gateway: GatewayProcess, sdk: openai.OpenAI) -> None:
    upload = begin(sdk, 6)
    first = sdk.uploads.parts.create(upload.id, data=b"abc")
    with pytest.raises(openai.BadRequestError, match="3 bytes together") as short:
        sdk.uploads.complete(upload.id, part_ids=[first.id])
    assert short.value.param == "part_ids"
    with pytest.raises(openai.BadRequestError, match="does not fit") as long:
        sdk.uploads.parts.create(upload.id, data=b"defg")
    assert long.value.param == "data"
    last = sdk.uploads.parts.create(upload.id, data=b"def")
    with pytest.raises(openai.BadRequestError) as mixed:
        sdk.uploads.complete(upload.id, part_ids=[last.id, first.id], md5=hashlib.md5(b"abcdef").hexdigest())
    assert mixed.value.param == "md5"
    assert sdk.uploads.cancel(upload.id).status == "cancelled"
    assert parts_in(gateway) == []
    with pytest.raises(openai.ConflictError, match="is cancelled") as ended:
        sdk.uploads.complete(upload.id, part_ids=[first.id, last.id])
    assert ended.value.param == "upload_id"
    with pytest.raises(openai.NotFoundError) as nobody:
        sdk.uploads.cancel("upload-nobody")
    assert (nobody.value.param, nobody.value.code) == ("upload_id", "not_found")


class LosesAnswers(httpx2.HTTPTransport):
    """The first answer to each path gets lost on its way; the request has been heard."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        path = request.url.path
        if path.endswith("/parts") and path not in self.lost:
            self.lost.append(path)
            response.read()
            response.close()
            raise httpx2.ReadError("the connection broke", request=request)
        return response


def test_a_lost_answer_costs_nothing(gateway: GatewayProcess) -> None:
    transport = LosesAnswers()
    http_client = openai.DefaultHttpxClient(transport=transport)
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key="unused", max_retries=1, http_client=http_client
    ) as sdk:
        upload = sdk.uploads.upload_file_chunked(
            file=b"abcabcdef",
            filename="x",
            bytes=9,
            mime_type="any/thing",
            purpose="user_data",
            part_size=3,
            md5=hashlib.md5(b"abcabcdef").hexdigest(),
        )
        assert len(transport.lost) == 1
        assert upload.file is not None and sdk.files.content(upload.file.id).content == b"abcabcdef"


def test_a_refusal_reaches_whoever_is_sending(sdk: openai.OpenAI) -> None:
    upload = begin(sdk, 100 * MIB)
    with pytest.raises(openai.APIStatusError, match="at most 64 MiB") as large:
        sdk.uploads.parts.create(upload.id, data=bytes(65 * MIB))
    assert (large.value.status_code, large.value.param) == (413, "data")
    sdk.uploads.cancel(upload.id)
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        sdk.uploads.parts.create(upload.id, data=bytes(64 * MIB))


def test_large_parts_take_no_memory(gateway: GatewayProcess, sdk: openai.OpenAI, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    with big.open("wb") as stream:
        for number in range(160):
            stream.write(bytes([number]) * MIB)
    warmed = sdk.uploads.upload_file_chunked(
        file=bytes(5 * MIB),
        filename="warm",
        bytes=5 * MIB,
        mime_type="any/thing",
        purpose="user_data",
        part_size=3 * MIB,
    )
    assert warmed.status == "completed"
    processes = (gateway, gateway.orchestrator)
    before = [process.peak_rss_bytes() for process in processes]
    upload = sdk.uploads.upload_file_chunked(file=big, mime_type="any/thing", purpose="user_data")
    grown = [process.peak_rss_bytes() - was for process, was in zip(processes, before, strict=True)]
    assert upload.file is not None and upload.file.bytes == 160 * MIB
    assert max(grown) < 16 * MIB


def test_parts_survive_kill_9(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as sdk,
    ):
        upload = begin(sdk, 6)
        first = sdk.uploads.parts.create(upload.id, data=b"abc")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
    with (
        running_orchestrator(tmp_path) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as sdk,
    ):
        last = sdk.uploads.parts.create(upload.id, data=b"def")
        done = sdk.uploads.complete(upload.id, part_ids=[first.id, last.id])
        assert done.file is not None
        assert sdk.files.content(done.file.id).read() == b"abcdef"
