"""`sage up --docker` and `sage down` against the real Docker, with one small service for the whole stack."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

TIMEOUT_S = 180.0
IMAGE = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")

SERVER = """
import http.server, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"status": "ok", "service": "gateway"}'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
pathlib.Path("/sage/state/seen").write_text(os.environ["SAGE_INTERNAL_TOKEN"])
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""


pytestmark = [pytest.mark.docker, pytest.mark.base_image]


@dataclass(frozen=True)
class Machine:
    environment: dict[str, str]
    home: Path
    project: str

    def sage(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sage_cli.main", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def left(self, kind: str) -> list[str]:
        """What Docker has of this project: `container` or `network`."""
        command = ["docker", kind, "ls", "-q", "--filter", f"label=com.docker.compose.project={self.project}"]
        if kind == "container":
            command.append("--all")
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return ran.stdout.split()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    project = f"sage-cli-test-{os.getpid()}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAGE_")}
    environment = clean | {
        "SAGE_HOME": str(tmp_path / "home"),
        "SAGE_COMPOSE_FILE": str(tmp_path / "compose.yaml"),
        "COMPOSE_PROJECT_NAME": project,
        "SAGE_GATEWAY_PORT": str(port),
        **{f"SAGE_{name}_PORT": str(port + n) for n, name in enumerate(("ORCHESTRATOR", "TENSORBOARD"), 1)},
        "SAGE_CHAT_FINETUNE_PORT": str(port + 3),
    }
    machine = Machine(environment, tmp_path / "home", project)
    yield machine
    machine.sage("down")


def write_compose(machine: Machine, program: str) -> None:
    health = [
        "CMD",
        "python3",
        "-c",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080')",
    ]
    gateway = {
        "image": IMAGE,
        "init": True,
        "command": ["python3", "-c", program.replace("$", "$$")],
        "user": "${SAGE_UID}:${SAGE_GID}",
        "volumes": ["${SAGE_HOME}:/sage"],
        "environment": {"SAGE_INTERNAL_TOKEN": "${SAGE_INTERNAL_TOKEN}"},
        "ports": ["${SAGE_BIND}:${SAGE_GATEWAY_PORT}:8080"],
        "healthcheck": {"test": health, "interval": "1s", "retries": 30},
    }
    # JSON is YAML.
    Path(machine.environment["SAGE_COMPOSE_FILE"]).write_text(json.dumps({"services": {"gateway": gateway}}))


def test_up_is_healthy_twice_and_down_leaves_nothing(machine: Machine) -> None:
    write_compose(machine, SERVER)
    ran = machine.sage("up")
    assert ran.returncode == 0, ran.stderr
    assert "containers" in ran.stderr
    url = f"http://127.0.0.1:{machine.environment['SAGE_GATEWAY_PORT']}"
    assert httpx.get(f"{url}/healthz").is_success
    # The home of the host is the home of the containers, and both know one secret.
    token = (machine.home / "state" / "internal_token").read_text().strip()
    assert (machine.home / "state" / "seen").read_text() == token
    assert (machine.home / "state" / "seen").stat().st_uid != 0

    before = machine.left("container")
    assert machine.sage("up", "--docker").returncode == 0
    assert machine.left("container") == before
    assert machine.sage("up", "--embedded").returncode == 2

    ran = machine.sage("down")
    assert ran.returncode == 0, ran.stderr
    assert "Stopped: containers" in ran.stderr
    assert machine.left("container") == []
    assert machine.left("network") == []
    assert "Nothing was running" in machine.sage("down").stderr


def test_a_service_that_fails_is_named_and_nothing_is_left(machine: Machine) -> None:
    write_compose(machine, "raise SystemExit(3)")
    ran = machine.sage("up", "--docker", "--timeout", "30")
    assert ran.returncode == 4
    assert "gateway" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert machine.left("container") == []
    assert not (machine.home / "run" / "stack.json").exists()


def test_containers_that_were_started_by_hand_are_stopped_too(machine: Machine) -> None:
    write_compose(machine, SERVER)
    by_hand = {
        **machine.environment,
        "SAGE_UID": str(os.getuid()),
        "SAGE_GID": str(os.getgid()),
        "SAGE_BIND": "127.0.0.1",
        "SAGE_INTERNAL_TOKEN": "x",
    }
    (machine.home / "state").mkdir(parents=True)
    subprocess.run(
        ["docker", "compose", "-f", machine.environment["SAGE_COMPOSE_FILE"], "up", "--detach", "--wait"],
        env=by_hand,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert machine.left("container")
    assert machine.sage("down").returncode == 0
    assert machine.left("container") == []


def test_without_docker_it_is_said_what_to_do(machine: Machine) -> None:
    write_compose(machine, SERVER)
    ran = Machine(
        machine.environment | {"DOCKER_HOST": "unix:///nowhere.sock"}, machine.home, machine.project
    ).sage("up", "--docker")
    assert ran.returncode == 2
    assert "engine does not answer" in ran.stderr
    assert "sage up --embedded" in ran.stderr


def test_down_never_says_nothing_ran_when_it_could_not_look(machine: Machine, tmp_path: Path) -> None:
    write_compose(machine, SERVER)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    # An engine with a container of ours, and a command without the Compose plugin.
    docker.write_text('#!/bin/sh\ncase "$1" in compose) exit 1 ;; ps) echo 0123abcd ;; esac\n')
    docker.chmod(0o755)
    machine.home.mkdir()
    path = f"{docker.parent}{os.pathsep}{os.environ['PATH']}"
    ran = Machine(machine.environment | {"PATH": path}, machine.home, machine.project).sage("down")
    assert ran.returncode == 2
    assert "not stopped" in ran.stderr
    assert "Compose" in ran.stderr
