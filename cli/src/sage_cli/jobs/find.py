"""A job by its id, or the newest one of a model's name."""

from __future__ import annotations

from contextlib import suppress

from sage_cli.client import Client
from sage_contracts.errors import NotFoundError
from sage_contracts.jobs import FineTuningJob

_SEARCHED = 100


def find_job(client: Client, given: str) -> FineTuningJob:
    """Raises: NotFoundError naming the newest jobs."""
    if given.startswith("ftjob"):
        with suppress(NotFoundError):
            return client.job(given)
    jobs = client.jobs(_SEARCHED)
    for job in jobs:  # newest first
        if given in (job.sage.name, job.fine_tuned_model):
            return job
    # The name of a sweep: the job that its version came from.
    job_ids = (card.sage.job_id for card in client.models() if card.id == given and card.sage is not None)
    if job_id := next(job_ids, None):
        return client.job(job_id)
    if not jobs:
        raise NotFoundError("There are no jobs yet. Start one: sage finetune quickstart code")
    names = ", ".join(dict.fromkeys(job.sage.name for job in jobs))
    raise NotFoundError(
        f"There is no job of {given!r}. Names that have jobs: {names}. All: sage finetune list"
    )
