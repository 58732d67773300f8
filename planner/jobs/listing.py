"""Jobs and their tasks as they are published and listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from msgspec.structs import replace

from ...schemas import codec
from ...schemas.request_events import asked
from ...schemas.values import globs
from ...schemas.work.jobs import FINAL, JobFilter, JobListing, Jobs, JobState, JobTask
from ...schemas.work.jobs import Job as ListedJob
from .job import Job
from .task import time_of

_LISTING_BYTES: Final = 256
_JOB_SECONDS: Final = 60e-6
_TASK_SECONDS: Final = 12e-6


def listed(job: Job, *, brief: bool = False, why: str = "") -> ListedJob:
    """A job as everyone may see it.

    Args:
        job: the job.
        brief: leave out request and labels.
        why: reason why it waits, if the job itself does not say.
    """
    spec = job.stored.spec
    request = spec.request
    state = job.state
    return ListedJob(
        job_id=job.job_id,
        owner=job.owner,
        name=request.name,
        group=job.stored.group,
        state=state,
        submitted_at=time_of(job.stored.submitted_at),
        ended_at=job.ended_at,
        array=spec.array,
        counts={name.value: count for name, count in job.counts.items() if count},
        gpus=request.gpus,
        hosts=spec.hosts,
        tasks_per_host=spec.tasks_per_host,
        held=job.held,
        after=spec.after,
        labels={} if brief else request.labels,
        progress=_progress(job),
        message=_message(job, state) or (why if state is JobState.PENDING else ""),
        request=None if brief else asked(request),
    )


def _progress(job: Job) -> float | None:
    if not job.says_progress:
        return None
    some = sum(job.tasks[index].progress or 0.0 for index in (*job.live, *job.unfinished))
    return round((job.counts[JobState.DONE] + some) / len(job.indexes), 6)


def _message(job: Job, state: JobState) -> str:
    if state is JobState.DONE:
        return ""
    if state in FINAL:
        return job.message or job.rest_message
    if job.held and job.counts[JobState.PENDING]:
        return "held"
    if job.waits_for:
        return f"waits for {'job' if len(job.waits_for) == 1 else 'jobs'} {', '.join(sorted(job.waits_for, key=int))}"
    return job.message


def task_of(job: Job, index: int) -> JobTask:
    """A task as it is published."""
    task = job.view(index).listed()
    if task.state is JobState.PENDING and index in job.held_tasks:
        task = replace(task, message="held")
    return public(job, task)


def public(job: Job, task: JobTask) -> JobTask:
    """A task as everyone may see it: without the file that the job names for its output."""
    if not job.stored.spec.output or not any(part.log_file for part in task.parts):
        return task
    return replace(task, parts=[replace(part, log_file="") for part in task.parts])


def listing(jobs: Iterable[Job], only: JobFilter, max_bytes: int, why: Callable[[Job], str] = lambda _: "") -> Jobs:
    """Jobs that match a filter, the newest first, cut at the size of a message.

    Args:
        jobs: all jobs, the oldest first.
        only: filter and page.
        max_bytes: size of all listed jobs as JSON; at least one is listed.
        why: returns why a job waits.
    """
    found = [job for job in jobs if _matches(job, only)]
    found.reverse()
    paging_tasks = only.tasks and len(found) == 1
    first = 0 if paging_tasks else only.offset
    last = None if paging_tasks or only.limit is None else first + only.limit
    made: list[JobListing] = []
    left = max_bytes
    for job in found[first:last]:
        shown = listed(job, why=why(job))
        left -= len(codec.encode(shown, codec.JSON)) + _LISTING_BYTES
        if left < 0 and made:
            break
        tasks: list[JobTask] = []
        total = 0
        if only.tasks:
            for index in _indexes(job, only):
                total += 1
                if paging_tasks and (total <= only.offset or (only.limit is not None and len(tasks) >= only.limit)):
                    continue
                if left < 0:
                    continue
                task = task_of(job, index)
                left -= len(codec.encode(task, codec.JSON)) + 1
                if left >= 0 or not tasks:
                    tasks.append(task)
        made.append(JobListing(job=shown, tasks=tasks, total_tasks=total))
    return Jobs(jobs=made, total=len(found))


def _matches(job: Job, only: JobFilter) -> bool:
    if only.job_ids and job.job_id not in only.job_ids:
        return False
    if only.owner is not None and job.owner != only.owner:
        return False
    if only.active and job.ended_at is not None:
        return False
    if only.states and job.state not in only.states:
        return False
    return not only.name or globs.matches_any(job.stored.spec.request.name.lower(), (only.name.lower(),))


def _indexes(job: Job, only: JobFilter) -> Iterator[int]:
    """Indexes of the tasks that match a filter, ascending."""
    chosen = sorted(index for index in set(only.indexes) if job.has(index)) if only.indexes else job.indexes
    states = frozenset(only.task_states)
    return (index for index in chosen if not states or job.state_of(index) in states)


def cost(jobs: int, tasks: int, only: JobFilter) -> float:
    """Cost of a listing, in seconds.

    Args:
        jobs: number of jobs.
        tasks: number of their tasks.
        only: filter and page.
    """
    listed_jobs = jobs if only.limit is None or only.tasks else min(jobs, only.limit)
    if only.job_ids:
        listed_jobs = min(listed_jobs, len(only.job_ids))
    each = min(tasks, only.limit or tasks) if only.tasks else 0
    return jobs * 1e-6 + listed_jobs * _JOB_SECONDS + each * _TASK_SECONDS + (tasks * 0.2e-6 if only.tasks else 0.0)
