"""Records of jobs in the planner's bucket, and the ids by which leases belong to tasks.

`job.<id>` has the job as submitted. It is written once, so that its deletion is for good (`Store.purge`); records of a
job without it are of one that was forgotten. `job_state.<id>` has what changes of the job as a whole. A task has a
record `job_task.<id>.<index>` once it has left the state of those that were never started.

A task with a lease is found by the lease: its request id names task and attempt.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from ...schemas.work.jobs import Attempt, JobState, JobTask, SubmittedSpec

JOB_PREFIX: Final = "job."
STATE_PREFIX: Final = "job_state."
TASK_PREFIX: Final = "job_task."
NEXT_ID: Final = "jobs_next"
"""Key of the first job id that is not reserved."""
VERSIONS: Final = 1000
"""Number of versions of a job's events that a record of its state reserves."""
NOT_STARTED: Final = "released before anything was started"
"""Reason of the end of a lease that came when its task did not wait any more."""


class StoredJob(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job as submitted.

    Attributes:
        job_id: of the job.
        spec: as submitted.
        submitted_at: seconds since the epoch.
        group: of the owner.
        digest: of the submitted message, if it had a `submit_id`.
    """

    job_id: str
    spec: SubmittedSpec
    submitted_at: float
    group: str = ""
    digest: str = ""


class StoredState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of a job as a whole that changes.

    Attributes:
        versions: no event of the job has this version or a greater one.
        held: nothing of it is started.
        held_tasks: indexes of tasks that are held alone.
        rest: state of the tasks without a record.
        rest_message: why they are in that state.
        rest_ended_at: when they reached it, in seconds since the epoch; 0 if they wait.
        eligible: the jobs that it depends on have ended as asked.
        ended_at: when the last task ended, in seconds since the epoch; 0 before.
    """

    versions: int = VERSIONS
    held: bool = False
    held_tasks: list[int] = []
    rest: JobState = JobState.PENDING
    rest_message: str = ""
    rest_ended_at: float = 0.0
    eligible: bool = False
    ended_at: float = 0.0


class Ending(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State that a task gets once nothing of it runs any more, whatever its processes end with.

    Attributes:
        state: the state.
        message: why.
        signal: to send first; 0 for SIGTERM.
        final: true if it is not queued again, whatever the job allows.
        host_fault: true if it is queued again, whatever the job allows: a host could not start it, and none did.
    """

    state: JobState
    message: str = ""
    signal: int = 0
    final: bool = False
    host_fault: bool = False


class StoredTask(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A task that has been started, or has ended.

    Attributes:
        task: the task.
        ending: why it is being ended; null if it is not.
        requeue_of: id of the preempted lease whose work it goes on with; empty for none.
        queued_at: time from which it counts as waiting, in seconds since the epoch.
        last: its last attempt, as it ended, where it waits for a further one or is at it: a later leader publishes
            that once more, since this one may not have. Null for none.
    """

    task: JobTask
    ending: Ending | None = None
    requeue_of: str = ""
    queued_at: float = 0.0
    last: JobTask | None = None


_RUN_ID: Final = re.compile(r"(\d+)_(\d+)\.(\d+)")


def request_id(attempt: Attempt) -> str:
    """Id of the work request of an attempt."""
    return f"job-{attempt.job_id}_{attempt.task}-{attempt.number}"


def attempt_of_run(run_id: str) -> Attempt | None:
    """Attempt that a run is of, by its id; None if it is no such id."""
    found = _RUN_ID.fullmatch(run_id)
    return None if found is None else Attempt(found[1], int(found[2]), int(found[3]))


def job_key(job_id: str) -> str:
    """Key of a job as submitted."""
    return f"{JOB_PREFIX}{job_id}"


def state_key(job_id: str) -> str:
    """Key of the state of a job."""
    return f"{STATE_PREFIX}{job_id}"


def task_key(job_id: str, index: int) -> str:
    """Key of a task."""
    return f"{TASK_PREFIX}{job_id}.{index}"
