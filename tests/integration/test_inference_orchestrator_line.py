"""The inference host's client against real HTTP: what is remembered, and what errors become."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fakes import model_registry
from tests.fakes.asgi_server import serving, unused_url
from tests.fakes.inference_rig import make_registry

from sage_contracts.devices import LeaseRequest
from sage_contracts.errors import DeviceBusyError, ModelNotFoundError, ServiceUnavailableError
from sage_inference.orchestrator import Orchestrator
from sage_inference.settings import InferenceSettings

LEASE = LeaseRequest(holder="engine:x", purpose="inference", device="cpu", bytes=1, total_bytes=2)


async def test_names_are_remembered_for_two_seconds_because_aliases_move(tmp_path: Path) -> None:
    registry, now = make_registry(tmp_path), 0.0
    with serving(model_registry.build_app(registry, tmp_path)) as url:
        settings = InferenceSettings(home_dir=tmp_path, orchestrator_url=url)
        line = Orchestrator(settings, clock=lambda: now)
        assert (await line.resolve("code")).id == "code@1"
        registry.models["code"] = registry.models["code@2"]
        now = 1.9
        assert (await line.resolve("code")).id == "code@1"
        now = 2.1
        assert (await line.resolve("code")).id == "code@2"
        assert registry.resolved == 2
        await line.close()


async def test_errors_arrive_as_they_were_raised(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    with serving(model_registry.build_app(registry, tmp_path)) as url:
        line = Orchestrator(InferenceSettings(home_dir=tmp_path, orchestrator_url=url))
        with pytest.raises(ModelNotFoundError, match="There are: "):
            await line.resolve("nobody")
        assert (await line.lease(LEASE)).ttl_s == 30
        await line.release(LEASE.holder)
        registry.busy_with = "training code"
        with pytest.raises(DeviceBusyError, match="training code") as refusal:
            await line.lease(LEASE)
        assert refusal.value.retry_after_s == 30
        await line.close()


async def test_a_silent_orchestrator_is_named_with_its_address(tmp_path: Path) -> None:
    url = unused_url()
    line = Orchestrator(InferenceSettings(home_dir=tmp_path, orchestrator_url=url))
    with pytest.raises(ServiceUnavailableError, match=url):
        await line.resolve("code")
    await line.close()


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "http://127.0.0.1:9"])
async def test_a_proxy_of_the_environment_is_not_for_parts_of_the_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(model_registry.build_app(make_registry(tmp_path), tmp_path)) as url:
        line = Orchestrator(InferenceSettings(home_dir=tmp_path, orchestrator_url=url))
        assert (await line.resolve("code")).id == "code@1"
        await line.close()
