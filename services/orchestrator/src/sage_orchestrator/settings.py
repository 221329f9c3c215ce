"""Settings of the orchestrator, from the environment (prefix SAGE_)."""

from __future__ import annotations

from pydantic import Field

from sage_servicekit.machine import total_memory_bytes
from sage_servicekit.settings import ServiceSettings

MIB = 1024 * 1024


class OrchestratorSettings(ServiceSettings):
    orchestrator_port: int = 8081
    database_url: str | None = None
    """None: SQLite at `<home>/state/sage.db`."""

    max_file_bytes: int = 2048 * MIB
    sync_validation_bytes: int = 8 * MIB
    """Larger training files are checked in the background, in status `validating_files`."""
    sync_validation_s: float = Field(default=10.0, gt=0)
    """So are those whose check takes longer."""
    check_memory_bytes: int | None = Field(default=None, gt=0)
    """Of the process that checks a training file. None: a third of the memory there is, at most 4 GiB."""
    check_timeout_s: float = Field(default=1800.0, gt=0)
    """A file that takes longer to check is refused."""

    lease_s: float = 30.0
    """A worker that is silent for longer has lost its job."""
    device_lease_s: float = 30.0
    """An engine that does not renew for longer has lost its memory on the device."""
    max_attempts: int = 5
    """Workers a job may lose before it fails."""
    sweep_interval_s: float = 2.0
    ring_backoff_s: float = 30.0
    """Wait before a doorbell that nobody answered is rung again; doubles each time, up to 16 times this."""
    ring_retry_s: float = 5.0
    """Wait after the broker refused a doorbell."""
    worker_seen_s: float = 30.0
    """A worker is up while its last beat is younger than this."""

    @property
    def resolved_check_memory_bytes(self) -> int:
        # There may be two such processes, and this one needs some, too.
        return self.check_memory_bytes or min(total_memory_bytes() // 3, 4096 * MIB)

    @property
    def resolved_database_url(self) -> str:
        """SQLAlchemy's URL, with the driver named."""
        url = self.database_url or f"sqlite:///{self.home.state / 'sage.db'}"
        for prefix in ("postgresql://", "postgres://"):
            if url.startswith(prefix):
                return "postgresql+psycopg://" + url.removeprefix(prefix)
        return url
