"""Kernels in C are compiled once, whole or not at all; without a compiler runs go on and say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sage.tools.finetune.native.build import LEVELS, CompilerError, compile_into, file_name, main


@pytest.mark.compiler
def test_a_library_for_every_level_and_nothing_beside_them(tmp_path: Path) -> None:
    main(tmp_path / "built")
    assert sorted(path.name for path in (tmp_path / "built").iterdir()) == sorted(map(file_name, LEVELS))


@pytest.mark.compiler
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text('#!/bin/sh\necho "no room left" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", f"{broken} -pipe")
    with pytest.raises(CompilerError, match=r"broken-cc failed: no room left"):
        compile_into(tmp_path / "kept", next(iter(LEVELS)))
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.compiler
def test_without_a_compiler_it_is_said_and_who_does_without_hears_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CC": ""}
    assert "no C compiler is installed" in _told(environment)
    assert _told({**environment, "SAGE_CPU_KERNELS": "0"}) == ""
    assert _told({**environment, "ATEN_CPU_CAPABILITY": "default"}) == "", "they are for newer chips alone"


def _told(environment: dict[str, str]) -> str:
    ask = "from sage.tools.finetune.step_kernels import why_slower; print(why_slower(), end='')"
    return subprocess.run(
        [sys.executable, "-c", ask], env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout
