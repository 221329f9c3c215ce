"""sage up and sage down: which kind of stack, and what people are told."""

from __future__ import annotations

import os
import shutil
import time
from typing import Literal

from sage_cli import locate
from sage_cli.locate import StackRecord
from sage_cli.render import error_console, line
from sage_cli.stack import compose, embedded
from sage_cli.stack.daemon import Daemon
from sage_cli.stack.gateway import find_own_gateway
from sage_cli.stack.lock import stack_lock
from sage_cli.stack.parts import embedded_parts, missing_parts, stop_grace_from_env
from sage_cli.stack.ports import host_of, require_free
from sage_contracts.errors import ConflictError, InvalidRequestError, StorageFullError
from sage_contracts.home import Home

Kind = Literal["embedded", "compose"]

EMBEDDED_TIMEOUT_S = 120.0
COMPOSE_TIMEOUT_S = 300.0
_LOCK_TIMEOUT_S = 600.0
_MIN_FREE_BYTES = 256 * 1024 * 1024


def up_command(*, embedded: bool, docker: bool, timeout_s: float | None, is_building: bool = False) -> None:
    if embedded and docker:
        raise InvalidRequestError("--embedded and --docker exclude each other: give one of them.")
    wanted: Kind | None = "embedded" if embedded else "compose" if docker else None
    record = up(wanted, timeout_s=timeout_s, is_building=is_building)
    say(f"The stack is up ({'local processes' if record.kind == 'embedded' else 'containers'}).", "ok")
    for text in (
        f"  gateway      {record.gateway_url}   (OpenAI's API: {record.gateway_url}/v1)",
        f"  TensorBoard  http://{host_of('tensorboard', record.host)}:{record.ports['tensorboard']}",
        f"  home         {locate.home_root()}",
        "Next: sage finetune quickstart code",
    ):
        error_console().print(text, soft_wrap=True)
    for name, url in locate.urls_elsewhere(record).items():
        say(f"But {name} points to {url}: unset it, or other commands go there.", "warn")


def up(wanted: Kind | None, *, timeout_s: float | None = None, is_building: bool = False) -> StackRecord:
    """Start a stack, or join the one that runs. Raises: StackError, InvalidRequestError, ConflictError."""
    home = Home(locate.home_root())
    require_home(home)
    if shortage := _shortage(home):
        say(shortage, "warn")
    with stack_lock(home.run / "stack.lock", timeout_s=_LOCK_TIMEOUT_S, say=say):
        kind, why = _choose(wanted, home)
        if why:
            say(why)
        if kind == "compose":
            return _up_compose(home, timeout_s or COMPOSE_TIMEOUT_S, is_building=is_building)
        return _up_embedded(home, timeout_s or EMBEDDED_TIMEOUT_S)


def ensure_stack() -> None:
    """Make sure that a gateway answers, starting the embedded stack where nothing runs. Says so.

    Raises: ConflictError: the one that answers is another home's.
    """
    if locate.explicit_gateway_url() or find_own_gateway() or os.environ.get("SAGE_AUTOSTART") == "0":
        return
    record = locate.read_record()
    if record and record.kind == "compose" and not compose.docker_problem():
        say("The containers do not answer: starting them again")
        up("compose")
    else:
        say("Nothing runs yet: starting the embedded stack (no Docker needed)")
        up("embedded")
    say(f"The stack is up at {locate.gateway_url()}; `sage down` stops it", "ok")


def _containers_run() -> bool:
    return not compose.docker_problem() and bool(compose.container_ids(only_running=True))


def down_command(*, remove_volumes: bool) -> None:
    home = Home(locate.home_root())
    if not home.root.is_dir() and compose.docker_problem():
        say("Nothing was running.", "ok")
        return
    with stack_lock(home.run / "stack.lock", timeout_s=_LOCK_TIMEOUT_S, say=say):
        has_record = locate.read_record() is not None
        stopped = _down_all(home, remove_volumes=remove_volumes)
    if not stopped:
        say("Nothing was running.", "ok")
        return
    # `docker compose up` by hand keeps them in a volume, unless SAGE_HOME was set for it too.
    if has_record or locate.given_home():
        fate = f"kept in {home.root}"
    else:
        fate = "deleted with the data volume" if remove_volumes else "kept in the data volume"
    say(f"Stopped: {stopped}. Models and jobs are {fate}.", "ok")


