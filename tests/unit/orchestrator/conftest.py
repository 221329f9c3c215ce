"""The orchestrator on an empty state for each test: one shared app, or a home for a test's own settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.orchestrator_rig import Rig, open_rig

from sage_orchestrator.database import Database


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "sage.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    return path


@pytest.fixture
def home(tmp_path: Path, migrated: Path) -> Path:
    """A home whose database is migrated already."""
    (tmp_path / "state").mkdir()
    shutil.copy(migrated, tmp_path / "state" / "sage.db")
    return tmp_path


@pytest.fixture(scope="session")
def shared_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with open_rig(tmp_path_factory.mktemp("orchestrator")) as opened:
        yield opened


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    shared_rig.reset()
    return shared_rig
