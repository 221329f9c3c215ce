"""compose.yaml and its overlays are valid, and say what the design promises about every container."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = {"redis", "orchestrator", "trainer", "merger", "inference", "gateway", "tensorboard"}
GPU_SERVICES = {"trainer", "inference"}

pytestmark = pytest.mark.docker


def config(*files: str, **settings: str) -> dict[str, Any]:
    """What `docker compose config` makes of the files, with nothing of the caller's own settings."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SAGE_", "COMPOSE_"))
    }
    command = ["docker", "compose", "--env-file", os.devnull]
    for file in files:
        command += ["-f", file]
    answer = subprocess.run(
        [*command, "config", "--format", "json"],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    resolved: dict[str, Any] = json.loads(answer.stdout)
    return resolved


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    return config("compose.yaml")


@pytest.fixture(scope="module")
def gpu_stack() -> dict[str, Any]:
    return config("compose.yaml", "deploy/compose.gpu.yaml")


def test_the_stack_has_every_part_and_builds_each(stack: dict[str, Any]) -> None:
    assert set(stack["services"]) == SERVICES
    for service in stack["services"].values():
        assert Path(service["build"]["context"]) == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "deploy/compose.gpu.yaml")])
def test_no_container_is_allowed_more_than_it_needs(files: tuple[str, ...]) -> None:
    for name, service in config(*files)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"], name
        assert not service["user"].startswith("0:"), name
        assert "docker.sock" not in json.dumps(service.get("volumes", [])), name
        assert service["healthcheck"]["test"], name


def test_ports_are_published_on_loopback_and_the_gateways_elsewhere_when_asked(stack: dict[str, Any]) -> None:
    published = [port for service in stack["services"].values() for port in service.get("ports", [])]
    assert {port["published"] for port in published} == {"8080", "8081", "8000", "6006"}
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    opened = config("compose.yaml", SAGE_BIND="0.0.0.0", SAGE_GATEWAY_PORT="9090")
    (port,) = opened["services"]["gateway"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "9090", 8080)
    for name in ("orchestrator", "inference", "tensorboard"):
        assert [port["host_ip"] for port in opened["services"][name]["ports"]] == ["127.0.0.1"], name


@pytest.mark.parametrize(
    ("grace", "period"), [("", "1m30s"), ("30", "1m30s"), ("300", "6m0s"), ("0.5", "1m0.5s")]
)
def test_the_trainers_container_outlives_the_checkpoint_that_is_waited_for(grace: str, period: str) -> None:
    trainer = config("compose.yaml", SAGE_STOP_GRACE_S=grace)["services"]["trainer"]
    assert trainer["stop_grace_period"] == period
    assert trainer["environment"]["SAGE_STOP_GRACE_S"] == grace


def test_starts_wait_for_health(stack: dict[str, Any]) -> None:
    for name, service in stack["services"].items():
        waits = service.get("depends_on", {})
        assert all(wait["condition"] == "service_healthy" for wait in waits.values()), name
        assert waits or name == "redis"


def test_a_folder_of_the_host_can_be_the_home_and_its_owner_the_user() -> None:
    trainer = config("compose.yaml", SAGE_HOME="/srv/sage", SAGE_UID="1234", SAGE_GID="1234")["services"][
        "trainer"
    ]
    assert trainer["user"] == "1234:1234"
    assert [(volume["type"], volume["source"], volume["target"]) for volume in trainer["volumes"]] == [
        ("bind", "/srv/sage", "/sage")
    ]


def test_secrets_are_handed_on_only_when_the_caller_has_them(stack: dict[str, Any]) -> None:
    assert stack["services"]["gateway"]["environment"]["SAGE_INTERNAL_TOKEN"] is None
    given = config("compose.yaml", SAGE_INTERNAL_TOKEN="abc")["services"]["orchestrator"]["environment"]
    assert given["SAGE_INTERNAL_TOKEN"] == "abc"


def test_the_gpu_overlay_reserves_nvidia_devices_and_builds_cuda_images(gpu_stack: dict[str, Any]) -> None:
    services = gpu_stack["services"]
    reserving = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in services.items()
        if service.get("deploy")
    }
    assert set(reserving) == GPU_SERVICES
    for devices in reserving.values():
        assert [(device["driver"], device["capabilities"]) for device in devices] == [("nvidia", ["gpu"])]
    assert services["trainer"]["build"]["args"]["TORCH_BACKEND"].startswith("cu")
    assert services["inference"]["build"]["target"] == "gpu"
    assert services["inference"]["build"]["args"]["VLLM_IMAGE"].startswith("vllm/vllm-openai:")
