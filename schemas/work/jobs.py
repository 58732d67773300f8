"""Jobs: commands that the planner queues, and that runners start on the hosts of their leases.

A job has one task, or one for each index of its array. A task waits for devices as a work request does; it runs under a
lease of its own, on one host or on several at once. Each time that it is started is an attempt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Final, NamedTuple, cast

from msgspec import Meta, Struct

from ..request_events import AskedRequest
from ..requests import Count, Identifier, Labels, OwnerName, ShortText, Time, WorkRequest
from ..values import names

MAX_TASKS: Final = 100_000
"""Limit on the tasks of a job."""
MAX_JOB_BYTES: Final = 512 * 1024
"""Limit on a submitted job as a message: script, arguments and environment together."""

JobId = Annotated[str, Meta(min_length=1, max_length=32, pattern=names.JOB)]
TaskIndex = Annotated[int, Meta(ge=0, le=2**31)]
Word = Annotated[str, Meta(max_length=131_072)]
"""As long as Linux takes one argument or variable (`MAX_ARG_STRLEN`, execve(2))."""
VariableName = Annotated[str, Meta(min_length=1, max_length=256)]


class JobState(StrEnum):
    """State of a task. That of a job is the first in this order that one of its tasks has.

    All from `failed` on are final.
    """

    RUNNING = "running"
    """Its processes run."""
    COMPLETING = "completing"
    """Its command has ended; what it has left behind is being ended, and its devices are not free yet."""
    STARTING = "starting"
    """It has its lease, and its runner was told to start it."""
    PENDING = "pending"
    """It waits for devices, for other jobs, or since it is held."""
    LOST = "lost"
    """Its host has vanished, or its runner knows nothing of it: how it ended is unknown."""
    FAILED = "failed"
    """It ended with another exit code than 0, by a signal, at its time limit, or could not be started."""
    PREEMPTED = "preempted"
    """Its lease was preempted or evicted, and it is not queued again."""
    CANCELLED = "cancelled"
    """Its owner or an operator cancelled it, or a job that it depends on did not end as asked."""
    DONE = "done"
    """It ended with 0."""


FINAL: Final = frozenset({JobState.LOST, JobState.FAILED, JobState.PREEMPTED, JobState.CANCELLED, JobState.DONE})
"""States that a task does not leave, unless it is submitted again."""


class Condition(StrEnum):
    """Ends of a job after which another may start."""

    OK = "ok"
    """All its tasks are done."""
    FAILED = "failed"
    """It has ended, and not all its tasks are done."""
    ANY = "any"
    """It has ended."""


class Dependency(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A job that must end first.

    Attributes:
        job_id: id of the job, of any owner.
        condition: how it must end. Once it has ended otherwise, the job that depends on it is cancelled.
    """

    job_id: JobId
    condition: Condition = Condition.OK


