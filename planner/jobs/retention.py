"""Retention of ended jobs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .job import Job

RETAIN_SECONDS: Final = 86_400.0
"""Retention of an ended job."""
RETAIN_PART: Final = 1 / 8
"""Part of the bucket that ended jobs may take; the oldest are forgotten sooner then."""
TASK_BYTES: Final = 700
"""Size of the record of a task, about."""


def size_of(job: Job) -> int:
    """Bytes that a job takes in the bucket, about."""
    return job.size + TASK_BYTES * len(job.tasks)


def to_forget(jobs: Iterable[Job], now: float, bucket_bytes: int) -> list[str]:
    """Ids of the ended jobs to forget, the oldest end first; those that others wait for are kept.

    Args:
        jobs: all jobs.
        now: seconds since the epoch.
        bucket_bytes: capacity of the bucket; 0 or less for no limit.
    """
    jobs = list(jobs)
    needed = {job_id for job in jobs for job_id in job.waits_for}
    ended = sorted(
        (job.ended_at.timestamp(), job.job_id, size_of(job))
        for job in jobs
        if job.ended_at is not None and job.job_id not in needed
    )
    size = sum(each for _, _, each in ended)
    most = bucket_bytes * RETAIN_PART if bucket_bytes > 0 else float("inf")
    found: list[str] = []
    for ended_at, job_id, each in ended:
        if now - ended_at < RETAIN_SECONDS and size <= most:
            break
        found.append(job_id)
        size -= each
    return found
