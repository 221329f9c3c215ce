"""The embedded stack's life under the real supervisord, with parts that do nothing."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sage_cli import locate
from sage_cli.failures import StackError
from sage_cli.stack import embedded, updown
from sage_cli.stack.daemon import Daemon
from sage_cli.stack.gateway import find_own_gateway
from sage_cli.stack.lock import stack_lock
from sage_cli.stack.parts import Part, embedded_parts
from sage_cli.stack.processes import is_alive, marked
from sage_contracts.errors import ConflictError, InvalidRequestError
from sage_contracts.home import Home

PROGRAM = str(Path(__file__).parents[1] / "fakes" / "fake_part.py")
TIMEOUT_S = 40.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def ports() -> dict[str, int]:
    return dict(zip(locate.DEFAULT_PORTS, free_ports(4), strict=True))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    # As deep as a home may be: the socket's path would be too long for the kernel.
    root = tmp_path / ("deep " * 20).strip() / ("50% " * 10).strip()
    root.mkdir(parents=True)
    monkeypatch.setenv("SAGE_HOME", str(root))
    monkeypatch.delenv("SAGE_GATEWAY_URL", raising=False)
    home = Home(root)
    yield home
    if record := locate.read_record():
        embedded.down(home, record, patience_s=10)


def parts(home: Home, ports: dict[str, int], *extra: Part, orphan: Path | None = None) -> list[Part]:
    run = (sys.executable, PROGRAM)
    more = ("--orphan", str(orphan)) if orphan else ()
    return [
        Part("gateway", (*run, "--port", str(ports["gateway"])), ports["gateway"], "/healthz"),
        Part(
            "trainer", (*run, "--alive", str(home.run / "trainer.alive"), *more), alive_file="trainer.alive"
        ),
        *extra,
    ]


def up(home: Home, wanted: list[Part], ports: dict[str, int]) -> locate.StackRecord:
    return embedded.up(home, wanted, ports, "127.0.0.1", timeout_s=TIMEOUT_S, say=lambda _: None)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:.0f} s: {what}"
        threading.Event().wait(0.05)


def test_up_twice_is_one_stack_and_down_leaves_no_process(
    home: Home, ports: dict[str, int], tmp_path: Path
) -> None:
    orphan = tmp_path / "orphan.pid"
    wanted = parts(home, ports, orphan=orphan)
    record = up(home, wanted, ports)
    assert httpx.get(f"{record.gateway_url}/healthz").json()["service"] == "gateway"
    assert locate.gateway_url() == record.gateway_url
    daemon_pid = Daemon(home).pid()

    assert up(home, wanted, ports) == record
    assert Daemon(home).pid() == daemon_pid

    wait_until(lambda: orphan.exists() and bool(orphan.read_text()), "the orphan is there")
    orphan_pid = int(orphan.read_text())
    assert daemon_pid in marked(record.stack_id)
    assert orphan_pid in marked(record.stack_id)
    embedded.down(home, record, patience_s=20)
    assert marked(record.stack_id) == []
    assert not is_alive(orphan_pid)
    assert locate.read_record() is None
    assert list(home.run.iterdir()) == []


def test_only_its_own_home_takes_it_for_its_stack(
    home: Home, ports: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = up(home, parts(home, ports), ports)
    monkeypatch.setenv("SAGE_GATEWAY_PORT", str(ports["gateway"]))
    gateway = find_own_gateway()
    assert gateway is not None
    assert gateway.record == record
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SAGE_HOME", str(tmp_path / "another"))
        with pytest.raises(ConflictError, match="a stack of another home"):
            find_own_gateway()


def test_a_part_that_dies_comes_back(home: Home, ports: dict[str, int]) -> None:
    up(home, parts(home, ports), ports)
    daemon = Daemon(home)
    pid = next(row.pid for row in daemon.states() if row.name == "gateway")
    os.kill(pid, 9)
    wait_until(
        lambda: any(row.name == "gateway" and row.pid not in (0, pid) for row in daemon.states()),
        "a new gateway",
    )


def test_orphans_of_a_killed_daemon_are_cleared_by_the_next_up(home: Home, ports: dict[str, int]) -> None:
    wanted = parts(home, ports)
    first = up(home, wanted, ports)
    kill_daemon(home)
    assert marked(first.stack_id)

    second = up(home, wanted, ports)
    assert second.stack_id != first.stack_id
    assert marked(first.stack_id) == []


def telling_parts(home: Home, ports: dict[str, int]) -> tuple[list[Part], Path]:
    """With a worker that takes a second to leave, and what it then notes: did the others still listen?"""
    told = home.root / "told"
    alive, gateway = str(home.run / "merger.alive"), str(ports["gateway"])
    telling = ("--alive", alive, "--tell", gateway, "--told", str(told))
    worker = Part("merger", (sys.executable, PROGRAM, *telling), alive_file="merger.alive")
    return parts(home, ports, worker), told


def kill_daemon(home: Home) -> None:
    pid = Daemon(home).pid()
    assert pid is not None
    os.kill(pid, 9)
    wait_until(lambda: not is_alive(pid), "the daemon's end")


def lose_socket(home: Home) -> None:
    """As whoever cleans temporary folders does."""
    Daemon(home).socket.unlink()


@pytest.mark.parametrize("loses", [kill_daemon, lose_socket])
@pytest.mark.parametrize("ends_by", ["down", "up"])
def test_workers_of_a_silent_daemon_leave_while_the_others_still_listen(
    home: Home, ports: dict[str, int], ends_by: str, loses: Callable[[Home], None]
) -> None:
    wanted, told = telling_parts(home, ports)
    record = up(home, wanted, ports)
    loses(home)
    if ends_by == "down":
        embedded.down(home, record)
    else:
        assert up(home, wanted, ports) != record
    assert told.read_text() == "heard"
    assert marked(record.stack_id) == []


def test_no_containers_join_a_daemon_that_cannot_be_reached(home: Home, ports: dict[str, int]) -> None:
    record = up(home, parts(home, ports), ports)
    lose_socket(home)
    with pytest.raises(ConflictError, match="already runs as local processes"):
        updown.up("compose")
    assert len(marked(record.stack_id)) == 3


def test_a_worker_that_takes_longer_than_the_patience_still_gets_its_time(
    home: Home, ports: dict[str, int]
) -> None:
    wanted, told = telling_parts(home, ports)
    record = up(home, wanted, ports)
    embedded.down(home, record, patience_s=0.1)
    assert told.read_text() == "heard"
    assert marked(record.stack_id) == []


def test_a_stack_is_one_for_shells_with_different_temporary_folders(
    home: Home,
    ports: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, third = (tmp_path_factory.mktemp("t") for _ in range(3))
    wanted = parts(home, ports)
    monkeypatch.setattr(tempfile, "tempdir", str(first))
    record = up(home, wanted, ports)
    pid = Daemon(home).pid()

    monkeypatch.setattr(tempfile, "tempdir", str(second))
    assert Daemon(home).is_answering()
    assert up(home, wanted, ports) == record
    assert Daemon(home).pid() == pid

    monkeypatch.setattr(tempfile, "tempdir", str(third))
    embedded.down(home, record)
    assert marked(record.stack_id) == []
    assert [list(folder.iterdir()) for folder in (first, second, third)] == [[], [], []]


def test_after_a_power_cut_nobody_elses_process_is_waited_for(home: Home, ports: dict[str, int]) -> None:
    record = up(home, parts(home, ports), ports)
    # All at once, and its number is another's by now.
    for pid in marked(record.stack_id):
        os.kill(pid, 9)
    wait_until(lambda: marked(record.stack_id) == [], "the end of all")
    assert Daemon(home).socket.exists()
    with subprocess.Popen(["sleep", "600"]) as other:
        (home.run / "supervisord.pid").write_text(str(other.pid))
        assert Daemon(home).pid() is None
        started = time.monotonic()
        embedded.down(home, record)
        assert time.monotonic() - started < 5
        assert other.poll() is None
        other.kill()
    assert locate.read_record() is None


def test_a_part_that_cannot_start_is_named_with_its_log_and_nothing_is_left(
    home: Home, ports: dict[str, int]
) -> None:
    broken = Part("merger", (sys.executable, PROGRAM, "--die", "no such broker"), alive_file="merger.alive")
    with pytest.raises(StackError) as caught:
        up(home, parts(home, ports, broken), ports)
    assert "merger does not start" in caught.value.message
    assert "fatal: no such broker" in caught.value.message
    assert locate.read_record() is None
    assert Daemon(home).pid() is None


def test_a_setting_that_keeps_a_part_from_starting_is_told_alone(home: Home, ports: dict[str, int]) -> None:
    command = (sys.executable, "-m", "sage_merger")
    wrong = {"SAGE_FINISH_PATIENCE_S": "long"}
    merger = Part("merger", command, alive_file="merger.alive", environment=wrong)
    with pytest.raises(InvalidRequestError) as caught:
        up(home, parts(home, ports, merger), ports)
    assert (
        "Wrong setting: SAGE_FINISH_PATIENCE_S='long': Input should be a valid number" in caught.value.message
    )
    assert "\n" not in caught.value.message
    assert locate.read_record() is None


def test_a_taken_port_is_named_with_its_owner_and_nothing_starts(home: Home, ports: dict[str, int]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports["gateway"]))
        taken.listen()
        with pytest.raises(InvalidRequestError) as caught:
            up(home, parts(home, ports), ports)
    assert f"Port {ports['gateway']} for gateway is in use" in caught.value.message
    assert f"pid {os.getpid()}" in caught.value.message
    assert "SAGE_GATEWAY_PORT=" in caught.value.message
    assert locate.read_record() is None
    assert Daemon(home).pid() is None


def test_services_get_their_settings_and_one_secret(home: Home, ports: dict[str, int]) -> None:
    record = up(home, parts(home, ports), ports)
    token_file = home.state / "internal_token"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    pid = next(row.pid for row in Daemon(home).states() if row.name == "gateway")
    given = dict(
        pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair
    )
    assert given["SAGE_INTERNAL_TOKEN"] == token_file.read_text().strip()
    assert given["SAGE_HOME"] == str(home.root)
    assert given["SAGE_CHAT_FINETUNE_PORT"] == str(ports["inference"])
    assert given["SAGE_ORCHESTRATOR_URL"] == f"http://127.0.0.1:{ports['orchestrator']}"
    assert given["SAGE_STACK_ID"] == record.stack_id


def test_a_stack_is_stopped_with_the_waits_it_was_started_with(home: Home, ports: dict[str, int]) -> None:
    assert Daemon(home).stop_waits_s() == {}
    wanted = [
        replace(part, stop_wait_s=315) if part.name == "trainer" else part for part in parts(home, ports)
    ]
    up(home, wanted, ports)
    assert Daemon(home).stop_waits_s() == {"gateway": 15, "trainer": 315}


def test_a_stack_on_a_network_shows_it_the_gateway_alone(home: Home, ports: dict[str, int]) -> None:
    there = "127.0.0.2"  # this machine's, and yet not where the other parts belong
    wanted = [
        replace(part, command=(sys.executable, PROGRAM, "--port", str(part.port)), is_awaited=True)
        for part in embedded_parts(ports, there, home.finetune_output)
        if part.port
    ]
    embedded.up(home, wanted, ports, there, timeout_s=TIMEOUT_S, say=lambda _: None)
    heard = {
        (host, part.name): can_connect(host, port)
        for host in ("127.0.0.1", there)
        for part in wanted
        if (port := part.port)
    }
    assert {key for key, is_heard in heard.items() if is_heard} == {
        (there if part.name == "gateway" else "127.0.0.1", part.name) for part in wanted
    }


def can_connect(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


def test_only_one_command_at_a_time(home: Home) -> None:
    lock = home.run / "stack.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ConflictError, match="Another `sage up`"),
            stack_lock(lock, timeout_s=0.2, say=lambda _: None),
        ):
            pass
        holder.communicate("\n", timeout=TIMEOUT_S)
    # Its end, however it came, frees the lock.
    with stack_lock(lock, timeout_s=5, say=lambda _: None):
        pass


_HOLDER = """
import sys
from pathlib import Path
from sage_cli.stack.lock import stack_lock
with stack_lock(Path(sys.argv[1]), timeout_s=5, say=print):
    print("held", flush=True)
    sys.stdin.readline()
"""
