"""Summary of a job that has run: what it used of what it asked for, from the history and from its runners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...client import Client, CorralError
from ...schemas.jobs import Job, JobTask
from ...schemas.units import format_bytes
from .. import render
from .job_tables import elapsed_seconds

_SQL = """
SELECT count(*) AS leases, sum(gpu_hours) AS gpu_hours, sum(energy_kwh) AS energy_kwh,
    sum(gpu_utilization_percent_mean * gpu_hours) / nullif(sum(gpu_hours)
        FILTER (gpu_utilization_percent_mean IS NOT NULL), 0) AS activity_percent,
    max(memory_used_bytes_peak) AS memory_peak_bytes, max(memory_granted_bytes) AS memory_granted_bytes,
    (SELECT 60 * sum(idle_hours) FROM idle_while_leased WHERE lease_id IN ({ids})) AS idle_minutes
FROM lease_usage WHERE lease_id IN ({ids})
"""


async def usage(client: Client, tasks: Sequence[JobTask]) -> dict[str, Any]:
    """Use of the leases of tasks' last attempts, from the history; empty if no processor answers or none is known."""
    ids = ", ".join(f"'{task.lease_id}'" for task in tasks if task.lease_id.replace("-", "").isalnum())
    if not ids:
        return {}
    try:
        [row] = (await client.query(_SQL.format(ids=ids), timeout=10.0, format="json")).dicts()
    except (CorralError, TimeoutError):
        return {}
    return row if row["leases"] else {}


def lines(job: Job, tasks: Sequence[JobTask], used: dict[str, Any]) -> list[tuple[str, str]]:
    """Summary as names and values, with what was asked for where it is known."""
    times = [seconds for task in tasks if (seconds := elapsed_seconds(task)) is not None]
    memory = max((sum(part.peak_memory_bytes for part in task.parts) for task in tasks), default=0)
    cpu = sum(part.cpu_seconds for task in tasks for part in task.parts)
    request = job.request
    found: list[tuple[str, str]] = []
    if times:
        found.append(("time", _times(times, request.max_seconds if request else None)))
    if used.get("gpu_hours"):
        idle = used.get("idle_minutes") or 0
        activity = used.get("activity_percent")
        shown = "not measured" if activity is None else f"{activity:.0f}% active"
        found.append(
            ("GPUs", f"{used['gpu_hours']:.2f} GPU-hours, {shown}" + (f", {idle:.0f} min idle" if idle else ""))
        )
    if used.get("memory_peak_bytes"):
        of = "asked for" if request and request.gpu_memory_bytes else "granted"
        found.append(("GPU memory", _of(used["memory_peak_bytes"], used.get("memory_granted_bytes"), of)))
    if memory:
        asked = request.host_memory_bytes if request else 0
        found.append(("RAM", _of(memory, asked)))
    if cpu and times:
        cores = cpu / max(sum(times), 1e-9)
        asked_cores = f" of {request.cpus:g} asked for" if request and request.cpus else ""
        found.append(("cores", f"{cores:.1f} busy on average{asked_cores}"))
    if used.get("energy_kwh"):
        found.append(("energy", f"{used['energy_kwh']:.3g} kWh"))
    return found


def _times(times: Sequence[float], limit: float | None) -> str:
    ordered = sorted(times)
    text = render.duration(ordered[-1])
    if len(ordered) > 1:
        middle, total = ordered[len(ordered) // 2], sum(ordered)
        text = f"{render.duration(middle)} (median), {text} at most, {render.duration(total)} in all"
    return text + (f"; the limit is {render.duration(limit)}" if limit else "")


def _of(used: float, asked: float | None, what: str = "asked for") -> str:
    if not asked:
        return f"{format_bytes(used)} at most"
    return f"{format_bytes(used)} at most, {used / asked:.0%} of {format_bytes(asked)} {what}"
