"""Settings that every process reads from the environment (prefix SAGE_)."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TypeVar

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from sage_contracts.home import Home
from sage_contracts.status import WRONG_SETTING
from sage_servicekit.names import is_loopback


class ServiceSettings(BaseSettings):
    """The common part; a service subclasses it in its own settings.py and adds its fields."""

    model_config = SettingsConfigDict(
        env_prefix="SAGE_", env_ignore_empty=True, extra="ignore", populate_by_name=True
    )

    home_dir: Path = Field(
        default_factory=lambda: Path("~/.sage"), validation_alias=AliasChoices("SAGE_HOME", "home_dir")
    )
    host: str = "127.0.0.1"
    published_on: str = ""
    """The machine's address that leads to a container, which itself listens on all its own; empty: `host`."""
    log_level: str = "INFO"
    orchestrator_url: str = "http://127.0.0.1:8081"
    gateway_url: str = "http://127.0.0.1:8080"
    inference_url: str = "http://127.0.0.1:8000"
    broker_url: str = "filesystem://"
    stack_id: str = ""
    """Of the embedded stack that this process belongs to, random at each start; set by `sage up`."""
    internal_token: SecretStr | None = None
    """Shared by the services for /internal/*; None leaves that open (embedded, on loopback)."""
    max_body_bytes: int = 32 * 1024 * 1024
    """Of a request. Uploads are streamed, and limited by the orchestrator."""
    client_silence_s: float = Field(60.0, gt=0)
    """How long a client may say nothing while its request is not whole."""

    @field_validator("home_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        levels = logging.getLevelNamesMapping()
        if value.upper() not in levels:
            raise ValueError(f"Input should be one of {', '.join(levels)}")
        return value

    @property
    def home(self) -> Home:
        return Home(self.home_dir)

    @property
    def is_local(self) -> bool:
        """Whether the service is for its own machine alone, by the address that leads to it."""
        return is_loopback(self.published_on or self.host)

    @property
    def internal_headers(self) -> dict[str, str]:
        """What a service sends to be let into /internal/*."""
        from sage_contracts.workers import INTERNAL_TOKEN_HEADER

        return {INTERNAL_TOKEN_HEADER: self.internal_token.get_secret_value()} if self.internal_token else {}


class WorkerSettings(ServiceSettings):
    """What trainer and merger have in common beyond that."""

    report_interval_s: float = Field(default=2.0, gt=0)
    claim_patience_s: float = Field(default=60.0, ge=0)
    """How long to ask again for work whose device is busy before leaving it in the queue."""
    finish_patience_s: float = Field(default=600.0, ge=0)
    """How long to try to tell a silent orchestrator how the attempt ended."""


Settings = TypeVar("Settings", bound=ServiceSettings)


def from_env(cls: type[Settings]) -> Settings:
    """The settings of this process, which ends with one line and code 2 where a variable cannot be used."""
    try:
        return cls()
    except ValidationError as error:
        problems = "; ".join(
            f"{_variable(cls, str(problem['loc'][0]))}={problem['input']!r:.60}:"
            f" {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
    except SettingsError as error:
        problems = str(error)  # of a list that is no JSON; names the field
    print(f"{WRONG_SETTING}{problems}.", file=sys.stderr)
    sys.exit(2)


def _variable(cls: type[ServiceSettings], field: str) -> str:
    # What has a name of its own is told by that one.
    return field if field.isupper() else f"{cls.model_config['env_prefix']}{field.upper()}"


def worker_id(kind: str) -> str:
    """Names this process among its kind: host and pid, so that two on one machine differ."""
    import socket

    return f"{kind}@{socket.gethostname()}:{os.getpid()}"
