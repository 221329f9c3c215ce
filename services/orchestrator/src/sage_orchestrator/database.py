"""Connections, transactions and the schema's upgrade at start."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session

from sage_contracts.errors import ConflictError, SageError, ServiceUnavailableError, StorageFullError

HEAD = "0008"
"""The newest revision under migrations/. Where it is reached already, Alembic (12 MB) is not imported."""
MIGRATION_WAIT_S = 60.0
READERS = 32
"""Transactions that only read, at once; more of them wait."""
WRITERS = 48
"""Those that write, waiting ones included; more are refused, so that some threads stay for who only reads."""
_PATIENCE_S = 10.0
_POSTGRESQL_WRITERS = 16
"""At work at once: with the readers, half of the connections that a server has by default."""
_COLLISIONS = ("40001", "40P01")
"""Of PostgreSQL's: it ended one of several transactions that were in each other's way."""
# Any constant will do, so long as every orchestrator on one PostgreSQL uses the same.
_ADVISORY_LOCK = 0x5A6E0001


class Database:
    """Short transactions on SQLite or PostgreSQL. No session outlives a `with` block."""

    def __init__(self, url: str, *, patience_s: float = _PATIENCE_S) -> None:
        """`patience_s`: how long to wait for a connection, and on SQLite for another process's write.

        Raises: SageError for a URL of another kind, or one whose driver is missing.
        """
        is_sqlite = url.startswith("sqlite")
        self.engine = _make_engine(url, READERS, patience_s)
        # Connections of its own: whoever only reads is not to wait behind those who wait to write.
        self._write = _make_engine(url, 1 if is_sqlite else _POSTGRESQL_WRITERS, patience_s)
        self._writers = threading.BoundedSemaphore(WRITERS)
        self._lock: IO[str] | None = None
        if is_sqlite:
            _prepare_sqlite(self.engine, "BEGIN", patience_s)
            # A transaction that reads first and writes later cannot be upgraded while another one writes:
            # writers queue up for their one connection, and for other processes at their BEGIN.
            _prepare_sqlite(self._write, "BEGIN IMMEDIATE", patience_s)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads. Raises: as `write`."""
        with _in_our_words(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits at the end of the block.

        Raises: SageError for what is wrong with the database; IntegrityError as it is, since what it means is
        the caller's to know, and so are other faults of a statement.
        """
        if not self._writers.acquire(blocking=False):
            raise ServiceUnavailableError(
                f"The database is busy ({WRITERS} changes wait for it): try again.", retry_after_s=1
            )
        try:
            with _in_our_words(), Session(self._write, expire_on_commit=False) as session, session.begin():
                yield session
        finally:
            self._writers.release()

    def upgrade(self) -> None:
        """Bring the schema to the newest revision; of several starters one does it and the others wait."""
        with _in_our_words():
            if self.engine.dialect.name == "sqlite":
                self._upgrade_sqlite()
            else:
                self._upgrade_postgresql()

    def hold(self) -> None:
        """Keep other orchestrators from a database on SQLite until this is closed or its process is gone.

        Raises: ConflictError: another one has it.
        """
        if self.engine.dialect.name != "sqlite":
            return
        path = self._beside("lock")
        lock = path.open("w")
        try:
            # The kernel drops it with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ConflictError(
                f"Another orchestrator writes to {self.engine.url.database} ({path} is locked); only one may."
                " Stop it (`sage down`, `docker compose down`), or set SAGE_HOME to another place."
            ) from None
        self._lock = lock

    def close(self) -> None:
        self.engine.dispose()
        self._write.dispose()
        if self._lock is not None:
            self._lock.close()

    def _upgrade_sqlite(self) -> None:
        with _file_lock(self._beside("migrate")), self.engine.connect() as connection:
            _run_migrations(connection)

    def _beside(self, ending: str) -> Path:
        database = Path(str(self.engine.url.database))
        database.parent.mkdir(parents=True, exist_ok=True)
        return database.with_name(f"{database.name}.{ending}")

    def _upgrade_postgresql(self) -> None:
        with self.engine.connect() as connection:
            connection.execute(text(f"SET lock_timeout = '{int(MIGRATION_WAIT_S)}s'"))
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _ADVISORY_LOCK})
            connection.commit()
            try:
                _run_migrations(connection)
            finally:
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _ADVISORY_LOCK})
                connection.commit()


def insert_unless_there(session: Session, row: type[DeclarativeBase], **values: Any) -> None:
    """One row, where no other has its key; who inserts the same at the same time is waited for."""
    if session.get_bind().dialect.name == "postgresql":
        # Loaded only where it is used.
        from sqlalchemy.dialects.postgresql import insert

        session.execute(insert(row).values(values).on_conflict_do_nothing())
    else:
        session.execute(sqlite.insert(row).values(values).on_conflict_do_nothing())


def _run_migrations(connection: Connection) -> None:
    if _revision(connection) == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", "sage_orchestrator:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConflictError(
            f"The database cannot be brought to revision {HEAD} ({error}). Was it written by a newer "
            "version? Start that one, or set SAGE_DATABASE_URL or SAGE_HOME to another place."
        ) from error
    connection.commit()


def _revision(connection: Connection) -> str | None:
    try:
        revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    except (OperationalError, ProgrammingError):
        # No such table: an empty database.
        revision = None
    connection.rollback()
    return None if revision is None else str(revision)


def _make_engine(url: str, connections: int, patience_s: float) -> Engine:
    try:
        if make_url(url).get_backend_name() not in ("sqlite", "postgresql"):
            raise ArgumentError("it is of another kind")
        return create_engine(
            url,
            pool_pre_ping=not url.startswith("sqlite"),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=patience_s,
        )
    except (ArgumentError, ImportError) as error:
        raise SageError(
            f"SAGE_DATABASE_URL cannot be used ({error}): give sqlite:///PATH or postgresql://HOST/NAME."
        ) from error


def _prepare_sqlite(engine: Engine, begin: str, patience_s: float) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        # Python's driver would begin transactions when it sees fit; None leaves that to us, below.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(patience_s * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        # A power cut must not cost a job that was acknowledged; 6 ms a commit is nothing at our rate of them.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + MIGRATION_WAIT_S
    with path.open("w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServiceUnavailableError(
                        f"Another orchestrator has been upgrading the database for {MIGRATION_WAIT_S:.0f} s "
                        f"({path} is locked): stop it and start again."
                    ) from None
                time.sleep(0.05)
        yield


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if isinstance(error, (IntegrityError, ProgrammingError, DataError, NotSupportedError)):
            raise
        raise _translate(error) from error
    except PoolTimeoutError as error:
        raise ServiceUnavailableError(
            "The database is busy (no connection to it came free): try again.", retry_after_s=1
        ) from error


def _translate(error: DBAPIError) -> SageError:
    said = _said(error)
    if "disk is full" in said or "No space left" in said:
        return StorageFullError(f"The database cannot grow, the disk is full ({said}): free space.")
    if "locked" in said or getattr(error.orig, "sqlstate", None) in _COLLISIONS:
        return ServiceUnavailableError(f"The database is busy ({said}): try again.", retry_after_s=1)
    if "not a database" in said or "disk image is malformed" in said:
        return SageError(
            f"The database cannot be read ({said}): put a copy of it back, or set SAGE_DATABASE_URL or "
            "SAGE_HOME to another place."
        )
    return ServiceUnavailableError(f"The database does not answer: {said}", retry_after_s=5)


def _said(error: DBAPIError) -> str:
    """What is wrong. PostgreSQL adds details of its processes and rows, which are nothing for clients."""
    of_server = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return str(of_server or error.orig).strip()
