"""`sage up` in containers: which home and settings Compose is given. A stand-in for Docker takes notes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sage_cli import locate

Sage = Callable[..., Any]

DOCKER = """#!/usr/bin/env python3
import json, os, pathlib, sys
words, notes = sys.argv[1:], pathlib.Path(__file__).parent
with (notes / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({"words": words, "environment": dict(os.environ)}) + "\\n")
volumes = (notes / "volumes").read_text().split() if (notes / "volumes").exists() else []
sys.exit(0 if words[:2] != ["volume", "inspect"] or words[2] in volumes else 1)
"""


@dataclass(frozen=True)
class Docker:
    """What stands in for `docker`: an engine without containers, whose every command succeeds."""

    folder: Path

    def add_volume(self, name: str) -> None:
        (self.folder / "volumes").write_text(name)

    def ups(self) -> list[dict[str, str]]:
        """The environments that `docker compose up` was given."""
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return [call["environment"] for call in calls if "up" in call["words"]]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(DOCKER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return Docker(program.parent)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compose.yaml, with free ports in its `.env`."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "compose.yaml").write_text("services: {}\n")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in locate.PORT_VARIABLES]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    lines = [f"{name}={port}" for name, port in zip(locate.PORT_VARIABLES.values(), ports, strict=True)]
    (folder / ".env").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("SAGE_COMPOSE_FILE", str(folder / "compose.yaml"))
    return folder


@pytest.fixture
def at_home(sage: Sage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sage:
    """`sage …` of somebody who has set nothing."""
    for name in [name for name in os.environ if name.startswith("SAGE_") and name != "SAGE_COMPOSE_FILE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return sage


def write_env(tree: Path, *lines: str) -> None:
    with (tree / ".env").open("a") as file:
        file.write("\n".join(lines) + "\n")


def test_a_stack_that_was_started_by_compose_alone_is_not_left_for_an_empty_one(
    tree: Path, at_home: Sage, docker: Docker
) -> None:
    docker.add_volume("sage_sage-home")
    ran = at_home("up", "--docker")
    assert ran.exit_code == 2
    assert "volume sage_sage-home" in ran.stderr
    assert "`docker compose up -d`" in ran.stderr
    assert f"`SAGE_HOME={locate.home_root()} sage up`" in ran.stderr
    assert docker.ups() == []
    assert not locate.record_path().exists()


def test_a_volume_of_another_project_is_nobody_elses_business(
    tree: Path, at_home: Sage, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker.add_volume("sage_sage-home")
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "other")
    assert at_home("up", "--docker").exit_code == 0


def test_a_folder_that_was_asked_for_is_used_whatever_volume_there_is(
    tree: Path, at_home: Sage, docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker.add_volume("sage_sage-home")
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "asked"))
    ran = at_home("up", "--docker")
    assert ran.exit_code == 0, ran.stderr
    assert [up["SAGE_HOME"] for up in docker.ups()] == [str(tmp_path / "asked")]


def test_a_stack_of_ones_own_is_joined_whatever_volume_there_is(
    tree: Path, at_home: Sage, docker: Docker
) -> None:
    assert at_home("up", "--docker").exit_code == 0
    docker.add_volume("sage_sage-home")
    assert at_home("up", "--docker").exit_code == 0
    assert len(docker.ups()) == 2


def test_what_stands_in_env_counts_and_what_the_caller_sets_counts_more(
    tree: Path, at_home: Sage, docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_env(
        tree, f"SAGE_HOME='{tmp_path}/kept'", "export SAGE_BIND=127.0.0.2", "SAGE_UID=1234", "SAGE_GID=1235"
    )
    write_env(tree, "SAGE_INTERNAL_TOKEN=of-the-file # a comment")
    ran = at_home("up", "--docker")
    assert ran.exit_code == 0, ran.stderr
    (up,) = docker.ups()
    assert (
        up.items()
        >= {
            "SAGE_HOME": f"{tmp_path}/kept",
            "SAGE_BIND": "127.0.0.2",
            "SAGE_UID": "1234",
            "SAGE_GID": "1235",
            "SAGE_INTERNAL_TOKEN": "of-the-file",
        }.items()
    )
    wanted = dict(line.split("=") for line in (tree / ".env").read_text().splitlines() if "_PORT=" in line)
    assert {name: up[name] for name in wanted} == wanted
    # Other commands find that stack.
    assert locate.home_root() == tmp_path / "kept"
    assert locate.gateway_url() == f"http://127.0.0.2:{wanted['SAGE_GATEWAY_PORT']}"

    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("SAGE_BIND", "127.0.0.3")
    assert at_home("up", "--docker").exit_code == 0
    assert (docker.ups()[-1]["SAGE_HOME"], docker.ups()[-1]["SAGE_BIND"]) == (f"{tmp_path}/mine", "127.0.0.3")


@pytest.mark.parametrize(
    ("written", "meant"), [("./data", "tree/data"), ("~/data", "data"), ("sage-home", ".sage")]
)
def test_a_home_in_env_is_what_compose_takes_it_for(
    tree: Path, at_home: Sage, tmp_path: Path, written: str, meant: str
) -> None:
    write_env(tree, f"SAGE_HOME={written}")  # a name alone is a volume's: no folder of this machine
    assert locate.home_root() == tmp_path / meant


def test_the_recorded_stack_wins_over_the_ports_of_the_next_one(
    tree: Path, at_home: Sage, docker: Docker
) -> None:
    assert at_home("up", "--docker").exit_code == 0
    running = locate.gateway_url()
    write_env(tree, "SAGE_GATEWAY_PORT=1")
    assert locate.gateway_url() == running
