"""The schema and its upgrade, and what the process loads."""

from __future__ import annotations

import os
import queue
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from httpx import Response
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from tests.fakes.orchestrator_rig import open_rig

from sage_contracts.errors import ConflictError, SageError, ServiceUnavailableError
from sage_orchestrator.database import HEAD, WRITERS, Database, insert_unless_there
from sage_orchestrator.rows import Base, ModelRow, WorkerRow


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


@contextmanager
def written_by_another_process(database: Path) -> Iterator[None]:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


def test_a_busy_database_is_said_to_be_so_and_still_read(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'sage.db'}", patience_s=0.05)
    database.upgrade()
    said: list[ServiceUnavailableError] = []

    def change() -> None:
        try:
            with database.write() as session:
                session.execute(text("DELETE FROM files"))
        except ServiceUnavailableError as error:
            said.append(error)

    with written_by_another_process(tmp_path / "sage.db"):
        writers = [threading.Thread(target=change) for _ in range(2 * WRITERS)]
        for writer in writers:
            writer.start()
        with database.read() as session:
            assert session.scalars(text("SELECT id FROM files")).all() == []
        for writer in writers:
            writer.join(30)
    assert len(said) == 2 * WRITERS
    assert all("busy" in error.message and error.retry_after_s for error in said)
    database.close()


def test_whoever_only_reads_is_answered_while_changes_wait(home: Path) -> None:
    answers: queue.Queue[Response] = queue.Queue()
    body = {"filename": "a.jsonl", "bytes": 1, "mime_type": "text/jsonl", "purpose": "fine-tune"}
    with open_rig(home) as rig:

        def begin_upload() -> None:
            answers.put(rig.http.post("/v1/uploads", json=body))

        writers = [threading.Thread(target=begin_upload) for _ in range(WRITERS + 1)]
        with written_by_another_process(home / "state" / "sage.db"):
            for writer in writers:
                writer.start()
            # Nobody else can be answered yet: all others are waiting by now.
            refused = answers.get(timeout=30)
            assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")
            assert int(refused.headers["retry-after"]) > 0
            assert rig.get("/v1/files")["data"] == []
            assert answers.empty()
        for writer in writers:
            writer.join(30)
        assert {answers.get_nowait().status_code for _ in range(WRITERS)} == {200}


def test_a_file_that_is_no_database_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "sage.db").write_text("not what it should be\n" * 100)
    database = Database(f"sqlite:///{tmp_path / 'sage.db'}")
    with pytest.raises(SageError, match="put a copy of it back") as caught:
        database.upgrade()
    assert not caught.value.retryable
    database.close()


def test_a_broken_constraint_is_for_the_caller_to_understand(migrated: Path) -> None:
    database = Database(f"sqlite:///{migrated}")
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(WorkerRow(worker_id="w1"))
    database.close()


def test_what_is_there_already_stays_as_it_is(home: Path) -> None:
    database = Database(f"sqlite:///{home / 'state' / 'sage.db'}")
    with database.write() as session:
        for version in (3, 0):
            insert_unless_there(session, ModelRow, name="code", last_version=version)
        assert session.scalars(text("SELECT last_version FROM models")).all() == [3]
    database.close()


@pytest.mark.parametrize("url", ["mysql://u:secret@x/y", "sqlite+nodriver:///x", "nonsense:secret"])
def test_a_database_of_another_kind_ends_the_start_with_a_message(url: str, tmp_path: Path) -> None:
    env = {**os.environ, "SAGE_DATABASE_URL": url, "SAGE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "sage_orchestrator"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    said = ran.stdout + ran.stderr
    assert (ran.returncode, "Traceback" in said, "secret" in said) == (1, False, False), said
    assert "SAGE_DATABASE_URL cannot be used" in said and "postgresql://" in said


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
