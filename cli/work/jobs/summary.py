"""Summary of a job that has run, asked of the history."""

from __future__ import annotations

from ....client import Client, CorralError
from ....client.jobs.names import Selection
from ....client.jobs.summary import lines, statement, summary_of
from ....schemas.work.jobs import task_name


async def used(client: Client, chosen: Selection) -> list[tuple[str, str]]:
    """Use of a job, as names and values; of one task, where one alone is chosen.

    Nothing if no processor answers, or none knows the job (yet).
    """
    name = task_name(chosen.job_id, chosen.indexes[0] if len(chosen.indexes) == 1 else None)
    try:
        found = summary_of(name, (await client.query(statement(name), timeout=10.0)).dicts())
    except (CorralError, TimeoutError):
        return []
    return [] if found is None else lines(found)
