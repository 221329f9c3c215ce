"""Gateway and orchestrator as two processes: what the gateway proxies, seen through the official SDK."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.fakes.service_processes import TOKEN, GatewayProcess, running_gateway

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running_gateway(tmp_path_factory.mktemp("stack")) as process:
        yield process


@pytest.fixture
def sdk(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def rows(count: int) -> bytes:
    pairs = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(count)]
    return "\n".join(json.dumps(pair) for pair in pairs).encode()


def test_a_file_and_a_job_through_the_gateway(sdk: openai.OpenAI) -> None:
    content = rows(20)
    uploaded = sdk.files.create(file=("pairs.jsonl", io.BytesIO(content)), purpose="fine-tune")
    assert uploaded.bytes == len(content) and uploaded.filename == "pairs.jsonl"
    assert sdk.files.content(uploaded.id).read() == content
    assert uploaded.id in [file.id for file in sdk.files.list()]

    job = sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file=uploaded.id, suffix="pairs")
    assert job.status in ("validating_files", "queued")
    assert sdk.fine_tuning.jobs.retrieve(job.id).training_file == uploaded.id
    assert job.id in [listed.id for listed in sdk.fine_tuning.jobs.list(limit=5)]
    assert sdk.fine_tuning.jobs.list_events(job.id, limit=10).data
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"


@pytest.mark.parametrize(
    "path", ["/v1/files/", "/v1/fine_tuning/jobs/", "/v1/fine_tuning/jobs//", "/v1/sage/sweeps/"]
)
def test_a_slash_too_many_is_overlooked(gateway: GatewayProcess, path: str) -> None:
    with_slash, without = httpx.get(gateway.url + path), httpx.get(gateway.url + path.rstrip("/"))
    assert with_slash.status_code == 200 and with_slash.json() == without.json()
    refused = httpx.post(gateway.url + "/v1/fine_tuning/jobs/", json={})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_no_model_is_named_by_a_slash_alone(gateway: GatewayProcess, method: str) -> None:
    answer = httpx.request(method, f"{gateway.url}/v1/models/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def work_on(gateway: GatewayProcess, job_id: str, loss: float) -> None:
    """What a trainer says about a job of two steps."""
    with httpx.Client(
        base_url=f"{gateway.orchestrator.url}/internal/jobs/{job_id}",
        headers={"X-Sage-Internal-Token": TOKEN},
    ) as link:
        said = {"worker_id": "w1"}
        claim = link.post("/claim", json=said | {"device_total_bytes": 8 * 2**30}).raise_for_status().json()
        said["attempt"] = claim["attempt"]
        data = [{"step": n, "total_steps": 2, "train_loss": 2.5 - n / 2} for n in (1, 2)]
        events = [
            {"created_at": 1, "message": "a step", "type": "metrics", "data": figures, "seq": figures["step"]}
            for figures in data
        ]
        link.post("/events", json=said | {"events": events}).raise_for_status()
        done = {"outcome": "succeeded", "base_model": "base", "adapter_path": f"adapters/{job_id}"}
        metrics = {"metrics": {"base_eval_loss": 2.0, "eval_loss": loss}}
        link.post("/finish", json=said | done | metrics).raise_for_status()


def test_the_steps_of_a_job_are_a_file_of_its_own(gateway: GatewayProcess, sdk: openai.OpenAI) -> None:
    uploaded = sdk.files.create(file=("pairs.jsonl", io.BytesIO(rows(20))), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file=uploaded.id, suffix="steps")
    assert job.result_files == []
    work_on(gateway, job.id, 1.5)

    job = sdk.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "steps@1")
    [file_id] = job.result_files
    assert sdk.files.retrieve(file_id).purpose == "fine-tune-results"
    assert [file.id for file in sdk.files.list(purpose="fine-tune-results")] == [file_id]
    assert sdk.files.content(file_id).text.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "0,,,2,",
        "1,2,,,",
        "2,1.5,,1.5,",
    ]
    metrics = [event for event in sdk.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert [event.data for event in metrics] == [
        {"step": 2, "total_steps": 2, "train_loss": 1.5},
        {"step": 1, "total_steps": 2, "train_loss": 2.0},
    ]


def test_the_models_list_follows_jobs_and_deletions_at_once(
    gateway: GatewayProcess, sdk: openai.OpenAI
) -> None:
    def names() -> list[str]:
        return [model.id for model in sdk.models.list() if model.id.startswith("brief")]

    job = sdk.fine_tuning.jobs.create(
        model="smollm2-135m", training_file=None, suffix="brief", extra_body={"sage": {"task": "code"}}
    )
    assert names() == []
    work_on(gateway, job.id, 1.5)
    assert names() == ["brief", "brief@1"]
    hello: Any = {"messages": [{"role": "user", "content": "Hello"}], "model": "brief"}
    with pytest.raises(openai.NotFoundError, match="The model `brief` does not exist"):
        sdk.chat.completions.create(**hello)  # so the fake host has been asked
    sdk.models.delete("brief")
    with pytest.raises(openai.NotFoundError, match="There is no model 'brief'"):
        sdk.chat.completions.create(**hello)
    assert names() == []


def test_a_sweep_through_the_gateway(gateway: GatewayProcess, sdk: openai.OpenAI) -> None:
    body = {"model": "smollm2-135m", "sage": {"task": "code"}, "grid": {"lora.r": [4, 8]}}
    sweep = sdk.post("/sage/sweeps", body=body, cast_to=httpx.Response).json()
    path = f"{gateway.url}/v1/sage/sweeps/{sweep['id']}"
    for child, loss in zip(sweep["children"], (1.9, 1.5), strict=True):
        work_on(gateway, child["job_id"], loss)
    deadline = time.monotonic() + 30
    while (sweep := httpx.get(path).json())["status"] == "running":
        assert time.monotonic() < deadline, sweep
        time.sleep(0.1)
    assert sweep["fine_tuned_model"] == "code@1"
    assert sweep["best_job_id"] == sweep["children"][1]["job_id"]
    assert "code" in [model.id for model in sdk.models.list()]
    refused = httpx.post(f"{gateway.url}/v1/sage/sweeps", json=body | {"grid": {"lora.r": [0]}})
    assert refused.json()["error"]["message"] == "grid.lora.r: 0: Input should be greater than 0"


def test_errors_of_the_orchestrator_arrive_as_the_sdks_classes(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve("file-nobody")
    with pytest.raises(openai.NotFoundError):
        sdk.fine_tuning.jobs.retrieve("ftjob-nobody")
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        sdk.models.delete("nobody")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file="file-nobody", seed="x")  # type: ignore[arg-type]
    body = refused.value.response.json()
    assert body["source"] == "orchestrator" and body["error"]["param"] == "seed"


def test_uploads_are_streamed_not_kept(gateway: GatewayProcess, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    line = json.dumps({"prompt": "x" * 1000, "completion": "y"}).encode() + b"\n"
    with big.open("wb") as stream:
        for _ in range(96):
            stream.write(line * (MIB // len(line)))
    before = gateway.rss_bytes()
    with big.open("rb") as stream:
        response = httpx.post(
            f"{gateway.url}/v1/files",
            files={"file": ("big.jsonl", stream)},
            data={"purpose": "fine-tune"},
            timeout=120,
        )
    assert response.status_code == 200 and response.json()["bytes"] == big.stat().st_size
    assert gateway.rss_bytes() - before < 32 * MIB
    file_id = response.json()["id"]
    with httpx.stream("GET", f"{gateway.url}/v1/files/{file_id}/content", timeout=120) as download:
        assert sum(len(chunk) for chunk in download.iter_bytes()) == big.stat().st_size
    assert gateway.rss_bytes() - before < 32 * MIB
    assert httpx.delete(f"{gateway.url}/v1/files/{file_id}").json()["deleted"] is True


def test_paging_goes_through(sdk: openai.OpenAI) -> None:
    ids = [
        sdk.files.create(file=(f"{number}.jsonl", io.BytesIO(rows(3))), purpose="fine-tune").id
        for number in range(3)
    ]
    page = sdk.files.list(limit=2, order="asc", after=ids[0])
    assert [file.id for file in page.data] == ids[1:]


def test_status_knows_who_is_there(gateway: GatewayProcess) -> None:
    parts = {part["name"]: part for part in httpx.get(f"{gateway.url}/v1/sage/status").json()["parts"]}
    states = {name: part["state"] for name, part in parts.items()}
    assert states == {
        "gateway": "up",
        "orchestrator": "up",
        "inference": "up",
        "trainer": "up",
        "merger": "down",
    }
    assert parts["trainer"]["detail"]["worker_id"] == "trainer@test:1"
    assert "heard" in parts["merger"]["detail"]["error"]


def test_devices_are_proxied_and_internal_routes_are_not(gateway: GatewayProcess) -> None:
    assert httpx.get(f"{gateway.url}/v1/sage/devices").json()["object"] == "list"
    for path in ("/internal/workers", "/v1/files/..%2f..%2finternal%2fworkers", "/v1/files/%2e%2e/internal"):
        response = httpx.get(f"{gateway.url}{path}", headers={"X-Sage-Internal-Token": TOKEN})
        assert response.status_code == 404


def test_an_idle_gateway_is_small(gateway: GatewayProcess) -> None:
    assert gateway.rss_bytes() < 80 * MIB
