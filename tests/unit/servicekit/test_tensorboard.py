"""TensorBoard on a loopback address is no page's, whatever name leads there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("tensorboard")

OURS = ("127.0.0.1:6006", "localhost", "tensorboard:6006", "box.local")
THEIRS = ("evil.example", "evil.example:6006", "127.0.0.1.evil.example")


@contextmanager
def started(home: Path, host: str, published_on: str) -> Iterator[httpx.Client]:
    command = [sys.executable, "-m", "sage_servicekit.tensorboard", "--logdir", str(home)]
    board = subprocess.Popen(
        [*command, "--host", host, "--port", "0", "--load_fast", "false"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SAGE_PUBLISHED_ON": published_on},
    )
    assert board.stderr is not None
    try:
        found = next(filter(None, (re.search(r"http://\S+:(\d+)/", line) for line in board.stderr)))
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", trust_env=False, timeout=60) as client:
            yield client
    finally:
        board.terminate()
        board.wait(20)
        board.stderr.close()


@pytest.mark.parametrize(("host", "published_on"), [("127.0.0.1", ""), ("0.0.0.0", "127.0.0.1")])
def test_a_name_that_somebody_else_could_own_is_refused(tmp_path: Path, host: str, published_on: str) -> None:
    with started(tmp_path, host, published_on) as client:
        said = {name: client.get("/data/runs", headers={"host": name}) for name in (*OURS, *THEIRS)}
    assert {name: answer.status_code for name, answer in said.items()} == dict.fromkeys(
        OURS, 200
    ) | dict.fromkeys(THEIRS, 403)
    assert said[OURS[0]].json() == [] and "127.0.0.1 or localhost" in said[THEIRS[0]].text


def test_on_a_network_it_answers_to_every_name(tmp_path: Path) -> None:
    with started(tmp_path, "0.0.0.0", "") as client:
        assert client.get("/data/runs", headers={"host": THEIRS[0]}).status_code == 200
