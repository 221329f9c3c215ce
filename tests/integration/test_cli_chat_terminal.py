"""A conversation on a real terminal: what is typed, Ctrl-C, and how it is left."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from tests.fakes.fake_gateway import build_app
from tests.fakes.fake_gateway_state import STEPS

TIMEOUT_S = 30.0
CTRL_C = "\x03"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(build_app(), log_config=None, timeout_graceful_shutdown=1))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=TIMEOUT_S)


def _as_at_a_login() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal's Ctrl-C goes to whoever it controls
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background have it ignored


class Terminal:
    """`sage …` with a terminal of its own."""

    def __init__(self, environment: dict[str, str], *words: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sage_cli.main", *words],
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_as_at_a_login,
        )
        os.close(slave)
        self.screen = ""
        self.raw = ""
        """With the escapes that the screen is without."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, *, nudge: str = "") -> None:
        """Wait until this appears after what was already expected, typing `nudge` every two seconds."""
        deadline = time.monotonic() + TIMEOUT_S
        typed_at = time.monotonic()
        while (found := self.screen.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"{text!r} does not appear:\n{self.screen}"
            self._read(0.1)
            if nudge and time.monotonic() - typed_at > 2:
                typed_at = time.monotonic()
                self.type(nudge)
        self._seen = found + len(text)

    def ends_with(self, code: int, *, again: str = "") -> None:
        """Wait for its end, typing `again` every two seconds, as a person would."""
        deadline = time.monotonic() + TIMEOUT_S
        typed_at = time.monotonic()
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.screen}"
            self._read(0.1)
            if again and time.monotonic() - typed_at > 2:
                typed_at = time.monotonic()
                self.type(again)
        assert self.process.returncode == code, self.screen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=TIMEOUT_S)
        os.close(self._master)

    def _read(self, timeout_s: float) -> None:
        if select.select([self._master], [], [], timeout_s)[0]:
            try:
                read = self._decoder.decode(os.read(self._master, 65536))
            except OSError:
                return  # the other side is closed
            self.raw += read
            self.screen += _ESCAPES.sub("", read)


@pytest.fixture
def environment(gateway: str, tmp_path: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAGE_")}
    return clean | {
        "SAGE_GATEWAY_URL": gateway,
        "SAGE_HOME": str(tmp_path),
        "TERM": "xterm",
        "COLUMNS": "80",
        "LANG": "C.UTF-8",
    }


@pytest.fixture
def chat(environment: dict[str, str]) -> Iterator[Terminal]:
    terminal = Terminal(environment, "chat", "--model", "base:m")
    yield terminal
    terminal.close()


def test_questions_are_answered_until_bye(chat: Terminal) -> None:
    chat.expect("Chatting with base:m")
    chat.expect("› ")
    chat.type("hello\n")
    chat.expect("base:m says: you asked 'hello'")
    chat.type("error\n")
    chat.expect("The engine died: out of memory.")
    chat.type("/new\n")
    chat.expect("(a new conversation)")
    chat.type("/bye\n")
    chat.ends_with(0)


def test_an_answer_cannot_control_the_terminal(environment: dict[str, str]) -> None:
    words = ["chat", "--model", "base:\x1b]0;title\x07\x9b31m\r\n\tred", "-m", "hello"]
    terminal = Terminal(environment, *words)
    try:
        terminal.expect("red says: you asked 'hello'")
        terminal.ends_with(0)
    finally:
        terminal.close()
    assert "base:]0;title31m\r\n" in terminal.raw  # the terminal puts \r in front of \n
    assert not any(control in terminal.raw for control in ("\x1b]", "\x07", "\x9b"))


def test_a_pipe_is_given_the_answer_as_it_is(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "sage_cli.main", "chat", "--model", "base:\x1b[31mred", "-m", "hello"]
    ran = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_S, check=True)
    assert ran.stdout.startswith(b"base:\x1b[31mred says")


def test_what_is_pasted_is_one_question(chat: Terminal) -> None:
    chat.expect("› ")
    assert "\x1b[?2004h" in chat.raw  # asks the terminal to mark what is pasted
    chat.type("\x1b[200~def f(x):\r    return x\x1b[201~\n")
    chat.expect(r"base:m says: you asked 'def f(x):\n    return x'")
    chat.type("/bye\n")
    chat.ends_with(0)


def test_a_conversation_that_has_grown_too_long_goes_on_without_its_oldest_part(
    environment: dict[str, str],
) -> None:
    terminal = Terminal(environment, "chat", "--model", "base:short")
    try:
        for question in ("one", "two"):
            terminal.expect("› ")
            terminal.type(f"{question}\n")
            terminal.expect(f"you asked '{question}'")
        terminal.type("three\n")
        terminal.expect("The conversation has grown too long for this model")
        terminal.expect("you asked 'three'")
        terminal.type("a long one\n")
        terminal.expect("Error: This model's context is full.")
        terminal.type("four\n")
        terminal.expect("you asked 'four'")
        terminal.type("/bye\n")
        terminal.ends_with(0)
    finally:
        terminal.close()
    bodies = httpx.get(f"{environment['SAGE_GATEWAY_URL']}/requests").json()
    asked = [[said["content"] for said in body["body"]["messages"]] for body in bodies if "body" in body]
    # What was asked in vain took nothing of the conversation away.
    assert asked[-2][-3:] == ["three", "base:short says: you asked 'three' ", "four"] and len(asked[-2]) == 5
    assert asked[-1] == asked[-2][2:]


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(chat: Terminal) -> None:
    chat.expect("› ")
    chat.type("endless\n")
    chat.expect("more more more")
    chat.type(CTRL_C)
    chat.expect("(stopped)")
    chat.type("still there?\n")
    chat.expect("you asked 'still there?'")
    chat.type("/bye\n")
    chat.ends_with(0)


def test_ctrl_c_twice_leaves(chat: Terminal) -> None:
    chat.expect("› ")
    chat.type(CTRL_C)
    # A signal between readline's prompt and its wait is only seen when the line ends.
    chat.expect("Ctrl-C again, or /bye, leaves", nudge="\n")
    chat.expect("› ")
    chat.type(CTRL_C)
    chat.ends_with(130, again=CTRL_C)


def test_the_end_of_input_leaves(chat: Terminal) -> None:
    chat.expect("› ")
    chat.type("\x04")
    chat.ends_with(0)


def test_ctrl_c_while_watching_leaves_the_job_alone(environment: dict[str, str]) -> None:
    terminal = Terminal(environment, "finetune", "start", "--task", "code", "--name", "endless")
    try:
        terminal.expect("Training 'endless'")
        terminal.expect(f"step {STEPS}/{STEPS}")
        terminal.type(CTRL_C)
        terminal.expect("Detached: the job goes on without you.")
        terminal.expect("sage finetune watch ftjob-")
        terminal.ends_with(130)
    finally:
        terminal.close()
    shown = subprocess.run(
        [sys.executable, "-m", "sage_cli.main", "finetune", "list"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "running" in shown.stdout
