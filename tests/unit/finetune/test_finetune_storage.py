"""Folders and files appear whole or not at all."""

from __future__ import annotations

import errno
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sage.tools.finetune.storage import (
    exclusive_lock,
    folder_written_whole,
    require_free_space,
    storage_errors,
    temporary_folder,
    write_json,
)
from sage_contracts.errors import NotFoundError, ServiceUnavailableError, StorageFullError


def test_a_folder_replaces_the_older_one_in_one_go(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with folder_written_whole(target) as unfinished:
            (unfinished / "weights").write_text(text)
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").stat().st_mode & 0o777 == 0o644


def test_whoever_looks_while_a_folder_is_replaced_finds_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with folder_written_whole(target) as unfinished:
        (unfinished / "weights").write_text("first")
    ended, missed = threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            if not (target / "weights").exists():
                missed.append(1)

    with ThreadPoolExecutor(1) as beside:
        looking = beside.submit(look)
        try:
            for number in range(300):
                with folder_written_whole(target) as unfinished:
                    (unfinished / "weights").write_text(str(number))
        finally:
            ended.set()
        looking.result(60)
    assert not missed


def test_a_failure_leaves_the_older_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with folder_written_whole(target) as unfinished:
        (unfinished / "weights").write_text("old")
    with pytest.raises(RuntimeError), folder_written_whole(target) as unfinished:
        (unfinished / "weights").write_text("half")
        raise RuntimeError
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match="disk is full"), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageFullError, match="set SAGE_HOME"):
        require_free_space(tmp_path, 1 << 60, "the base model")
    with pytest.raises(PermissionError), storage_errors(tmp_path):
        raise PermissionError


def test_a_full_folder_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StorageFullError, match="set TMPDIR") as caught, temporary_folder("x-") as folder:
        assert folder.parent == tmp_path
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path) in caught.value.message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFoundError), temporary_folder("x-"):
        raise NotFoundError("said elsewhere: No space left on device")


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "meta.json", {"wert": "ä"})
    assert (tmp_path / "deep" / "meta.json").read_text(encoding="utf-8") == '{\n  "wert": "ä"\n}\n'
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["meta.json"]


def test_the_lock_is_held_by_one_and_waited_for_no_longer_than_told(tmp_path: Path) -> None:
    path = tmp_path / "base.lock"
    said: list[str] = []
    with exclusive_lock(path, 1, said.append):
        with (
            pytest.raises(ServiceUnavailableError, match="Another process"),
            exclusive_lock(path, 0.0, said.append),
        ):
            pass
        waiting = threading.Event()
        entered = threading.Event()

        def second() -> None:
            with exclusive_lock(path, 30, lambda message: waiting.set()):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        assert not entered.is_set()
    assert entered.wait(10)
    thread.join(10)
    assert said == ["Waiting for another process that prepares base"]
