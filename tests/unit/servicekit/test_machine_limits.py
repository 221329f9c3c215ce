"""What a process may use: container limits, whole files."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sage_contracts.home import Home, write_whole
from sage_servicekit.machine import oom_kill_count, total_memory_bytes
from sage_servicekit.settings import ServiceSettings, worker_id


def test_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    machine = total_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert total_memory_bytes(tmp_path) == machine
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert total_memory_bytes(tmp_path) == 1 << 30


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/user.slice/a", "user.slice/a/memory.events"),
        ("0::/seen/from/outside", "memory.events"),
        ("5:cpu:/b\n4:memory:/b\n0::/", "memory/b/memory.oom_control"),
        ("4:memory:/docker/1", "memory/memory.oom_control"),
    ],
)
def test_the_kernels_count_of_kills_is_found(tmp_path: Path, membership: str, file: str) -> None:
    (tmp_path / "membership").write_text(membership + "\n")
    assert oom_kill_count(tmp_path, tmp_path / "membership") is None
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("low 0\noom 2\noom_kill 3\n")
    assert oom_kill_count(tmp_path, tmp_path / "membership") == 3


# Blocks that glibc keeps once they are freed, since one behind them is still in use.
_BURST = """
import resource
from pathlib import Path
from sage_servicekit.machine import return_free_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
blocks = [bytes(2000) for _ in range(20_000)]
kept = bytes(2000)
del blocks
before = resident()
return_free_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives free pages back when asked")
def test_free_memory_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-c", _BURST], capture_output=True, text=True, timeout=60)
    assert int(ran.stdout) > 20_000_000, ran.stderr


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    write_whole(target, "one")
    write_whole(target, b"two")
    assert target.read_text() == "two"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    blocked = tmp_path / "folder"
    blocked.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(blocked, "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_settings_read_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path))
    monkeypatch.setenv("SAGE_BROKER_URL", "redis://elsewhere/1")
    monkeypatch.setenv("SAGE_INTERNAL_TOKEN", "s3cret")
    monkeypatch.delenv("SAGE_RUN_DIR", raising=False)
    settings = ServiceSettings()
    assert settings.home == Home(tmp_path)
    assert settings.home.run == tmp_path / "run"
    assert settings.broker_url == "redis://elsewhere/1"
    assert settings.internal_headers == {"X-Sage-Internal-Token": "s3cret"}
    assert "s3cret" not in repr(settings)


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compose files and shell scripts hand on what they do not have as an empty string.
    monkeypatch.setenv("SAGE_INTERNAL_TOKEN", "")
    assert ServiceSettings().internal_token is None


def test_paths_are_stored_relative_to_the_home(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.relative(tmp_path / "finetune_output/code") == "finetune_output/code"
    assert home.resolve("finetune_output/code") == tmp_path / "finetune_output/code"
    assert home.relative(Path("/elsewhere/model")) == "/elsewhere/model"
    assert home.resolve("/elsewhere/model") == Path("/elsewhere/model")


def test_worker_ids_name_host_and_process() -> None:
    assert worker_id("trainer").startswith("trainer@")
    assert worker_id("trainer").endswith(f":{os.getpid()}")
