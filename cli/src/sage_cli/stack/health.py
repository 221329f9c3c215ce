"""Waiting until the parts of a stack are healthy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sage_cli.failures import StackError
from sage_cli.stack.daemon import Daemon
from sage_cli.stack.parts import Part
from sage_contracts.errors import InvalidRequestError
from sage_contracts.home import Home
from sage_contracts.status import WRONG_SETTING

_ALIVE_MAX_AGE_S = 15.0
_POLL_S = 0.2


def is_healthy(part: Part, home: Home, *, since: float = 0.0) -> bool:
    """One look: the health route answers, or the sign of life is fresh, and from after `since`.

    A worker gives that sign once the orchestrator has heard it, so that `sage status` knows it too.
    """
    import httpx

    if part.alive_file:
        try:
            touched = (home.run / part.alive_file).stat().st_mtime
        except OSError:
            return False
        return touched >= since and time.time() - touched < _ALIVE_MAX_AGE_S
    try:
        response = httpx.get(f"http://{part.host}:{part.port}{part.health_path}", timeout=2, trust_env=False)
    except httpx.HTTPError:
        return False
    return response.is_success


def await_healthy(
    daemon: Daemon,
    parts: Sequence[Part],
    home: Home,
    *,
    timeout_s: float,
    since: float,
    on_ready: Callable[[str], None],
) -> None:
    """Wait for every awaited part.

    Raises: StackError naming the first that gave up, with its log's end; InvalidRequestError: by a setting.
    """
    deadline = time.monotonic() + timeout_s
    waiting = [part for part in parts if part.is_awaited]
    while True:
        ready = [part for part in waiting if is_healthy(part, home, since=since)]
        for part in ready:
            on_ready(part.name)
        waiting = [part for part in waiting if part not in ready]
        if not waiting:
            return
        states = {row.name: row for row in daemon.states()}
        for part in waiting:
            state = row.state if (row := states.get(part.name)) else ""
            log = daemon.log_of(part.name)
            # No further attempt will read other variables.
            if state in ("BACKOFF", "FATAL") and (problem := wrong_setting(log)):
                raise InvalidRequestError(f"{part.name} does not start. {problem}")
            if state == "FATAL":
                raise StackError(f"{part.name} does not start.\n{log_end(log)}")
        if time.monotonic() > deadline:
            names = ", ".join(part.name for part in waiting)
            raise StackError(
                f"Not healthy after {timeout_s:.0f} s: {names}.\n{log_end(daemon.log_of(waiting[0].name))}"
            )
        time.sleep(_POLL_S)


def wrong_setting(path: Path) -> str | None:
    """The last line of a log where it says that a variable cannot be used."""
    last = _last_lines(path, 1)
    return last[0] if last and last[0].startswith(WRONG_SETTING) else None


def log_end(path: Path, lines: int = 12) -> str:
    """The last lines of a log, under its name."""
    last = _last_lines(path, lines)
    if last is None:
        return f"It wrote no log ({path})."
    return "\n".join([f"The end of {path}:", *(f"  {line}" for line in last)])


def _last_lines(path: Path, count: int) -> list[str] | None:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            return stream.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return None