def _down_all(home: Home, *, remove_volumes: bool) -> str | None:
    """Stop the recorded stack; without a record, what `docker compose up` started by hand."""
    record = locate.read_record()
    if record and record.kind == "embedded":
        if Daemon(home).pid() is not None:
            say("Stopping the local processes (a running job writes a checkpoint first)")
        embedded.down(home, record)
        return "local processes"
    if (record or compose.find_files()) and compose.container_ids():
        if problem := compose.docker_problem():
            raise InvalidRequestError(f"Containers of the stack were not stopped: {problem}")
        compose.down(home, record, remove_volumes=remove_volumes)
        return "containers"
    locate.record_path().unlink(missing_ok=True)
    return None


def _choose(wanted: Kind | None, home: Home) -> tuple[Kind, str]:
    """The kind to start, and why, for people."""
    record = locate.read_record()
    running: Kind | None = None
    if record and embedded.is_running(home, record):
        running = "embedded"
    elif record and record.kind == "compose" and _containers_run():
        running = "compose"
    if running and wanted and running != wanted:
        other = "as local processes" if running == "embedded" else "in containers"
        raise ConflictError(f"The stack already runs {other}. Stop it first: `sage down`.")
    if running:
        return running, "Already running: checking that every part is healthy"
    if wanted == "embedded":
        return "embedded", ""
    problem = compose.docker_problem()
    files = compose.find_files()
    if wanted == "compose":
        if problem:
            raise InvalidRequestError(
                f"{problem} Install and start Docker Engine, or run without it: `sage up --embedded`."
            )
        if not files:
            raise InvalidRequestError(
                "No compose.yaml of SAGE was found here or above. Go to the source tree, or name it with"
                " SAGE_COMPOSE_FILE."
            )
        return "compose", ""
    if not problem and files:
        return "compose", f"Docker answers: starting containers from {files[0]} (--embedded does without)"
    reason = problem or "No compose.yaml of SAGE was found."
    return "embedded", f"{reason} Starting local processes instead"


def _up_embedded(home: Home, timeout_s: float) -> StackRecord:
    if missing := missing_parts():
        raise InvalidRequestError(
            f"The embedded stack is not installed beside this command (missing: {', '.join(missing)})."
            " Install it with `make install`, use containers with `sage up --docker`,"
            " or set SAGE_GATEWAY_URL to a stack that runs elsewhere."
        )
    record = locate.read_record()
    ports, host = locate.wanted_ports(), locate.bind_host()
    if record and embedded.is_running(home, record):
        ports, host = record.ports, record.host
    started = time.monotonic()
    parts = embedded_parts(ports, host, home.finetune_output, stop_grace_s=stop_grace_from_env())
    record = embedded.up(home, parts, ports, host, timeout_s=timeout_s, say=lambda text: say(text, "ok"))
    say(f"Healthy after {time.monotonic() - started:.0f} s")
    return record


def _up_compose(home: Home, timeout_s: float, *, is_building: bool) -> StackRecord:
    ports = locate.wanted_ports()
    record = locate.read_record()
    if not locate.given_home() and not (record and record.kind == "compose"):
        compose.require_no_volume(home)
    if not compose.container_ids():
        require_free(locate.published_host(), ports)
    return compose.up(home, compose.find_files(), ports, timeout_s=timeout_s, is_building=is_building)


def require_home(home: Home) -> None:
    """Raises: InvalidRequestError, StorageFullError: the home cannot be used, with the reason.

    One that has been used is not refused for lack of space, which is freed through the stack: jobs, files and
    models are deleted there.
    """
    for folder, variable in ((home.root, "SAGE_HOME"), (home.run, "SAGE_RUN_DIR")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequestError(
                f"{folder} cannot be used: {error.strerror}. Set {variable} to a folder that you may write"
                " to."
            ) from error
    if not os.access(home.root, os.W_OK):
        raise InvalidRequestError(
            f"{home.root} is not writable. Set SAGE_HOME to a folder that you may write to."
        )
    if not home.state.exists() and (shortage := _shortage(home)):
        raise StorageFullError(shortage)


def _shortage(home: Home) -> str | None:
    """What to do about a disk that is too small; None when it is not."""
    free = shutil.disk_usage(home.root).free
    if free >= _MIN_FREE_BYTES:
        return None
    return (
        f"Only {free // 2**20} MiB are free at {home.root}; a stack needs {_MIN_FREE_BYTES // 2**20} MiB"
        " and a base model 0.3 to 3 GB besides. Free some space, or point SAGE_HOME at a larger disk."
    )


def say(text: str, state: str = "wait") -> None:
    """One line of progress, on standard error: standard output is for answers."""
    line(error_console(), state, text)