class JobSpec(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A job to queue.

    Attributes:
        request: what each task needs. Its owner is the job's. `wait_seconds`, `ttl_seconds`, `request_id`, `holder`,
            `requeue_of` and `distribution` are the planner's, and must be left out.
        command: words of the command; empty with a script. It is executed without a shell.
        script: contents of a script, which the runner writes to a file and executes; empty with a command. Its first
            line names the interpreter (`#!/bin/bash`).
        arguments: of the script.
        environment: variables to set. Only the owner, operators and the runner see them.
        directory: working directory on the host, absolute; empty for the home of the account.
        group: group that the job is charged to: the one of its owner, or one around that; any other is refused. Empty
            for the owner's, whichever it is.
        output: file on the host for what the command prints, absolute or relative to the working directory, with `%j`
            for the job's id and `%a` for the index; empty for a file of the runner's.
        image: container image to run the command in; empty for none.
        array: indexes of the tasks: `0-99`, `1,3,5-9`, `0-98:2`; with `%10` behind it at most 10 run at a time. Empty
            for one task.
        after: jobs that must end first.
        retries: number of times that a task that failed is started again.
        requeue: a task whose lease was preempted, or whose host was lost, is queued again, in its place.
        hosts: number of hosts of each task. All of them start it, or none; each has the same number of devices, unless
            the request names them: a task then waits until all of these are free, without a place in the queue.
        tasks_per_host: number of processes that are started on each host.
        held: it is not started before it is released.
        preempt_signal: signal for the processes at the notice of a preemption, such as `SIGUSR1`; empty for none.
        grace_seconds: time between SIGTERM and SIGKILL when it is stopped.
        submit_id: idempotency key: the same id with the same body gets the same answer. Null for none.
    """

    request: WorkRequest
    command: Annotated[list[Word], Meta(max_length=4096)] = []
    script: Annotated[str, Meta(max_length=MAX_JOB_BYTES)] = ""
    arguments: Annotated[list[Word], Meta(max_length=4096)] = []
    environment: Annotated[dict[VariableName, Word], Meta(max_length=4096)] = {}
    directory: Annotated[str, Meta(max_length=4096)] = ""
    group: Annotated[str, Meta(max_length=128)] = ""
    output: Annotated[str, Meta(max_length=4096)] = ""
    image: ShortText = ""
    array: Annotated[str, Meta(max_length=4096)] = ""
    after: Annotated[list[Dependency], Meta(max_length=256)] = []
    retries: Annotated[int, Meta(ge=0, le=1000)] = 0
    requeue: bool = False
    hosts: Annotated[int, Meta(ge=1, le=1024)] = 1
    tasks_per_host: Annotated[int, Meta(ge=1, le=1024)] = 1
    held: bool = False
    preempt_signal: Annotated[str, Meta(max_length=16)] = ""
    grace_seconds: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    submit_id: Identifier | None = None


class SubmittedSpec(JobSpec, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=False):
    """A job as it was submitted. Fields of a later version are ignored, so that an older runner takes its orders."""

    request: AskedRequest


def submitted(spec: JobSpec) -> SubmittedSpec:
    """A job as it was submitted. To encode, not to look at its type."""
    return cast(SubmittedSpec, spec)


class Array(NamedTuple):
    """Indexes of an array.

    Attributes:
        indexes: in ascending order, each once.
        most_running: limit on the tasks that have a lease at a time; 0 for none.
    """

    indexes: tuple[int, ...]
    most_running: int = 0


_RANGE: Final = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def parse_array(text: str) -> Array:
    """Parse the indexes of an array, as `JobSpec.array` describes them.

    Raises:
        ValueError: it is none, or has more than `MAX_TASKS` indexes.
    """
    ranges, _, limit = text.partition("%")
    if (limit and not limit.isdecimal()) or limit == "0" or text.endswith("%"):
        raise ValueError(f"{text!r}: behind % goes how many tasks may run at a time, as in 0-99%10")
    found: set[int] = set()
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part!r} is no range of indexes: write 0-99, 1,3,5-9 or 0-98:2")
        first, last, step = (int(each) if each is not None else None for each in match.groups())
        assert first is not None
        if step == 0 or (last is not None and last < first):
            raise ValueError(f"{part!r} has no index: write the smaller one first, and a step of at least 1")
        some = range(first, (first if last is None else last) + 1, step or 1)
        if len(some) > MAX_TASKS or some[-1] > 2**31:
            raise ValueError(f"{part!r}: an array has at most {MAX_TASKS} tasks, with indexes up to {2**31}")
        found.update(some)
    if len(found) > MAX_TASKS:
        raise ValueError(f"an array has at most {MAX_TASKS} tasks; this has {len(found)}")
    return Array(tuple(sorted(found)), int(limit or 0))


def task_name(job_id: str, index: int | None) -> str:
    """Name of a task as people write it: `1234_7`; `1234` where the job is no array."""
    return job_id if index is None else f"{job_id}_{index}"


def parse_task_name(text: str) -> tuple[str, int | None]:
    """Job id and index of `1234_7`; no index of `1234`.

    Raises:
        ValueError: it is neither.
    """
    job_id, line, index = text.partition("_")
    if not job_id.isdecimal() or (line and not index.isdecimal()):
        raise ValueError(
            f"{text!r} is no job: write its id, such as 1234, or that of a task of an array, such as 1234_7"
        )
    return job_id, int(index) if line else None


class Attempt(NamedTuple):
    """A start of a task.

    Attributes:
        job_id: id of the job.
        task: index of the task; 0 for a job without an array.
        number: of the start, from 1.
    """

    job_id: str
    task: int
    number: int


_ATTEMPT: Final = re.compile(r"job-(\d{1,32})_(\d{1,10})-(\d{1,10})")


def attempt_of_request(request_id: str | None) -> Attempt | None:
    """Attempt that a request, and so its lease, is for: `job-<job>_<index>-<attempt>`; None for a request of no job."""
    found = _ATTEMPT.fullmatch(request_id or "")
    return None if found is None else Attempt(found[1], int(found[2]), int(found[3]))


class TaskPart(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Part of a task that runs on one host.

    Attributes:
        host: of its devices.
        rank: of the host among those of the task, from 0.
        state: of its processes.
        exit_code: of the command; null while it runs, and where a signal ended it.
        signal: that ended the command; null if none did.
        started_at: when its processes started; null before.
        ended_at: when the last of them had ended; null before.
        peak_memory_bytes: most RAM of its processes together; 0 if unknown.
        cpu_seconds: CPU time of its processes; 0 if unknown.
        executor: what confines it: `process`, `systemd`, `podman`, `docker`.
        log_bytes: size of what it has printed.
        log_file: of that, on the host; empty in listings if the job names one, which only its owner may see.
        message: what went wrong, in words; empty if nothing did.
    """

    host: str
    rank: int = 0
    state: JobState = JobState.STARTING
    exit_code: int | None = None
    signal: int | None = None
    started_at: Time | None = None
    ended_at: Time | None = None
    peak_memory_bytes: int = 0
    cpu_seconds: float = 0.0
    executor: str = ""
    log_bytes: int = 0
    log_file: str = ""
    message: str = ""


class JobTask(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A task of a job, at its last attempt.

    Attributes:
        index: in the array; 0 for a job without one.
        attempt: number of its starts; 0 before the first.
        state: of the attempt.
        lease_id: of the attempt; empty before it has one.
        parts: by host, in the order of their ranks.
        exit_code: of the task: 0, or that of the first part that failed; null while it runs, or where a signal ended
            that.
        signal: that ended that part; null if none did.
        pending_since: when it was queued last.
        started_at: when its first process of the attempt started; null before.
        ended_at: when it reached a final state; null before.
        progress: 0 to 1, as it says itself; null if it doesn't.
        message: why it waits, or ended as it did; empty if there is nothing to say.
        retries_left: how often it is started again if it fails.
    """

    index: int
    attempt: int = 0
    state: JobState = JobState.PENDING
    lease_id: str = ""
    parts: list[TaskPart] = []
    exit_code: int | None = None
    signal: int | None = None
    pending_since: Time | None = None
    started_at: Time | None = None
    ended_at: Time | None = None
    progress: float | None = None
    message: str = ""
    retries_left: int = 0


class Job(Struct, frozen=True, kw_only=True, tag="job", tag_field="type"):
    """A job as everyone may see it: without command, script, environment and files.

    Attributes:
        job_id: a decimal number.
        owner: of the job.
        name: of the workload.
        group: of the owner; empty without groups.
        state: of all its tasks together, see `JobState`.
        submitted_at: when the planner received it.
        ended_at: when its last task ended; null before.
        array: as submitted; empty without.
        counts: number of tasks by state, without those that are 0.
        gpus: devices of each task.
        hosts: hosts of each task.
        tasks_per_host: processes on each host.
        held: true if nothing of it is started until it is released.
        after: jobs that must end first.
        labels: of the request.
        progress: mean over its tasks, those that are done counting as 1; null if none says any.
        message: why it waits or ended as it did; empty if there is nothing to say.
        request: what each task asks for (`request_events.asked`).
        warnings: in an answer: fields that this planner does not know and has ignored.
    """

    job_id: str
    owner: str
    name: str = ""
    group: str = ""
    state: JobState = JobState.PENDING
    submitted_at: Time
    ended_at: Time | None = None
    array: str = ""
    counts: dict[str, int] = {}
    gpus: int = 0
    hosts: int = 1
    tasks_per_host: int = 1
    held: bool = False
    after: list[Dependency] = []
    labels: Labels = {}
    progress: float | None = None
    message: str = ""
    request: AskedRequest | None = None
    warnings: list[str] = []


class JobFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """List jobs; without fields all that have not ended, and those that ended lately, the newest first.

    Attributes:
        job_ids: only these.
        owner: only of this owner.
        states: only in these states.
        name: glob over names.
        active: only jobs that have not ended.
        tasks: with their tasks.
        indexes: only the tasks with these indexes.
        task_states: only tasks in these states.
        offset: of the first job listed; with `tasks` and one job, of its first task.
        limit: most jobs listed; with `tasks` and one job, most of its tasks.
    """

    job_ids: Annotated[list[JobId], Meta(max_length=1024)] = []
    owner: OwnerName | None = None
    states: list[JobState] = []
    name: ShortText = ""
    active: bool = False
    tasks: bool = False
    indexes: Annotated[list[TaskIndex], Meta(max_length=1024)] = []
    task_states: list[JobState] = []
    offset: Count = 0
    limit: Annotated[int, Meta(ge=1, le=2**53)] | None = None


class JobListing(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job with its tasks.

    Attributes:
        job: the job.
        tasks: its tasks, in the order of their indexes; empty unless they were asked for.
        total_tasks: number of tasks that match, whether listed or not.
    """

    job: Job
    tasks: list[JobTask] = []
    total_tasks: int = 0


class Jobs(Struct, frozen=True, kw_only=True, tag="jobs", tag_field="type"):
    """Jobs of the planner.

    Attributes:
        jobs: cut at the size of a message, and then shorter than `total`.
        total: number of jobs that match.
        warnings: fields of the message that this planner does not know and has ignored.
    """

    jobs: list[JobListing]
    total: int = 0
    warnings: list[str] = []


class JobVerb(StrEnum):
    """Command about a job."""

    CANCEL = "cancel"
    """End it, or take it from the queue."""
    HOLD = "hold"
    """Keep what waits of it from being started."""
    RELEASE = "release"
    """Let what is held wait for devices again."""
    RESUBMIT = "resubmit"
    """Queue tasks that have ended again, as a further attempt."""
    SHOW = "show"
    """Change nothing, and answer with the job as it was submitted."""


class JobAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A command about a job.

    Attributes:
        job_id: id of the job.
        owner: of the job; for an operator's command, of whoever it is.
        verb: what to do.
        indexes: only these tasks of an array; empty for all (for `resubmit`: all that have ended, and are not done).
        reason: why, for the history.
        signal: for `cancel`: signal to send first, in place of SIGTERM; empty for that.
    """

    job_id: JobId
    owner: OwnerName | None = None
    verb: JobVerb
    indexes: Annotated[list[TaskIndex], Meta(max_length=MAX_TASKS)] = []
    reason: ShortText = ""
    signal: Annotated[str, Meta(max_length=16)] = ""


class OverrideAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """An operator's command about a job of anybody.

    Attributes:
        operator: who gives it.
        action: the command.
    """

    operator: OwnerName
    action: JobAction


class JobDetails(Struct, frozen=True, kw_only=True, tag="job_details", tag_field="type"):
    """Answer to a command about a job, for its owner or an operator.

    Attributes:
        job: after the command.
        spec: as submitted; null unless the command was `show`.
        changed: number of tasks that the command has changed.
        warnings: fields of the message that this planner does not know and has ignored.
    """

    job: Job
    spec: SubmittedSpec | None = None
    changed: int = 0
    warnings: list[str] = []


class JobEventKind(StrEnum):
    """Kind of a job's event."""

    SUBMITTED = "submitted"
    CHANGED = "changed"
    """Tasks have another state; or the job is held, released or has ended."""


class JobEvent(Struct, frozen=True, kw_only=True, tag="job_event", tag_field="type"):
    """Change of a job and of some of its tasks, as JSON. By `version` one that comes again, or late, changes nothing.

    Attributes:
        kind: kind of the change.
        time: when it happened.
        job: after the change. Events of kind `changed` leave out `request` and `labels`.
        version: number of the change of this job, from 1; it grows with each.
        tasks: tasks that have changed, each as it is now.
        planner: id of the planner.
    """

    kind: JobEventKind
    time: Time
    job: Job
    version: int
    tasks: list[JobTask] = []
    planner: str = ""


def array_indexes(spec: JobSpec) -> Iterator[int]:
    """Indexes of a job's tasks; 0 alone for a job without an array."""
    yield from parse_array(spec.array).indexes if spec.array else (0,)
