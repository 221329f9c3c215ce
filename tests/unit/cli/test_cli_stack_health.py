"""When a worker counts as ready: by its sign of life, which it gives once the orchestrator has heard it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sage_cli.stack.health import is_healthy
from sage_cli.stack.parts import Part, embedded_parts
from sage_contracts.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.run.mkdir()
    return home


@pytest.fixture
def trainer() -> Part:
    ports = {"orchestrator": 1, "inference": 2, "gateway": 3, "tensorboard": 4}
    parts = embedded_parts(ports, "127.0.0.1", Path("output"))
    return next(part for part in parts if part.name == "trainer")


def test_a_worker_is_ready_while_its_sign_of_life_is_there(home: Home, trainer: Part) -> None:
    assert not is_healthy(trainer, home)
    (home.run / "trainer.alive").touch()
    assert is_healthy(trainer, home)
    (home.run / "trainer.alive").unlink()
    assert not is_healthy(trainer, home)


def test_the_sign_of_a_worker_that_fell_silent_does_not_count(home: Home, trainer: Part) -> None:
    sign = home.run / "trainer.alive"
    sign.touch()
    long_ago = time.time() - 60
    os.utime(sign, (long_ago, long_ago))
    assert not is_healthy(trainer, home)


def test_the_sign_of_an_earlier_stack_is_not_this_ones(home: Home, trainer: Part) -> None:
    sign = home.run / "trainer.alive"
    sign.touch()
    assert is_healthy(trainer, home, since=sign.stat().st_mtime)
    assert not is_healthy(trainer, home, since=sign.stat().st_mtime + 1)
