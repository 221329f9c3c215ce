"""Databases that earlier versions wrote, after their upgrade."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, text
from tests.fakes.orchestrator_rig import open_rig

from sage_contracts.config import TrainingConfig
from sage_orchestrator.database import Database
from sage_orchestrator.rows import Base


@contextmanager
def written_at(revision: str, home: Path) -> Iterator[Connection]:
    """The home's database as a version wrote it whose newest migration this was."""
    (home / "state").mkdir()
    database = Database(f"sqlite:///{home / 'state' / 'sage.db'}")
    config = Config()
    config.set_main_option("script_location", "sage_orchestrator:migrations")
    with database.engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()
        yield connection
        connection.commit()
    database.close()


def insert(connection: Connection, rows: dict[str, dict[str, Any]]) -> None:
    """One row into each table."""
    tables = MetaData()
    tables.reflect(connection)
    for name, row in rows.items():
        connection.execute(tables.tables[name].insert().values(row))


_WORK = {
    "status": "succeeded",
    "attempt": 1,
    "lost_attempts": 0,
    "rings": 1,
    "created_at": 1.0,
    "finished_at": 2.0,
}
FIRST_RELEASE: dict[str, dict[str, Any]] = {
    "jobs": {
        "id": "ftjob-1", "name": "code", "version": 1, "task": "code", "model": "smollm2-135m",
        "config": TrainingConfig().model_dump(mode="json", include={"learning_rate", "output_dir"}),
        "hyperparameters": {}, "method": {"type": "supervised"}, "pending_order": "continue", "metrics": {},
        "fine_tuned_model": "code@1", **_WORK,
    },
    "models": {"name": "code", "last_version": 1, "alias_version": 1},
    "model_versions": {
        "name": "code", "version": 1, "created_at": 1.0, "task": "code", "job_id": "ftjob-1",
        "base_model": "base_models/smollm2-135m", "adapter_path": "adapters/1", "lora_rank": 8, "meta": {},
        "merged_path": "merged/code",
    },
    "merges": {
        "id": "merge-1", "name": "code", "version": 1, "dtype": "auto", "output_dir": "merged",
        "merged_path": "merged/code", **_WORK,
    },
}  # fmt: skip
"""A trained and merged model in the tables of revision 0001."""


def test_what_the_first_release_wrote_is_still_there_after_the_upgrade(tmp_path: Path) -> None:
    with written_at("0001", tmp_path) as connection:
        insert(connection, FIRST_RELEASE)

    with open_rig(tmp_path) as rig:
        merge = rig.get("/v1/sage/merges/merge-1")
        assert (merge["status"], merge["format"], merge["result_path"]) == (
            "succeeded", "safetensors", "merged/code",
        )  # fmt: skip
        assert merge["merged_path"] == "merged/code"
        with rig.parts.database.read() as session:
            assert session.scalar(text("SELECT content FROM merges")) == "merged"
        job = rig.job("ftjob-1")
        assert (job["status"], job["fine_tuned_model"], job["result_files"]) == ("succeeded", "code@1", [])
        served = rig.get("/internal/models/resolve", name="code")
        assert (served["adapter_path"], served["merged_path"]) == ("adapters/1", "merged/code")


QUEUED_EXPORT = {
    "id": "merge-2", "name": "code", "version": 1, "dtype": "auto", "format": "hub", "output_dir": "merged",
    **_WORK, "status": "queued", "finished_at": None,
}  # fmt: skip
MODEL = {
    "models": FIRST_RELEASE["models"],
    "model_versions": FIRST_RELEASE["model_versions"] | {"merged_path": None},
}


@pytest.mark.parametrize("repo", ["me/x", "public:me/x"])
@pytest.mark.parametrize("revision", ["0006", "0007"])
def test_exports_queued_before_there_was_a_column_keep_their_permission(
    revision: str, repo: str, tmp_path: Path
) -> None:
    with written_at(revision, tmp_path) as connection:
        insert(connection, MODEL | {"merges": QUEUED_EXPORT | {"repo": repo}})
    with open_rig(tmp_path) as rig:
        claim = rig.post("/internal/merges/merge-2/claim", {"worker_id": "m"})
        assert (claim["repo"], claim["allow_public"]) == ("me/x", repo.startswith("public:"))


def test_a_column_that_0007_had_for_a_while_is_not_added_again(tmp_path: Path) -> None:
    with written_at("0007", tmp_path) as connection:
        connection.execute(text("ALTER TABLE merges ADD COLUMN allow_public BOOLEAN"))
        export = QUEUED_EXPORT | {"repo": "me/x", "allow_public": True}
        insert(connection, MODEL | {"merges": export})
    with open_rig(tmp_path) as rig:
        claim = rig.post("/internal/merges/merge-2/claim", {"worker_id": "m"})
        assert (claim["repo"], claim["allow_public"]) == ("me/x", True)
        with rig.parts.database.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
