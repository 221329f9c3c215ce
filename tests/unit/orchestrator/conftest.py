"""A fresh orchestrator for each test, on a copy of one migrated database."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sage_orchestrator.database import Database
from tests.fakes.orchestrator_rig import Rig, open_rig


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "sage.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    return path


@pytest.fixture
def home(tmp_path: Path, migrated: Path) -> Path:
    (tmp_path / "state").mkdir()
    shutil.copy(migrated, tmp_path / "state" / "sage.db")
    return tmp_path


@pytest.fixture
def rig(home: Path) -> Iterator[Rig]:
    with open_rig(home) as opened:
        yield opened
