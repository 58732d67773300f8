"""Events of jobs as a planner publishes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from corral.schemas.request_events import asked
from corral.schemas.requests import WorkRequest
from corral.schemas.work.jobs import Job, JobEvent, JobEventKind, JobState, JobTask, TaskPart
from msgspec.structs import replace

START = datetime(2026, 11, 24, 12, tzinfo=UTC)


class JobHistory:
    """A job whose changes become events, with the versions that a planner counts.

    Args:
        job_id: id of the job.
        tasks: number of tasks.
        request: what each asks for.
        at: when it was submitted.
    """

    def __init__(self, job_id: str, tasks: int, request: WorkRequest, at: datetime = START) -> None:
        self.job = Job(
            job_id=job_id,
            owner=request.owner,
            name=request.name,
            submitted_at=at,
            array=f"0-{tasks - 1}" if tasks > 1 else "",
            counts={"pending": tasks},
            gpus=request.gpus,
            labels=request.labels,
        )
        first = replace(self.job, request=asked(request))
        self.events = [JobEvent(kind=JobEventKind.SUBMITTED, time=at, job=first, version=1, planner="p")]
        self._states = dict.fromkeys(range(tasks), JobState.PENDING)

    def change(self, seconds: float, *tasks: JobTask) -> None:
        """Publish tasks as they are so many seconds after the job was submitted."""
        at = self.job.submitted_at + timedelta(seconds=seconds)
        self._states |= {task.index: task.state for task in tasks}
        found = list(self._states.values())
        counts = {state.value: found.count(state) for state in JobState if state in found}
        state = next(state for state in JobState if state in found)
        job = replace(self.job, counts=counts, state=state, labels={})
        self.events.append(
            JobEvent(
                kind=JobEventKind.CHANGED,
                time=at,
                job=job,
                version=len(self.events) + 1,
                tasks=list(tasks),
                planner="p",
            )
        )

    def run(self, index: int, attempt: int, times: Sequence[float], state: JobState, **part: Any) -> None:
        """Publish the start of an attempt and its end, if it has one.

        Args:
            index: of the task.
            attempt: number of the attempt.
            times: when it was queued, started and ended, in seconds after the job was submitted.
            state: of its end.
            **part: further fields of its `TaskPart`.
        """
        queued, started, *ended = (self.job.submitted_at + timedelta(seconds=at) for at in times)
        running = TaskPart(host="h1", state=JobState.RUNNING, started_at=started, executor="process", **part)
        task = JobTask(
            index=index,
            attempt=attempt,
            state=JobState.RUNNING,
            lease_id=lease_of(self.job.job_id, index, attempt),
            pending_since=queued,
            started_at=started,
            parts=[running],
        )
        self.change(times[1], task)
        if ended:
            code = None if state is JobState.PREEMPTED else int(state is JobState.FAILED)
            over = replace(running, state=state, exit_code=code, ended_at=ended[0])
            self.change(times[2], replace(task, state=state, exit_code=code, ended_at=ended[0], parts=[over]))

    def wait_again(self, index: int, attempt: int, seconds: float) -> None:
        """Publish that a task waits for a further attempt."""
        since = self.job.submitted_at + timedelta(seconds=seconds)
        self.change(seconds, JobTask(index=index, attempt=attempt, pending_since=since, message=f"attempt {attempt}"))


def lease_of(job_id: str, index: int, attempt: int) -> str:
    """Id of the lease of an attempt."""
    return f"lease-{job_id}-{index}-{attempt}"
