"""Process groups: everything a child started ends with it, also when its parent was killed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.small_disk import no_room_below

from sage_contracts.errors import EngineFailedError
from sage_inference import process_group
from sage_inference.engine_process import EngineProcess, Launch

FAMILY = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    time.sleep(60)
print("up", flush=True)
time.sleep(60)
"""
BUSY_CHILD = """
import os, time
if os.fork() == 0:
    while time.process_time() < 0.3:
        pass
    os._exit(0)
os.wait()
print("it ended", flush=True)
input()
"""


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A process and a child of it that ignores SIGTERM."""
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    with process:
        yield process
        if process_group.alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


async def test_a_group_ends_with_its_stubborn_members(family: subprocess.Popen[bytes]) -> None:
    assert len(process_group.alive(family.pid)) == 2
    await process_group.end(family.pid, grace_s=0.1)
    assert process_group.alive(family.pid) == []


async def test_members_are_found_when_the_leader_was_killed(family: subprocess.Popen[bytes]) -> None:
    family.kill()
    family.wait()
    assert len(process_group.alive(family.pid)) == 1
    await process_group.end(family.pid, grace_s=0.1)
    assert process_group.alive(family.pid) == []


async def test_a_successor_ends_what_a_killed_agent_left(
    family: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    process_group.GroupRecord(tmp_path, "engine").write(family.pid)
    assert await process_group.end_leftovers(tmp_path, grace_s=0.1) == [family.pid]
    assert process_group.alive(family.pid) == [] and process_group.leftovers(tmp_path) == {}


@pytest.mark.parametrize("change", [{"started_ticks": "1"}, {"boot": "another"}, {"group": "no number"}])
async def test_a_number_that_belongs_to_somebody_else_by_now_is_left_alone(
    family: subprocess.Popen[bytes], tmp_path: Path, change: dict[str, str]
) -> None:
    process_group.GroupRecord(tmp_path, "engine").write(family.pid)
    record = tmp_path / "engine.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert await process_group.end_leftovers(tmp_path, grace_s=0.1) == []
    assert len(process_group.alive(family.pid)) == 2 and not record.exists()


async def test_an_engine_whose_log_has_no_room_goes_on_and_what_it_says_is_still_read(tmp_path: Path) -> None:
    # More than a pipe holds: who is not read from never gets to its last line.
    command = [sys.executable, "-c", "print('a line\\n' * 100_000, 'ValueError: the reason', sep='')"]
    log_path = tmp_path / "logs" / "engine.log"
    launch = Launch("tiny", lambda _: command, {}, 1, 1, 1, 1, log_path, tmp_path / "records")
    with no_room_below(tmp_path / "logs"):
        engine = await EngineProcess.start(launch)
        try:
            await asyncio.wait_for(engine.exited.wait(), 30)
        finally:
            await engine.stop()
    assert "the reason" in str(engine.failure("ended"))


async def test_an_engine_whose_record_has_no_room_leaves_no_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    launch = Launch("tiny", lambda _: command, {}, 1, 1, 1, 1, tmp_path / "engine.log", tmp_path / "records")
    with (
        caplog.at_level(logging.INFO),
        no_room_below(tmp_path / "records"),
        pytest.raises(OSError, match="No space left"),
    ):
        await EngineProcess.start(launch)
    [pid] = [record.args[1] for record in caplog.records if record.msg.startswith("engine %s: pid")]
    assert process_group.alive(pid) == []
    with pytest.raises(ProcessLookupError):  # reaped, too
        os.kill(pid, 0)


def test_what_a_group_computes_is_counted_with_its_children_that_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY_CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process_group.cpu_seconds(process.pid) >= 0.2  # counted in ticks, rounded down
        process.kill()
        process.wait()
    assert process_group.cpu_seconds(process.pid) == 0


async def test_an_engine_that_stands_still_while_it_starts_is_not_waited_for(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "print('Starting to load model', flush=True); __import__('time').sleep(60)",
    ]
    launch = Launch(
        "tiny", lambda _: command, {}, 600, 0.2, 1, 1, tmp_path / "engine.log", tmp_path / "records"
    )
    engine = await EngineProcess.start(launch)
    try:
        with pytest.raises(EngineFailedError, match=r"neither logged nor computed .*loading weights"):
            await asyncio.wait_for(engine.wait_ready(), 60)
    finally:
        await engine.stop()


async def test_an_engine_gets_what_it_is_given_and_none_of_our_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs code that models and their templates bring along."""
    keys = ("SAGE_INTERNAL_TOKEN", "SAGE_API_KEYS", "SAGE_DATABASE_URL", "OPENAI_API_KEY")
    for name in keys:
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    seen = tmp_path / "seen"
    script = "import os, sys; open(sys.argv[1], 'wb').write(open('/proc/self/environ', 'rb').read())"
    command = [sys.executable, "-c", script, str(seen)]
    environment = {"CUDA_VISIBLE_DEVICES": "1"}
    launch = Launch(
        "tiny", lambda _: command, environment, 1, 1, 1, 1, tmp_path / "engine.log", tmp_path / "records"
    )
    engine = await EngineProcess.start(launch)
    try:
        await asyncio.wait_for(engine.exited.wait(), 30)
    finally:
        await engine.stop()
    names = dict(line.split("=", 1) for line in seen.read_text().split("\0") if line)
    assert (names["CUDA_VISIBLE_DEVICES"], names["HTTPS_PROXY"]) == ("1", "http://proxy:1")
    assert "s3cret" not in names.values() and names.keys().isdisjoint(keys)
