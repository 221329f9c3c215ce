"""Which Python `deploy/venv.sh` takes: any of the versions that the README promises, by whatever name."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NAMES = ["python3.11", "python3.12", "python3.13", "python3.14", "python3"]


@pytest.mark.parametrize("fitting", NAMES)
def test_the_one_python_that_fits_is_found(tmp_path: Path, fitting: str) -> None:
    tree, programs = tmp_path / "tree", tmp_path / "programs"
    shutil.copytree(ROOT / "deploy", tree / "deploy")
    for name in ("libs", "services", "cli", "pyproject.toml"):
        (tree / name).symlink_to(ROOT / name)
    programs.mkdir()
    for name in NAMES:
        (programs / name).write_text(f"#!/bin/sh\nexit {int(name != fitting)}\n")
    (programs / "uv").write_text(f'#!/bin/sh\nmkdir -p {tree}/.venv\necho "$@" >>{tmp_path}/calls\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    command = [tree / "deploy/venv.sh", "embedded"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == f"venv --quiet --python {programs / fitting} .venv"
