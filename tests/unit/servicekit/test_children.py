"""A child process is heard, stopped and reaped, whatever it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sage_servicekit.children import MAX_LOG_BYTES, Child, describe_exit, tail


def spawn(tmp_path: Path, code: str) -> Child:
    return Child([sys.executable, "-u", "-c", code], log_path=tmp_path / "logs" / "child.log")


def lines(child: Child, enough: Callable[[list[str]], bool], timeout_s: float = 20) -> list[str]:
    heard: list[str] = []
    deadline = time.monotonic() + timeout_s
    while not enough(heard):
        assert time.monotonic() < deadline, heard
        heard += [line.decode().strip() for line in child.receive(0.5)]
    return heard


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_dead(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, f"{pid} lives"
        time.sleep(0.01)


def test_a_child_is_heard_and_its_noise_is_logged(tmp_path: Path) -> None:
    with spawn(
        tmp_path, "import sys; print('one'); print('noise', file=sys.stderr); print('two'); sys.exit(3)"
    ) as child:
        assert lines(child, lambda heard: len(heard) == 2) == ["one", "two"]
        assert child.receive(10) == []
        assert child.reap() == 3
    assert tail(tmp_path / "logs/child.log") == "noise"


def test_a_log_that_has_grown_large_is_set_aside_for_the_next_child(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    say = "import sys; print('noise', file=sys.stderr)"
    log.parent.mkdir()
    for _ in range(2):
        log.write_bytes(b"x" * MAX_LOG_BYTES + b"last")
        with spawn(tmp_path, say) as child:
            assert child.receive(20) == []  # it has ended
        assert log.read_text() == "noise\n"
    assert tail(log.with_name("child.log.1"), max_bytes=4) == "last"
    assert len(list(log.parent.iterdir())) == 2

    with spawn(tmp_path, say) as child:
        assert child.receive(20) == []
    assert log.read_text() == "noise\nnoise\n"


def test_stdout_is_for_messages_alone(tmp_path: Path) -> None:
    code = (
        "import os; from sage_servicekit.children import take_stdout; out = take_stdout();"
        "print('a library prints'); os.system('echo a program prints'); out.write('message\\n')"
    )
    with spawn(tmp_path, code) as child:
        assert lines(child, lambda heard: bool(heard)) == ["message"]
        child.reap()
    assert tail(tmp_path / "logs/child.log") == "a library prints\na program prints"


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('deaf'); signal.pause()"
    with spawn(tmp_path, code) as child:
        lines(child, lambda heard: heard == ["deaf"])
        child.stop(grace_s=0.1)
        assert child.receive(10) == []
        assert child.has_ended()
        assert child.was_killed
        assert child.reap() == -signal.SIGKILL


def test_a_child_that_obeys_is_not_killed(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('ready'); signal.pause()"
    with spawn(tmp_path, code) as child:
        lines(child, lambda heard: heard == ["ready"])
        child.stop(grace_s=60)
        child.receive(10)
        assert child.reap() == 0
        assert not child.was_killed


def test_leaving_the_block_leaves_nobody_behind(tmp_path: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid); p.wait()"
    with spawn(tmp_path, code) as child:
        (grandchild,) = (int(line) for line in lines(child, lambda heard: bool(heard)))
    wait_dead(grandchild)
    wait_dead(child.pid)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child_code = (
        "from sage_servicekit.children import end_with_parent; end_with_parent();"
        "import os, signal; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); signal.pause()"
    )
    parent_code = (
        "import sys, signal; from pathlib import Path; from sage_servicekit.children import Child;"
        f"child = Child([sys.executable, '-c', {child_code!r}], log_path=Path({str(tmp_path / 'log')!r}));"
        "print(child.receive(20)[0].decode().strip(), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_dead(pid)


def test_a_child_started_by_hand_does_not_wait_for_a_parent() -> None:
    code = "from sage_servicekit.children import end_with_parent; end_with_parent(); print('lives')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == "lives\n"


def test_a_program_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Child(["/no/such/program"], log_path=tmp_path / "log")


def test_tail_starts_where_the_attempt_began(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n" * 3)
    start = log.stat().st_size
    with log.open("a") as stream:
        stream.writelines(f"new {number}\n" for number in range(50))
    assert tail(log, since_byte=start, max_lines=2) == "new 48\nnew 49"
    assert "old" not in tail(log, since_byte=start, max_lines=1000)
    assert tail(tmp_path / "none") == ""


@pytest.mark.parametrize(("code", "text"), [(3, "exit code 3"), (-9, "signal SIGKILL"), (-999, "signal 999")])
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_messages_survive_json(tmp_path: Path) -> None:
    text = "line one\nline two\u2028 ü"
    code = f"import json; print(json.dumps({{'text': {text!r}}}))"
    with spawn(tmp_path, code) as child:
        (line,) = lines(child, lambda heard: bool(heard))
    assert json.loads(line) == {"text": text}
    assert os.getpid() != child.pid
