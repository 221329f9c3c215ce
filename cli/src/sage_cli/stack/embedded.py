"""The stack as local processes: no Docker, no Redis."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

from sage_cli import locate
from sage_cli.failures import StackError
from sage_cli.locate import PORT_VARIABLES, StackRecord
from sage_cli.stack.daemon import Daemon
from sage_cli.stack.health import await_healthy
from sage_cli.stack.parts import Part, embedded_parts
from sage_cli.stack.ports import host_of, require_free
from sage_cli.stack.processes import STACK_MARK, end_marked
from sage_cli.stack.token import internal_token
from sage_contracts.home import Home, write_whole

Say = Callable[[str], None]


def up(
    home: Home, parts: Sequence[Part], ports: Mapping[str, int], host: str, *, timeout_s: float, say: Say
) -> StackRecord:
    """Start what is not running and wait until all is healthy. The caller holds the stack's lock.

    Raises: StackError, InvalidRequestError; then nothing that this call started is left running.
    """
    daemon = Daemon(home)
    record = locate.read_record()
    if record and record.kind == "embedded" and daemon.is_answering():
        restarted = daemon.start_missing()
        if restarted:
            say(f"Starting again: {', '.join(restarted)}")
        await_healthy(daemon, parts, home, timeout_s=timeout_s, since=0, on_ready=lambda _: None)
        return record
    if record and record.kind == "embedded":
        if daemon.pid() is not None:
            say("supervisord cannot be reached: starting anew (a running job writes a checkpoint first)")
        # Its processes would hold the ports, as those of a daemon that died without them do.
        down(home, record)
    require_free(host, {part.name: part.port for part in parts if part.port is not None})
    return _start(home, daemon, parts, dict(ports), host, timeout_s=timeout_s, say=say)


def _start(
    home: Home,
    daemon: Daemon,
    parts: Sequence[Part],
    ports: dict[str, int],
    host: str,
    *,
    timeout_s: float,
    say: Say,
) -> StackRecord:
    record = StackRecord("embedded", secrets.token_hex(8), ports, host)
    started_at = time.time()
    try:
        for folder in (home.run, home.logs, home.state, home.finetune_output):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(locate.record_path(), locate.record_text(record))
        daemon.start(parts, environment(home, record))
        await_healthy(
            daemon,
            parts,
            home,
            timeout_s=timeout_s,
            since=started_at - 1,
            on_ready=lambda name: say(f"{name} is ready"),
        )
    except BaseException:
        down(home, record, patience_s=10)
        raise
    return record


def is_running(home: Home, record: StackRecord) -> bool:
    """True while the supervisord of an embedded stack lives, whether or not it can be reached."""
    daemon = Daemon(home)
    return record.kind == "embedded" and (daemon.is_answering() or daemon.pid() is not None)


def environment(home: Home, record: StackRecord) -> dict[str, str]:
    """What every process of the stack is given on top of the caller's environment."""

    def url(part: str) -> str:
        return f"http://{locate.reachable(host_of(part, record.host))}:{record.ports[part]}"

    given = dict(os.environ)
    given.setdefault("SAGE_BROKER_URL", "filesystem://")
    return given | {
        "SAGE_HOME": str(home.root),
        "SAGE_RUN_DIR": str(home.run),
        "SAGE_HOST": "127.0.0.1",  # the gateway has its own
        **{PORT_VARIABLES[part]: str(port) for part, port in record.ports.items()},
        "SAGE_ORCHESTRATOR_URL": url("orchestrator"),
        "SAGE_GATEWAY_URL": url("gateway"),
        "SAGE_INFERENCE_URL": url("inference"),
        "SAGE_TENSORBOARD_URL": url("tensorboard"),
        "SAGE_INTERNAL_TOKEN": internal_token(home),
        "PYTHONUNBUFFERED": "1",
        STACK_MARK: record.stack_id,
        "SPT_NOENV": "1",  # setproctitle writes titles over the environment otherwise, and so over the mark
    }


def down(home: Home, record: StackRecord, *, patience_s: float | None = None) -> None:
    """Stop all of it, orphans included. Raises: StackError naming what would not die.

    Without `patience_s` every part gets what it was promised when the stack was started.
    """
    daemon = Daemon(home)
    if patience_s is None:
        # One part after the other, and the daemon looks once a second.
        patience_s = sum(wait_s + 2 for wait_s in daemon.stop_waits_s().values()) + 10
    has_stopped_them = daemon.stop(deadline_s=patience_s)
    left = end_marked(record.stack_id) if has_stopped_them else _end_processes(home, record)
    if left:
        raise StackError(f"These processes would not end: {', '.join(map(str, left))}. Stop them by hand.")
    forget(home)


def _end_processes(home: Home, record: StackRecord) -> list[int]:
    """End what a daemon left, in the order in which it would have: workers tell how their jobs stand.

    Returns what still lives.
    """
    parts = embedded_parts(record.ports, record.host, home.finetune_output)
    promised_s = Daemon(home).stop_waits_s()
    workers_s = {part.name: promised_s.get(part.name, part.stop_wait_s) for part in parts if part.alive_file}
    return end_marked(record.stack_id, first_s=workers_s)


def forget(home: Home) -> None:
    """Remove the traces of a stack that no longer runs."""
    Daemon(home).forget()
    for pattern in ("*.alive", "*.pid"):
        for path in home.run.glob(pattern):
            path.unlink(missing_ok=True)
    locate.record_path().unlink(missing_ok=True)
