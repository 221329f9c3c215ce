"""A job or a sweep by its id, or the newest one of a name."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from sage_cli.client import PAGE, Client
from sage_contracts.errors import NotFoundError
from sage_contracts.jobs import FineTuningJob
from sage_contracts.sweeps import Sweep

_MOST_VERSIONS = 1000
_MOST_NAMED = 10


def find_job(client: Client, given: str) -> FineTuningJob:
    """Raises: NotFoundError naming the newest jobs."""
    if given.startswith("ftjob"):
        with suppress(NotFoundError):
            return client.job(given)
    name, _, version = given.partition("@")
    for job in client.jobs(_MOST_VERSIONS if version else 1, name=name):  # newest first
        # Looked at again: a server from before this filter answers with jobs of any name.
        if given in (job.sage.name, job.fine_tuned_model):
            return job
    # The name of a sweep: the job that its version came from.
    job_ids = (card.sage.job_id for card in client.models() if card.id == given and card.sage is not None)
    if job_id := next(job_ids, None):
        return client.job(job_id)
    jobs = client.jobs(PAGE)
    if not jobs:
        raise NotFoundError("There are no jobs yet. Start one: sage finetune quickstart code")
    raise NotFoundError(
        f"There is no job of {given!r}. Names that have jobs: {_named(job.sage.name for job in jobs)}."
        " More: sage finetune list --limit 1000"
    )


def find_sweep(client: Client, given: str) -> Sweep:
    """Raises: NotFoundError naming the newest sweeps."""
    if given.startswith("sweep-"):
        with suppress(NotFoundError):
            return client.sweep(given)
    for sweep in client.sweeps(1, name=given):
        if sweep.name == given:
            return sweep
    sweeps = client.sweeps(PAGE)
    raise NotFoundError(
        f"There is no sweep of {given!r}. "
        + (f"There are: {_named(sweep.name for sweep in sweeps)}." if sweeps else "There are none yet.")
    )


def _named(names: Iterable[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different[:_MOST_NAMED]) + (" and others" if len(different) > _MOST_NAMED else "")
