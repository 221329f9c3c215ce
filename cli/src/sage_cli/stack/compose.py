"""The stack in containers, through the `docker compose` command."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from sage_cli import locate
from sage_cli.failures import StackError
from sage_cli.locate import PORT_VARIABLES, StackRecord
from sage_cli.stack.token import internal_token
from sage_contracts.errors import ConflictError, InvalidRequestError
from sage_contracts.home import Home, write_whole

# The images' own user and group; root on the host is not root in the containers.
_IMAGE_UID = 10001
_BUILD_AND_START_S = 3600.0


def docker_problem() -> str | None:
    """Why containers cannot be used here, or None when they can."""
    if shutil.which("docker") is None:
        return "Docker is not installed (no `docker` command on the PATH)."
    if _run(["docker", "info"], timeout_s=15).returncode != 0:
        return "Docker is installed but its engine does not answer (`docker info` fails)."
    if _run(["docker", "compose", "version"], timeout_s=15).returncode != 0:
        return "Docker has no Compose v2 (`docker compose version` fails)."
    return None


def find_files() -> list[Path]:
    """The compose files: SAGE_COMPOSE_FILE (separated as in PATH), else the source tree's, else none.

    Raises: InvalidRequestError for a file that is not there.
    """
    if files := locate.given_compose_files():
        for file in files:
            if not file.is_file():
                raise InvalidRequestError(f"SAGE_COMPOSE_FILE names {file}, which is no file.")
        return files
    folder = locate.source_tree()
    if folder is None:
        return []
    gpu = folder / "deploy" / "compose.gpu.yaml"
    return [folder / "compose.yaml", *([gpu] if gpu.is_file() and _has_nvidia_runtime() else [])]


def container_ids(*, only_running: bool = False) -> list[str]:
    """Containers of our project."""
    which = ["--quiet"] if only_running else ["--quiet", "--all"]
    mark = f"label=com.docker.compose.project={project()}"
    listing = _run(["docker", "ps", *which, "--filter", mark], timeout_s=15)
    return listing.stdout.split() if listing.returncode == 0 else []


def project() -> str:
    """The name that compose.yaml takes too."""
    return locate.setting("COMPOSE_PROJECT_NAME") or "sage"


def require_no_volume(home: Home) -> None:
    """Raises: ConflictError: the home is a volume's, as after `docker compose up`, and this one is empty."""
    volume = f"{project()}_sage-home"
    if _run(["docker", "volume", "inspect", volume], timeout_s=15).returncode == 0:
        raise ConflictError(
            f"`docker compose up` has kept models and jobs in the volume {volume}, and `sage up` would start"
            f" without them, in {home.root}. Go on with them: `docker compose up -d`, with the `-f` files"
            f" of before. Or use the folder: `SAGE_HOME={home.root} sage up`."
        )


def up(
    home: Home, files: Sequence[Path], ports: Mapping[str, int], *, timeout_s: float, is_building: bool
) -> StackRecord:
    """Build what is missing, start, wait until healthy. Raises: StackError; nothing new is then left."""
    was_there = bool(container_ids())
    _prepare_home(home)
    record = StackRecord(
        "compose",
        secrets.token_hex(8),
        dict(ports),
        locate.published_host(),
        [str(file) for file in files],
    )
    write_whole(locate.record_path(), locate.record_text(record))
    command = [*_compose(record), "up", "--detach", "--wait", "--wait-timeout", f"{timeout_s:.0f}"]
    if is_building:
        command.append("--build")
    try:
        code = _show(command, _environment(home, record))
        if code != 0:
            raise StackError(_why(record, home))
    except BaseException:
        if not was_there:
            down(home, record, remove_volumes=False)
        raise
    return record


def down(home: Home, record: StackRecord | None, *, remove_volumes: bool) -> None:
    """Remove containers and networks; volumes only when asked. Raises: StackError."""
    command = [*_compose(record), "down", "--remove-orphans"]
    if remove_volumes:
        command.append("--volumes")
    code = _show(command, _environment(home, record) if record else dict(os.environ))
    if code != 0 or container_ids():
        raise StackError(
            f"`{' '.join(command)}` did not remove every container. `docker ps -a` shows what is left."
        )
    locate.record_path().unlink(missing_ok=True)


def _compose(record: StackRecord | None) -> list[str]:
    files = [file for file in record.compose_files if Path(file).is_file()] if record else []
    # Without files Compose goes by the labels of the containers, which is enough to remove them.
    return ["docker", "compose", "-p", project(), *[word for file in files for word in ("-f", file)]]


def _environment(home: Home, record: StackRecord) -> dict[str, str]:
    uid, gid = _user()
    return dict(os.environ) | {
        "SAGE_HOME": str(home.root),
        "SAGE_UID": str(uid),
        "SAGE_GID": str(gid),
        "SAGE_BIND": record.host,
        "SAGE_INTERNAL_TOKEN": internal_token(home),
        **{PORT_VARIABLES[part]: str(port) for part, port in record.ports.items()},
    }


def _user() -> tuple[int, int]:
    """Whose processes the containers run, by number. Raises: InvalidRequestError."""
    own = (os.getuid(), os.getgid()) if os.getuid() != 0 else (_IMAGE_UID, _IMAGE_UID)
    names = ("SAGE_UID", "SAGE_GID")
    texts = [locate.setting(name) or str(number) for name, number in zip(names, own, strict=True)]
    for name, text in zip(names, texts, strict=True):
        if not text.isdecimal():
            raise InvalidRequestError(f"{name}={text!r} is no number of a user or group.")
    return int(texts[0]), int(texts[1])


def _prepare_home(home: Home) -> None:
    for folder in (home.files, home.base_models, home.finetune_output, home.state, home.run, home.logs):
        folder.mkdir(parents=True, exist_ok=True)
    internal_token(home)
    if os.getuid() == 0:
        # What an embedded stack of root wrote has to be writable for the containers' user as well.
        uid, gid = _user()
        for parent, _, names in os.walk(home.root):
            for path in [Path(parent), *[Path(parent) / name for name in names]]:
                if path.lstat().st_uid != uid:
                    os.chown(path, uid, gid, follow_symlinks=False)


def _why(record: StackRecord, home: Home) -> str:
    listing = _run(
        [*_compose(record), "ps", "--all", "--format", "{{.Service}}: {{.Status}}"],
        timeout_s=30,
        environment=_environment(home, record),
    )
    states = [f"  {line}" for line in listing.stdout.splitlines()]
    advice = f"`docker compose -p {project()} logs` tells more while the containers are there."
    return "\n".join(["`docker compose up` failed.", *states, advice])


def _has_nvidia_runtime() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return "nvidia" in _run(["docker", "info", "--format", "{{json .Runtimes}}"], timeout_s=15).stdout


def _run(
    command: list[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=dict(environment) if environment else None,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _show(command: list[str], environment: Mapping[str, str]) -> int:
    """Run with Compose's own progress on the terminal (standard error, as it does)."""
    try:
        return subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, timeout=_BUILD_AND_START_S
        ).returncode
    except subprocess.TimeoutExpired:
        raise StackError(f"`{' '.join(command)}` took longer than an hour.") from None
