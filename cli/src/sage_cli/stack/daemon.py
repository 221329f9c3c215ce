"""supervisord: its configuration, its life, and the line to it."""

from __future__ import annotations

import configparser
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_cli import locate
from sage_cli.failures import StackError
from sage_cli.stack.parts import Part
from sage_cli.stack.processes import PART_MARK, is_alive, is_marked, send
from sage_contracts.home import Home, write_whole

# 108 bytes is the kernel's limit, and supervisord binds to a longer temporary name first.
_SOCKET_PATH_LIMIT = 90
_PROGRAM = "program:"


@dataclass(frozen=True)
class ProcessState:
    """One process as supervisord sees it."""

    name: str
    state: str
    """STARTING, RUNNING, BACKOFF, STOPPING, STOPPED, EXITED, FATAL or UNKNOWN."""
    pid: int
    note: str


class Daemon:
    """The supervisord of one home."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._config = home.run / "supervisord.conf"
        self._pid_file = home.run / "supervisord.pid"
        self.log = home.logs / "supervisord.log"

    @property
    def socket(self) -> Path:
        """In the run folder, or in a private folder of the temporary directory where that is too long.

        The running daemon's, where one was started: the temporary directory differs from shell to shell.
        """
        if written := self._written().get("unix_http_server", "file", fallback=""):
            return Path(written.replace("%%", "%"))
        path = self._home.run / "supervisord.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"sage-{os.getuid()}-{digest}" / "s.sock"

    def start(self, parts: Sequence[Part], environment: Mapping[str, str]) -> None:
        """Write the configuration and start the daemon. Raises: StackError with the daemon's words."""
        self.forget()
        self._private_socket_dir()
        self._home.logs.mkdir(parents=True, exist_ok=True)
        write_whole(self._config, self._configuration(parts))
        try:
            started = subprocess.run(
                [sys.executable, "-m", "supervisor.supervisord", "-c", str(self._config)],
                env=dict(environment),
                cwd=self._home.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=30,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise StackError("supervisord did not go to the background within 30 s.") from None
        if started.returncode != 0:
            raise StackError(f"supervisord would not start: {(started.stderr or started.stdout).strip()}")
        self._await_answer(deadline=time.monotonic() + 15)

    def is_answering(self) -> bool:
        try:
            with self._proxy() as proxy:
                return proxy.supervisor.getState()["statename"] == "RUNNING"  # type: ignore[call-overload,index]
        except (OSError, xmlrpc.client.Error):
            return False

    def states(self) -> list[ProcessState]:
        """All processes. Raises: StackError when the daemon does not answer."""
        try:
            with self._proxy() as proxy:
                rows: Any = proxy.supervisor.getAllProcessInfo()
        except (OSError, xmlrpc.client.Error) as error:
            raise StackError(f"supervisord does not answer: {error}. Its log: {self.log}") from error
        return [ProcessState(row["name"], row["statename"], row["pid"], row["spawnerr"]) for row in rows]

    def start_missing(self) -> list[str]:
        """Start what is not running; returns the names."""
        idle = [row.name for row in self.states() if row.state in ("STOPPED", "EXITED", "FATAL", "UNKNOWN")]
        for name in idle:
            with self._proxy() as proxy:
                try:
                    proxy.supervisor.startProcess(name, False)
                except xmlrpc.client.Fault as fault:
                    raise StackError(f"{name} would not start: {fault.faultString}") from fault
        return idle

    def pid(self) -> int | None:
        """The daemon's process, while it lives: a number that outlived it may be anybody's."""
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return None
        record = locate.read_record()
        return pid if record and is_alive(pid) and is_marked(pid, record.stack_id) else None

    def stop(self, *, deadline_s: float) -> bool:
        """Have the daemon stop its processes and leave. False when there was none, or it took too long.

        It is killed then, and its processes live on with nobody to start them again.
        """
        pid = self._shut_down()
        if pid is None:
            return False
        deadline = time.monotonic() + deadline_s
        while is_alive(pid):
            if time.monotonic() > deadline:
                send(pid, signal.SIGKILL)
                return False
            time.sleep(0.05)
        return True

    def _shut_down(self) -> int | None:
        """Begin the shutdown. Returns the process that is to end, or None where there is none."""
        try:
            with self._proxy() as proxy:
                answer: Any = proxy.supervisor.getPID()
                proxy.supervisor.shutdown()
            return int(answer)
        except (OSError, xmlrpc.client.Error):
            pid = self.pid()
        if pid is not None:
            send(pid, signal.SIGTERM)  # asks for the same
        return pid

    def stop_waits_s(self) -> dict[str, int]:
        """What each part was given for its stop when the daemon was started; empty where none was."""
        written = self._written()
        programs = [title for title in written.sections() if title.startswith(_PROGRAM)]
        return {title.removeprefix(_PROGRAM): written.getint(title, "stopwaitsecs") for title in programs}

    def forget(self) -> None:
        """Remove what the daemon leaves in the run folder."""
        socket = self.socket  # is read from the configuration
        for path in (self._config, self._pid_file, socket):
            path.unlink(missing_ok=True)
        if socket.parent != self._home.run:
            with suppress(OSError):  # whoever cleans temporary folders was here first
                socket.parent.rmdir()

    def log_of(self, part: str) -> Path:
        return self._home.logs / f"{part}.log"

    def _private_socket_dir(self) -> None:
        directory = self.socket.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory != self._home.run and directory.stat().st_uid != os.getuid():
            raise StackError(f"{directory} belongs to another user. Remove it, or use a shorter SAGE_HOME.")

    def _await_answer(self, deadline: float) -> None:
        while not self.is_answering():
            if time.monotonic() > deadline:
                raise StackError(f"supervisord started but does not answer. Its log: {self.log}")
            time.sleep(0.05)

    def _proxy(self) -> xmlrpc.client.ServerProxy:
        from supervisor.xmlrpc import SupervisorTransport

        if not self.socket.exists():
            raise FileNotFoundError(self.socket)
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        # The host is only there to please the parser; the transport goes to the socket.
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)

    def _configuration(self, parts: Sequence[Part]) -> str:
        head = _section(
            "supervisord",
            logfile=self.log,
            logfile_maxbytes="5MB",
            logfile_backups=1,
            pidfile=self._pid_file,
            childlogdir=self._home.logs,
            directory=self._home.root,
            umask="077",
        )
        server = _section("unix_http_server", file=self.socket, chmod="0700")
        interface = _section(
            "rpcinterface:supervisor",
            **{"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        )
        programs = [self._program(part, rank) for rank, part in enumerate(parts)]
        return "\n".join([head, server, interface, *programs])

    def _written(self) -> configparser.RawConfigParser:
        """The configuration that the daemon was started with, not what would be written today."""
        written = configparser.RawConfigParser()
        try:
            written.read(self._config, encoding="utf-8")
        except (OSError, ValueError, configparser.Error):
            return configparser.RawConfigParser()  # torn: as if there were none
        return written

    def _program(self, part: Part, rank: int) -> str:
        return _section(
            f"{_PROGRAM}{part.name}",
            command=_command_line(part.command),
            priority=100 + rank,
            autostart="true",
            autorestart="true",
            # Attempts come 1, 2, 3 seconds apart; then the part stays down and `sage status` says so.
            startsecs=8,
            startretries=3,
            stopsignal="TERM",
            stopwaitsecs=part.stop_wait_s,
            stopasgroup="true",
            killasgroup="true",
            redirect_stderr="true",
            environment=",".join(
                f'{name}="{value}"' for name, value in {PART_MARK: part.name, **part.environment}.items()
            ),
            # This one field is expanded twice.
            stdout_logfile=str(self.log_of(part.name)).replace("%", "%%"),
            stdout_logfile_maxbytes="10MB",
            stdout_logfile_backups=2,
        )


def _section(title: str, /, **fields: object) -> str:
    # supervisord expands %(…)s everywhere, so a lone percent sign has to be doubled.
    lines = [f"{key} = {str(value).replace('%', '%%')}" for key, value in fields.items()]
    return "\n".join([f"[{title}]", *lines, ""])


def _command_line(words: Sequence[str]) -> str:
    # Quoted for supervisord's shlex; ';' would begin a comment there.
    return " ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
