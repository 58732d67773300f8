"""Finds measured rates for a question about serving: in the owner's own jobs, and in tables that are installed."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from ...schemas.models.serving import DeviceRate, ServeWork
from ..jobs import JobCalls
from ..server_commands.jobs import LABEL, served_copy
from .served import best_rates, rate_of, same_model
from .tables import installed, table_rates

MOST_JOBS: Final = 8
"""Jobs whose output is read: the newest that served the model."""
_LOOKED_AT: Final = 64
"""Jobs whose script is read."""


class Asker(Protocol):
    """The parts of a client that are needed."""

    owner: str

    @property
    def jobs(self) -> JobCalls:
        """Calls about jobs."""
        ...


async def measured_rates(client: Asker, work: ServeWork, products: list[str]) -> list[DeviceRate]:
    """Rates that were measured, those of this fleet first. Only the owner's own jobs can be read.

    Args:
        client: a connected client.
        work: the question.
        products: names of the devices of the fleet.
    """
    folder = installed()
    own = best_rates(await _served(client, work))
    if folder is None:
        return own
    return own + await asyncio.to_thread(table_rates, work, products, folder)


async def _served(client: Asker, work: ServeWork) -> list[DeviceRate]:
    found: list[DeviceRate] = []
    jobs = [job for job in await client.jobs.find(owner=client.owner) if LABEL in job.labels and job.counts]
    read = 0
    for job in jobs[:_LOOKED_AT]:
        spec = (await client.jobs.show(job.job_id)).spec
        copy = None if spec is None else served_copy(spec.script)
        if copy is None or not same_model(copy.work.model, work.model):
            continue
        pieces = [piece.data async for piece in client.jobs.logs(job.job_id)]
        rate = rate_of(copy, b"".join(pieces).decode("utf-8", "replace"), job.job_id, job.submitted_at)
        found += [] if rate is None else [rate]
        read += 1
        if read == MOST_JOBS:
            break
    return found
