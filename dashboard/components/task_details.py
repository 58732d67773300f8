"""A task of a job: how it went at its last attempt, on which devices, and what ran on each host."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from ...schemas.requests import Lease
from ...schemas.values.units import format_bytes
from ...schemas.work.jobs import Job, JobTask, TaskPart
from ..html import table, tag, url
from ..zones import local
from .copy_button import CopyButton
from .host_links import host_link
from .job_rows import length, percent, state_chip


class TaskDetails:
    """Description of a task. It is created anew when the task reaches another state; else only texts are changed."""

    def __init__(self) -> None:
        self._place = tag("div")
        self._shown: Any = None
        self._texts: dict[tuple[str, str], Any] = {}

    def show(self, job: Job, task: JobTask | None, lease: Lease | None) -> None:
        """Show a task.

        Args:
            job: its job.
            task: the task; None if the job has no such task.
            lease: of its attempt; None once that has ended.
        """
        facts = _facts(task) if task is not None else []
        parts = [_part_texts(part) for part in task.parts] if task is not None else []
        shown = (
            (job.job_id, job.held, lease and lease.lease_id, [name for name, _ in facts])
            + ((task.index, task.attempt, task.state, task.lease_id, task.message) if task is not None else ())
            + tuple((part.host, part.state, part.message) for part in (task.parts if task is not None else ()))
        )
        if shown != self._shown:
            self._shown = shown
            self._texts = {}
            self._place.clear()
            with self._place:
                if task is None:
                    tag("div", "note", "The job has no such task.")
                else:
                    self._create(job, task, lease)
        texts = {("", name): value for name, value in facts}
        for part, values in zip(task.parts if task is not None else (), parts, strict=True):
            texts |= {(part.host, head): value for head, value in values.items()}
        for key, value in texts.items():
            place = self._texts[key]
            if place.text != value:
                place.set_text(value)

    def _create(self, job: Job, task: JobTask, lease: Lease | None) -> None:
        with tag("div", "facts"):
            with _fact("State"):
                state_chip(task.state, held=job.held and not task.parts)
            for name, _ in _facts(task):
                with _fact(name):
                    self._texts["", name] = tag("span", text="")
            if task.lease_id:
                with _fact("Lease"):
                    tag("a", "link", task.lease_id, href=url("/leases", q=task.lease_id))
            if lease is not None:
                with _fact("Devices"):
                    _devices(lease)
                with _fact("Inside"):
                    named = f"{job.job_id}_{task.index}" if job.array else job.job_id
                    CopyButton(f"corral attach {named}", "Copy the command to attach")
        if task.message:
            tag("div", "note", task.message).style("margin-top:12px")
        if task.parts:
            heads = ("Host", "State", *_PART_HEADS)
            table(heads, [self._part(part) for part in task.parts], numeric=(4, 5)).style("margin-top:12px")
            for part in task.parts:
                if part.message:
                    tag("div", "note", f"{part.host}: {part.message}")

    def _part(self, part: TaskPart) -> list[Any]:
        def text(head: str) -> Callable[[], None]:
            def create() -> None:
                self._texts[part.host, head] = tag("span", text="")

            return create

        return [lambda: host_link(part.host), lambda: state_chip(part.state), *map(text, _PART_HEADS)]


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


_PART_HEADS: Final = ("Exit", "Ran for", "Peak RAM", "CPU time", "Runs as", "Output on the host")


def _part_texts(part: TaskPart) -> dict[str, str]:
    values = (
        ending(part.exit_code, part.signal) or "–",
        _ran(part) or "–",
        format_bytes(part.peak_memory_bytes) if part.peak_memory_bytes else "–",
        length(part.cpu_seconds) if part.cpu_seconds else "–",
        part.executor or "–",
        f"{part.log_file} ({format_bytes(part.log_bytes)})" if part.log_file else "–",
    )
    return dict(zip(_PART_HEADS, values, strict=True))


def _devices(lease: Lease) -> None:
    devices = [grant for grant in lease.grants if grant.device]
    if not devices:
        tag("span", text="none")
    for at, grant in enumerate(devices):
        words = f"{grant.host} · GPU {grant.index}" + (", " if at + 1 < len(devices) else "")
        tag("a", "link", words, href=f"/device/{quote(grant.device, safe='')}")


def _ran(one: JobTask | TaskPart) -> str:
    if one.started_at is None:
        return ""
    return length(((one.ended_at or datetime.now(UTC)) - one.started_at).total_seconds())


def ending(exit_code: int | None, number: int | None) -> str:
    """End of a command: its exit code, or the name of the signal; empty while it runs."""
    if number is not None:
        try:
            return signal.Signals(number).name
        except ValueError:
            return f"signal {number}"
    return "" if exit_code is None else str(exit_code)


def clock(moment: datetime) -> str:
    """A time in the reader's zone."""
    return local(moment, "%d %b %H:%M:%S %Z")
