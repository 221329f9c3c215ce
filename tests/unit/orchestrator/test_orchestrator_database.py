"""The schema and its upgrade, and what the process loads."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from sage_contracts.errors import ConflictError, ServiceUnavailableError
from sage_orchestrator.database import HEAD, Database
from sage_orchestrator.rows import Base


def test_the_migrations_make_exactly_the_rows(migrated: Path) -> None:
    database = Database(f"sqlite:///{migrated}")
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    database.close()


def test_head_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(
        str(Path(sys.modules[Database.__module__].__file__ or "").parent / "migrations")
    )
    assert scripts.get_current_head() == HEAD


def test_several_starters_upgrade_once(tmp_path: Path) -> None:
    databases = [Database(f"sqlite:///{tmp_path / 'state' / 'sage.db'}") for _ in range(3)]
    problems: list[Exception] = []

    def start(database: Database) -> None:
        try:
            database.upgrade()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=start, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    with databases[0].read() as session:
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == [HEAD]
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
    for database in databases:
        database.close()


def test_a_newer_database_is_refused_with_a_way_out(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'sage.db'}")
    database.upgrade()
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConflictError, match="newer version"):
        database.upgrade()
    database.close()


def test_a_database_that_does_not_answer_is_said_so(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}")
    with pytest.raises(ServiceUnavailableError, match="does not answer"), database.read() as session:
        session.execute(text("SELECT 1"))
    database.close()


def test_neither_torch_nor_celery_nor_alembic_is_loaded_by_a_running_orchestrator(home: Path) -> None:
    script = """
import sys, pathlib
from tests.fakes.orchestrator_rig import open_rig, rows
with open_rig(pathlib.Path(sys.argv[1])) as rig:
    rig.create_job(training_file=rig.upload(rows()), suffix="mine", model="auto")
    rig.train()
    rig.get("/v1/models")
heavy = {"torch", "transformers", "peft", "vllm", "numpy", "celery", "alembic", "openai"}
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(home)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")
