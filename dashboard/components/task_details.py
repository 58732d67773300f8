"""A task of a job: how it went at its last attempt, on which devices, and what ran on each host."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ...schemas.jobs import Job, JobTask, TaskPart
from ...schemas.requests import Lease
from ...schemas.units import format_bytes
from ..html import table, tag, url
from .job_rows import length, percent, state_chip


def show_task(job: Job, task: JobTask, lease: Lease | None) -> None:
    """Create the description of a task.

    Args:
        job: its job.
        task: the task.
        lease: of its attempt; None once that has ended.
    """
    with tag("div", "facts"):
        with _fact("State"):
            state_chip(task.state, held=job.held and not task.parts)
        for name, value in _facts(task):
            with _fact(name):
                tag("span", text=value)
        if task.lease_id:
            with _fact("Lease"):
                tag("a", "link", task.lease_id, href=url("/leases", q=task.lease_id))
        if lease is not None:
            with _fact("Devices"):
                _devices(lease)
    if task.message:
        tag("div", "note", task.message).style("margin-top:12px")
    if task.parts:
        rows = [_part(part) for part in task.parts]
        heads = ("Host", "State", "Exit", "Ran for", "Peak RAM", "CPU time", "Runs as", "Output on the host")
        table(heads, rows, numeric=(4, 5)).style("margin-top:12px")
        for part in task.parts:
            if part.message:
                tag("div", "note", f"{part.host}: {part.message}")


def _fact(name: str) -> Any:
    with tag("div"):
        tag("div", "fact-name", name)
        return tag("div", "fact-value")


def _facts(task: JobTask) -> list[tuple[str, str]]:
    found = [("Attempt", str(task.attempt) if task.attempt else "not started yet")]
    if task.retries_left:
        found[0] = ("Attempt", f"{found[0][1]}, {task.retries_left} more if it fails")
    if how := ending(task.exit_code, task.signal):
        found.append(("Exit", how))
    for name, at in (("Queued", task.pending_since), ("Started", task.started_at), ("Ended", task.ended_at)):
        if at is not None:
            found.append((name, clock(at)))
    if ran := _ran(task):
        found.append(("Ran for", ran))
    if task.progress is not None:
        found.append(("Progress", percent(task.progress)))
    return found


def _devices(lease: Lease) -> None:
    devices = [grant for grant in lease.grants if grant.device]
    if not devices:
        tag("span", text="none")
    for at, grant in enumerate(devices):
        words = f"{grant.host} · GPU {grant.index}" + (", " if at + 1 < len(devices) else "")
        tag("a", "link", words, href=f"/device/{quote(grant.device, safe='')}")


def _part(part: TaskPart) -> tuple[Any, ...]:
    def state() -> Callable[[], None]:
        return lambda: state_chip(part.state)

    return (
        part.host,
        state(),
        ending(part.exit_code, part.signal) or "–",
        _ran(part) or "–",
        format_bytes(part.peak_memory_bytes) if part.peak_memory_bytes else "–",
        length(part.cpu_seconds) if part.cpu_seconds else "–",
        part.executor or "–",
        f"{part.log_file} ({format_bytes(part.log_bytes)})" if part.log_file else "–",
    )


def _ran(one: JobTask | TaskPart) -> str:
    if one.started_at is None:
        return ""
    return length(((one.ended_at or datetime.now(UTC)) - one.started_at).total_seconds())


def ending(exit_code: int | None, number: int | None) -> str:
    """How a command ended: its exit code, or the name of the signal; empty while it runs."""
    if number is not None:
        try:
            return signal.Signals(number).name
        except ValueError:
            return f"signal {number}"
    return "" if exit_code is None else str(exit_code)


def clock(moment: datetime) -> str:
    """A time in UTC."""
    return moment.astimezone(UTC).strftime("%d %b %H:%M:%S")
