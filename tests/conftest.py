"""What a test may need of the machine. Where missing, it is skipped aloud; in CI only `gpu` may be."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def _no_docker() -> str | None:
    if shutil.which("docker") is None:
        return "no docker command"
    try:
        answer = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "docker info does not answer within 20 s"
    return None if answer.returncode == 0 else "no Docker engine answers `docker info`"


def _no_redis() -> str | None:
    return None if shutil.which("redis-server") else "no redis-server binary (apt install redis-server)"


def _no_postgres() -> str | None:
    found = shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return None if found else "no postgres binary (apt install postgresql)"


def _no_compiler() -> str | None:
    return None if shutil.which("gcc") else "no C compiler (apt install gcc libc6-dev)"


def _no_gpu() -> str | None:
    listing = ["nvidia-smi", "-L"]
    has_one = shutil.which(listing[0]) and subprocess.run(listing, capture_output=True).returncode == 0
    return None if has_one else "no NVIDIA GPU"


def _no_vllm() -> str | None:
    if os.environ.get("SAGE_VLLM_COMMAND") or importlib.util.find_spec("vllm") is not None:
        return None
    return "vLLM is not installed here, and SAGE_VLLM_COMMAND names none"


def _no_base_image() -> str | None:
    if missing := REQUIREMENTS["docker"]():
        return missing
    image = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")
    for command in (["docker", "compose", "version"], ["docker", "image", "inspect", image]):
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0:
            return f"`{' '.join(command)}` fails"
    return None


REQUIREMENTS: dict[str, Callable[[], str | None]] = {
    "docker": functools.cache(_no_docker),
    "redis": functools.cache(_no_redis),
    "postgres": functools.cache(_no_postgres),
    "compiler": functools.cache(_no_compiler),
    "gpu": functools.cache(_no_gpu),
    "vllm": functools.cache(_no_vllm),
    "base_image": functools.cache(_no_base_image),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in REQUIREMENTS.items():
        if item.get_closest_marker(marker) is None:
            continue
        reason = missing()
        if reason is None:
            continue
        if os.environ.get("CI") and marker != "gpu":
            pytest.fail(f"CI must run this test, but: {reason}", pytrace=False)
        pytest.skip(reason)
