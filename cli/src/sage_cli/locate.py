"""Where the stack is: its ports and URLs, from the environment, else from what `sage up` wrote down.

Nothing heavy is imported, so that it can be asked first.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from sage_contracts.home import Home

DEFAULT_PORTS = {"gateway": 8080, "orchestrator": 8081, "inference": 8000, "tensorboard": 6006}
PORT_VARIABLES = {
    "gateway": "SAGE_GATEWAY_PORT",
    "orchestrator": "SAGE_ORCHESTRATOR_PORT",
    "inference": "SAGE_CHAT_FINETUNE_PORT",
    "tensorboard": "SAGE_TENSORBOARD_PORT",
}
_URL_VARIABLES = ("SAGE_ORCHESTRATOR_URL", "SAGE_GATEWAY_URL")


class BadSettingError(ValueError):
    """An environment variable that cannot be used; the message names it."""


@dataclass(frozen=True)
class StackRecord:
    """What `sage up` wrote down, so that other terminals find the stack and `sage down` all of it."""

    kind: Literal["embedded", "compose"]
    stack_id: str
    """Marks every process of the stack: the value of SAGE_STACK_ID in its environment."""
    ports: dict[str, int]
    host: str = "127.0.0.1"
    compose_files: list[str] = field(default_factory=list)

    @property
    def gateway_url(self) -> str:
        return f"http://{reachable(self.host)}:{self.ports['gateway']}"


def source_tree() -> Path | None:
    """The folder of our compose.yaml: here or above, else where this code lies."""
    for folder in [Path.cwd(), *Path.cwd().parents, Path(__file__).parents[3]]:
        # Many projects have a compose.yaml; ours starts the orchestrator.
        if (folder / "compose.yaml").is_file() and (folder / "services" / "orchestrator").is_dir():
            return folder
    return None


def given_compose_files() -> list[Path]:
    """SAGE_COMPOSE_FILE, separated as in PATH."""
    texts = os.environ.get("SAGE_COMPOSE_FILE", "").split(os.pathsep)
    return [Path(text).expanduser().absolute() for text in texts if text]


def setting(name: str) -> str | None:
    """An environment variable, else what stands in `.env` beside compose.yaml, where Compose reads it too."""
    return os.environ.get(name) or _dotenv(name)[0]


def _dotenv(name: str) -> tuple[str | None, Path]:
    """(what `.env` says, the folder that relative paths start from)."""
    files = given_compose_files()
    folder = files[0].parent if files else source_tree()
    if folder is None or not (folder / ".env").is_file():
        return None, Path()
    from dotenv import dotenv_values

    return dotenv_values(folder / ".env").get(name) or None, folder


def given_home() -> Path | None:
    """SAGE_HOME as a folder; None where nobody names one."""
    if given := os.environ.get("SAGE_HOME"):
        return Path(given).expanduser().absolute()
    written, folder = _dotenv("SAGE_HOME")
    # To Compose, a name without any of these is a volume's.
    return (folder / Path(written).expanduser()).absolute() if written and written[0] in "/.~" else None


def home_root() -> Path:
    """SAGE_HOME, or ~/.sage."""
    return given_home() or Path("~/.sage").expanduser().absolute()


def run_dir() -> Path:
    """SAGE_RUN_DIR, or `run` in the home."""
    return Home(home_root()).run


def record_path() -> Path:
    return run_dir() / "stack.json"


def read_record() -> StackRecord | None:
    """The running stack's record, or None where none was written or it is unreadable."""
    try:
        content: dict[str, Any] = json.loads(record_path().read_text())
        return StackRecord(**content)
    except (OSError, ValueError, TypeError):
        return None


def record_text(record: StackRecord) -> str:
    return json.dumps(asdict(record), indent=2) + "\n"


def port_from_env(part: str) -> int | None:
    """The port a variable asks for. Raises: BadSettingError."""
    return _port(part, os.environ.get(PORT_VARIABLES[part]))


def _port(part: str, text: str | None) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise BadSettingError(f"{PORT_VARIABLES[part]}={text!r} is no port: give a number from 1 to 65535.")
    return int(text)


def wanted_ports() -> dict[str, int]:
    """The ports a new stack is to listen on. Raises: BadSettingError."""
    return {part: _wanted_port(part) for part in DEFAULT_PORTS}


def _wanted_port(part: str) -> int:
    return _port(part, setting(PORT_VARIABLES[part])) or DEFAULT_PORTS[part]


def bind_host() -> str:
    return os.environ.get("SAGE_HOST") or "127.0.0.1"


def published_host() -> str:
    """Where the gateway of containers is to answer."""
    return setting("SAGE_BIND") or "127.0.0.1"


def reachable(host: str) -> str:
    """The address to call a server that listens on `host`."""
    # Listening on every interface is no address to call.
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"[{host}]" if ":" in host else host


def explicit_gateway_url() -> str | None:
    """The gateway a person pointed at; then no stack is ever started on their behalf."""
    return os.environ.get("SAGE_GATEWAY_URL", "").rstrip("/") or None


def gateway_url() -> str:
    """SAGE_GATEWAY_URL, else the port asked for, else the recorded stack, else the default.

    Raises: BadSettingError.
    """
    if url := explicit_gateway_url():
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise BadSettingError(f"SAGE_GATEWAY_URL={url!r} is no URL: write it as http://HOST:PORT.")
        return url.removesuffix("/v1")
    if port := port_from_env("gateway"):
        return f"http://{reachable(bind_host())}:{port}"
    if record := read_record():
        return record.gateway_url
    return f"http://{reachable(bind_host())}:{_wanted_port('gateway')}"


def orchestrator_url() -> str:
    """Where jobs and models are asked for: SAGE_ORCHESTRATOR_URL, else the gateway, which relays."""
    return given_urls().get("SAGE_ORCHESTRATOR_URL") or gateway_url()


def given_urls() -> dict[str, str]:
    """The addresses that variables point to, by their names."""
    given = {name: os.environ.get(name, "").rstrip("/").removesuffix("/v1") for name in _URL_VARIABLES}
    return {name: url for name, url in given.items() if url}


def urls_elsewhere(record: StackRecord) -> dict[str, str]:
    """Of those, what leads to another stack than this one."""
    own = (record.gateway_url, f"http://127.0.0.1:{record.ports['orchestrator']}")
    by_number = {name: url.replace("//localhost:", "//127.0.0.1:") for name, url in given_urls().items()}
    return {name: url for name, url in by_number.items() if url not in own}


def variable_of(url: str) -> str | None:
    """The variable that points to this address; None where none does."""
    return next((name for name, given in given_urls().items() if given == url), None)


def api_key() -> str | None:
    """The key sent to the gateway: SAGE_API_KEY, else the first of the gateway's own SAGE_API_KEYS."""
    keys = os.environ.get("SAGE_API_KEY") or os.environ.get("SAGE_API_KEYS", "")
    return keys.split(",")[0].strip() or None
