"""Orders for runners: what each shall do with the part of a task on its host."""

from __future__ import annotations

from msgspec.structs import replace

from ...schemas.requests import Lease
from ...schemas.work.jobs import FINAL, JobState
from ...schemas.work.runs import Run, RunVerb, run_id
from .job import Job
from .task import Task


def run_of(job: Job, task: Task, host: str, lease: Lease, *, with_spec: bool = True) -> Run | None:
    """Run of a task for the runner of a host; None if the runner is to forget it.

    Args:
        job: of the task.
        task: with an attempt.
        host: of one of its parts.
        lease: of the attempt.
        with_spec: false where the runner knows the job.
    """
    part = task.parts.get(host)
    if part is None or not task.is_live or part.state in FINAL:
        return None
    spec, ending = job.stored.spec, task.ending
    hosts = list(task.parts)
    verb = RunVerb.STOP if ending is not None else RunVerb.START if task.begun else RunVerb.PREPARE
    return Run(
        run_id=run_id(job.job_id, task.index, task.attempt),
        verb=verb,
        owner=job.owner,
        job_id=job.job_id,
        index=task.index if spec.array else None,
        attempt=task.attempt,
        lease_id=lease.lease_id,
        grants=[grant for grant in lease.grants if grant.host == host],
        lease_environment=lease.environment.get(host, {}),
        spec=replace(spec, array="", after=[]) if with_spec else None,
        hosts=hosts,
        addresses=[lease.addresses.get(name, "") for name in hosts],
        rank=part.rank,
        first_index=job.indexes[0],
        last_index=job.indexes[-1],
        tasks=len(job.indexes),
        ends_at=lease.ends_at,
        signal=task.notice_signal if ending is None else ending.signal,
        notice=task.notice,
        grace_seconds=task.grace_seconds,
        reason=task.notice_reason if ending is None else ending.message,
    )


def is_reported(task: Task, host: str) -> bool:
    """True if the runner of a host has reported its part of a task, and so knows the job."""
    part = task.parts.get(host)
    return part is not None and (part.state is not JobState.STARTING or bool(part.executor) or host in task.prepared)
