"""Rows of jobs and of the attempts of their tasks: what was asked, what became of it, and what was used.

Command, script, arguments, environment and files of a job are not in its events, and so not in the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas.requests import WorkRequest
from ...schemas.work.jobs import Job, JobEvent, JobTask, TaskPart
from .protocol import ArrowTable
from .rows import arrow_schema
from .statements import put, registered

JOB_KEYS: Final = ("job_id", "submitted_at")
"""Columns that identify a job. Ids start again where a planner has lost its bucket and the stream."""
TASK_KEYS: Final = (*JOB_KEYS, "index", "attempt")
"""Columns that identify an attempt of a task."""
JOBS: Final = arrow_schema("jobs")
TASKS: Final = arrow_schema("job_tasks")

_JobKey = tuple[str, datetime]
_TaskKey = tuple[str, datetime, int, int]


def write_jobs(cursor: DuckDBPyConnection, events: Sequence[JobEvent]) -> None:
    """Update jobs and the attempts of their tasks, each to its greatest version. Call it in a transaction."""
    if not events:
        return
    with registered(cursor, "new_jobs", jobs_of(events)), registered(cursor, "new_tasks", tasks_of(events)):
        later = ", ".join(
            f"CASE WHEN j.version > n.version THEN j.{name} ELSE n.{name} END AS {name}"
            for name in JOBS.names
            if name not in (*JOB_KEYS, *_ASKED)
        )
        # Only the first event of a job has the request, and an event that is late may be the first.
        asked = ", ".join(f"coalesce(n.{name}, j.{name}) AS {name}" for name in _ASKED)
        put(
            cursor,
            "jobs",
            f"SELECT n.job_id, n.submitted_at, {later}, {asked} FROM new_jobs n "
            "LEFT JOIN jobs j USING (job_id, submitted_at)",
            JOB_KEYS,
        )
        put(
            cursor,
            "job_tasks",
            "SELECT n.* FROM new_tasks n LEFT JOIN job_tasks t USING (job_id, submitted_at, index, attempt) "
            "WHERE t.version IS NULL OR t.version < n.version",
            TASK_KEYS,
        )


def jobs_of(events: Sequence[JobEvent]) -> ArrowTable:
    """Rows of the jobs of events: each at its greatest version, with the request if one of its events has it."""
    last: dict[_JobKey, JobEvent] = {}
    requests: dict[_JobKey, Job] = {}
    for event in events:
        key = (event.job.job_id, event.job.submitted_at)
        if key not in last or last[key].version < event.version:
            last[key] = event
        if event.job.request is not None:
            requests.setdefault(key, event.job)
    rows = [_job(event) | _asked(requests.get(key)) for key, event in last.items()]
    return pa.Table.from_pylist(rows, schema=JOBS)


def tasks_of(events: Sequence[JobEvent]) -> ArrowTable:
    """Rows of the attempts of tasks of events, each at its greatest version."""
    last: dict[_TaskKey, tuple[JobEvent, JobTask]] = {}
    for event in events:
        for task in event.tasks:
            key = (event.job.job_id, event.job.submitted_at, task.index, attempt_of(task))
            if key not in last or last[key][0].version < event.version:
                last[key] = event, task
    return pa.Table.from_pylist([_task(event, task) for event, task in last.values()], schema=TASKS)


def attempt_of(task: JobTask) -> int:
    """Number of the attempt that a state of a task is of: a task without a lease waits for, or lacks, its next one."""
    return task.attempt if task.lease_id else task.attempt + 1


def _job(event: JobEvent) -> dict[str, Any]:
    job = event.job
    return {
        "job_id": job.job_id,
        "submitted_at": job.submitted_at,
        "owner": job.owner,
        "name": job.name,
        "group_name": job.group or None,
        "state": job.state.value,
        "ended_at": job.ended_at,
        "array_indexes": job.array or None,
        "tasks": sum(job.counts.values()),
        "gpus": job.gpus,
        "hosts": job.hosts,
        "tasks_per_host": job.tasks_per_host,
        "held": job.held,
        "after_jobs": [f"{after.job_id}:{after.condition.value}" for after in job.after],
        "progress": job.progress,
        "message": job.message or None,
        "changed": event.time,
        "version": event.version,
        "planner": event.planner,
    }


def _asked(job: Job | None) -> dict[str, Any]:
    """Columns of the request; all null where it is not known."""
    request = None if job is None else job.request
    if job is None or request is None:
        return dict.fromkeys(_ASKED)
    return {"labels": list(job.labels.items()), **{name: getattr(request, name) for name in _REQUEST}}


_REQUEST: Final = (
    *("gpu_share", "gpu_memory_bytes", "cpus", "host_memory_bytes", "models", "priority", "preemptible"),
    *("expected_seconds", "max_seconds"),
)
"""Columns that are attributes of the request."""
_ASKED: Final = ("labels", *_REQUEST)
assert set(_REQUEST) <= set(WorkRequest.__struct_fields__)


def _task(event: JobEvent, task: JobTask) -> dict[str, Any]:
    parts = task.parts
    return {
        "job_id": event.job.job_id,
        "submitted_at": event.job.submitted_at,
        "index": task.index,
        "attempt": attempt_of(task),
        "state": task.state.value,
        "lease_id": task.lease_id or None,
        "hosts": [part.host for part in sorted(parts, key=_rank)],
        "exit_code": task.exit_code,
        "signal": task.signal,
        "pending_since": task.pending_since,
        "started_at": task.started_at,
        "ended_at": task.ended_at,
        "progress": task.progress,
        "message": task.message or None,
        "retries_left": task.retries_left,
        # A runner says 0 for what it does not know.
        "peak_memory_bytes": max((part.peak_memory_bytes for part in parts), default=0) or None,
        "cpu_seconds": sum(part.cpu_seconds for part in parts) or None,
        "executor": next((part.executor for part in parts if part.executor), None),
        "log_bytes": sum(part.log_bytes for part in parts),
        "changed": event.time,
        "version": event.version,
    }


def _rank(part: TaskPart) -> int:
    return part.rank
