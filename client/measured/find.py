"""Finds measured rates for a question about serving: in the owner's own jobs, and in tables that are installed."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple, Protocol

from msgspec.structs import replace

from ...schemas.models.serving import MAX_RATES, DeviceRate, ServeWork
from ...schemas.operations import FleetSummary
from ..errors import CorralError
from ..jobs.calls import JobCalls
from ..server_commands.jobs import LABEL, served_copy
from .served import best_rates, rate_of, same_model
from .tables import installed, table_rates

MOST_JOBS: Final = 8
"""Jobs whose output is read: the newest that served the model."""
_LOOKED_AT: Final = 64
"""Jobs whose script is read."""


class Asker(Protocol):
    """The parts of a client that are needed."""

    @property
    def jobs(self) -> JobCalls:
        """Calls about jobs."""
        ...

    async def fleet(self) -> FleetSummary:
        """Aggregates over the fleet."""
        ...


class Measured(NamedTuple):
    """A question with the rates that were found for it.

    Attributes:
        work: the question; rates that it had come first.
        problem: why rates were left out; empty if none were.
    """

    work: ServeWork
    problem: str = ""


async def with_measured_rates(client: Asker, work: ServeWork, owner: str | None = None) -> Measured:
    """Add the rates that were measured to a question. Without them it can be asked as well, so no error is raised.

    Args:
        client: a connected client.
        work: the question.
        owner: whose jobs are read; None for the client's owner.
    """
    try:
        rates = await measured_rates(client, work, list((await client.fleet()).models), owner)
    except CorralError as error:
        return Measured(work, f"measured rates are left out: {error}")
    return Measured(replace(work, rates=[*work.rates, *rates][:MAX_RATES]))


async def measured_rates(
    client: Asker, work: ServeWork, products: list[str], owner: str | None = None
) -> list[DeviceRate]:
    """Rates that were measured, those of this fleet first. Only the owner's own jobs can be read.

    Args:
        client: a connected client.
        work: the question.
        products: names of the devices of the fleet.
        owner: whose jobs are read; None for the client's owner.

    Raises:
        CorralError: jobs can't be read.
    """
    folder = installed()
    calls = client.jobs
    calls.owner = owner or calls.owner
    own = best_rates(await _served(calls, work))
    if folder is None:
        return own
    return own + await asyncio.to_thread(table_rates, work, products, folder)


async def _served(calls: JobCalls, work: ServeWork) -> list[DeviceRate]:
    found: list[DeviceRate] = []
    jobs = [job for job in await calls.find(owner=calls.owner) if LABEL in job.labels and job.counts]
    read = 0
    for job in jobs[:_LOOKED_AT]:
        spec = (await calls.show(job.job_id)).spec
        copy = None if spec is None else served_copy(spec.script)
        if copy is None or not same_model(copy.work.model, work.model):
            continue
        pieces = [piece.data async for piece in calls.logs(job.job_id)]
        rate = rate_of(copy, b"".join(pieces).decode("utf-8", "replace"), job.job_id, job.submitted_at)
        found += [] if rate is None else [rate]
        read += 1
        if read == MOST_JOBS:
            break
    return found
