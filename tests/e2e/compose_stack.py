"""The compose stack for a test session: own project, own volume, free ports, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "output" / "compose-logs"
SERVICES = ("redis", "orchestrator", "trainer", "merger", "inference", "gateway", "tensorboard")
PUBLISHED = {
    "orchestrator": "SAGE_ORCHESTRATOR_PORT",
    "gateway": "SAGE_GATEWAY_PORT",
    "inference": "SAGE_CHAT_FINETUNE_PORT",
    "tensorboard": "SAGE_TENSORBOARD_PORT",
}
SETTINGS = {"SAGE_TRAIN_THREADS": "2", "SAGE_LOG_LEVEL": "INFO"}


@dataclass(frozen=True)
class ComposeStack:
    """A running stack, seen from the host."""

    project: str
    env_file: Path
    ports: dict[str, int]
    internal_token: str

    def url(self, service: str) -> str:
        """Where a published service answers, e.g. `http://127.0.0.1:49153`."""
        return f"http://127.0.0.1:{self.ports[service]}"

    @property
    def gateway_url(self) -> str:
        return self.url("gateway")

    @property
    def orchestrator_url(self) -> str:
        return self.url("orchestrator")

    def compose(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ARGUMENTS` on this stack. Raises: CalledProcessError."""
        return subprocess.run(
            ["docker", "compose", "--env-file", str(self.env_file), *arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not _is_ours(name)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )

    def execute(self, service: str, *command: str, timeout_s: float = 120) -> str:
        """Run a command inside a service's container and return what it printed."""
        return self.compose("exec", "-T", service, *command, timeout_s=timeout_s).stdout

    def save_logs(self) -> Path:
        """Write one log file per service and the state of all, and return their folder."""
        folder = LOGS / self.project
        folder.mkdir(parents=True, exist_ok=True)
        for service in SERVICES:
            log = self.compose("logs", "--no-color", "--no-log-prefix", service).stdout
            (folder / f"{service}.log").write_text(log)
        (folder / "ps.txt").write_text(self.compose("ps", "--all").stdout)
        return folder


@pytest.fixture(scope="session")
def compose_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComposeStack]:
    """The stack of compose.yaml, built from this checkout, healthy. Its logs are kept when a test failed."""
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")  # its reaper is one more image to pull
    from testcontainers.compose import DockerCompose

    stack = _plan(tmp_path_factory.mktemp("compose"))
    compose = DockerCompose(
        ROOT, compose_file_name="compose.yaml", env_file=str(stack.env_file), build=True, wait=True
    )
    failed_before = request.session.testsfailed
    try:
        with caller_settings_hidden():
            compose.start()
        yield stack
    except subprocess.CalledProcessError as error:
        said = error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")
        raise RuntimeError(f"the stack did not start; logs: {stack.save_logs()}\n{said[-4000:]}") from error
    finally:
        if request.session.testsfailed > failed_before:
            print(f"\nlogs of the stack: {stack.save_logs()}")
        with caller_settings_hidden():
            compose.stop(down=True)


@contextlib.contextmanager
def caller_settings_hidden() -> Iterator[None]:
    """Compose prefers its caller's environment to the env file: a developer's SAGE_HOME must not get in."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _is_ours(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_ours(name: str) -> bool:
    return name.startswith(("SAGE_", "COMPOSE_"))


def _plan(folder: Path) -> ComposeStack:
    project = f"sage-e2e-{secrets.token_hex(4)}"
    ports = dict(zip(PUBLISHED, free_ports(len(PUBLISHED)), strict=True))
    token = secrets.token_hex(16)
    settings = {
        **SETTINGS,
        "COMPOSE_PROJECT_NAME": project,
        "SAGE_INTERNAL_TOKEN": token,
        **{PUBLISHED[service]: str(port) for service, port in ports.items()},
    }
    env_file = folder / "compose.env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return ComposeStack(project=project, env_file=env_file, ports=ports, internal_token=token)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on right now; all are held open until the last one is found, so they differ."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
