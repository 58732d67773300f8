"""The planner's side of the bus for jobs, as far as those who look at them need it: listings, commands, events, output.

A planner with real runners starts each task; here a test says what becomes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.planner.leases import lifecycle
from corral.schemas import codec, operations, subjects
from corral.schemas.requests import Error, Grant, Lease, WorkRequest
from corral.schemas.subjects import PlanSubject
from corral.schemas.values import globs
from corral.schemas.work.jobs import (
    FINAL,
    Job,
    JobAction,
    JobDetails,
    JobEvent,
    JobEventKind,
    JobFilter,
    JobListing,
    Jobs,
    JobSpec,
    JobState,
    JobTask,
    JobVerb,
    OverrideAction,
    TaskPart,
    array_indexes,
)
from corral.schemas.work.runs import LogChunk, run_id
from msgspec.structs import replace
from nats.aio.client import Client
from nats.aio.msg import Msg

HOST = "node1"
TASKS_OF_AN_EVENT = 500
FILE = "/var/lib/corral/runs/output.log"


class Kept:
    """A job with its tasks that have left pending."""

    def __init__(self, job_id: str, spec: JobSpec, ago_seconds: float) -> None:
        self.spec = spec
        self.indexes = list(array_indexes(spec))
        self.known = frozenset(self.indexes)
        self.tasks: dict[int, JobTask] = {}
        self.version = 0
        self.job = Job(
            job_id=job_id,
            owner=spec.request.owner,
            name=spec.request.name,
            group="lab",
            submitted_at=datetime.now(UTC) - timedelta(seconds=ago_seconds),
            array=spec.array,
            counts={"pending": len(self.indexes)},
            gpus=spec.request.gpus,
            hosts=spec.hosts,
        )

    def task(self, index: int) -> JobTask:
        return self.tasks.get(index) or JobTask(index=index, pending_since=self.job.submitted_at)

    def count(self, **fields: Any) -> None:
        found = Counter(task.state for task in self.tasks.values())
        found[JobState.PENDING] += len(self.indexes) - len(self.tasks)
        state = next(state for state in JobState if found[state])
        counts = {each.value: number for each, number in found.items() if number}
        ended = datetime.now(UTC) if state in FINAL else None
        self.job = replace(self.job, **{"counts": counts, "state": state, "ended_at": ended, **fields})


class FakeJobs:
    """Answers `plan.jobs`, `plan.job` and `plan.job_override`, and questions about a fleet of one host.

    Args:
        nc: its connection.

    Attributes:
        jobs: by id.
        leases: active ones.
        asked: number of questions by subject.
        given: commands, with the operator where it was one's.
    """

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.jobs: dict[str, Kept] = {}
        self.leases: list[Lease] = []
        self.queue: list[operations.QueueEntry] = []
        self.asked: Counter[str] = Counter()
        self.given: list[tuple[str, JobAction]] = []
        self.devices = [f"GPU-{HOST}-{index}" for index in range(4)]

    async def start(self) -> None:
        await ensure_layout(self.nc.jetstream())
        await self.nc.subscribe(f"{subjects.PLAN}.>", cb=self._on_request)
        await self.nc.flush()

    # What a test does

    async def submit(self, owner: str, ago_seconds: float = 60.0, gpus: int = 1, name: str = "", **spec: Any) -> str:
        job_id = str(len(self.jobs) + 1)
        made = JobSpec(request=WorkRequest(owner=owner, gpus=gpus, name=name), **spec)
        self.jobs[job_id] = Kept(job_id, made, ago_seconds)
        await self._publish(self.jobs[job_id], [], JobEventKind.SUBMITTED)
        return job_id

    async def change(self, job_id: str, *tasks: JobTask, silent: bool = False, **fields: Any) -> None:
        """Tasks are now as given; `silent` loses the event."""
        kept = self.jobs[job_id]
        kept.tasks |= {task.index: task for task in tasks}
        kept.count(**fields)
        kept.version += silent
        for first in range(0, 0 if silent else max(1, len(tasks)), TASKS_OF_AN_EVENT):
            await self._publish(kept, list(tasks[first : first + TASKS_OF_AN_EVENT]), JobEventKind.CHANGED)

    async def run(self, job_id: str, index: int = 0, attempt: int = 1, hosts: Sequence[str] = (HOST,)) -> Lease:
        """Start a task on the next free devices."""
        kept = self.jobs[job_id]
        held = {grant.device for lease in self.leases for grant in lease.grants}
        free = [uuid for uuid in self.devices if uuid not in held]
        request = replace(kept.spec.request, request_id=f"job-{job_id}_{index}-{attempt}", ttl_seconds=600)
        lease = lifecycle.grant(
            request,
            [
                Grant(host=HOST, device=uuid, index=self.devices.index(uuid), model="H100", memory_bytes=2**36)
                for uuid in free[: request.gpus]
            ],
            lease_id=f"l{job_id}x{index}x{attempt}",
            now=datetime.now(UTC),
            digest="d",
            planner="fake",
            environment={HOST: {}},
            service_seconds=0.0,
        ).lease
        self.leases.append(lease)
        now = datetime.now(UTC)
        parts = [
            TaskPart(
                host=host,
                rank=rank,
                state=JobState.RUNNING,
                started_at=now,
                executor="process",
                log_file=FILE,
                peak_memory_bytes=3 * 2**30,
            )
            for rank, host in enumerate(hosts)
        ]
        await self.change(
            job_id,
            JobTask(
                index=index,
                attempt=attempt,
                state=JobState.RUNNING,
                lease_id=lease.lease_id,
                parts=parts,
                started_at=now,
                pending_since=kept.job.submitted_at,
            ),
        )
        return lease

    async def end(self, job_id: str, index: int = 0, state: JobState = JobState.DONE, **fields: Any) -> None:
        """End a task that runs."""
        task = self.jobs[job_id].task(index)
        self.leases = [lease for lease in self.leases if lease.lease_id != task.lease_id]
        now = datetime.now(UTC)
        parts = [replace(part, state=state, ended_at=now, **fields) for part in task.parts]
        await self.change(job_id, replace(task, state=state, ended_at=now, parts=parts, **fields))

    async def prints(
        self, job_id: str, part: str, offset: int, data: bytes, index: int = 0, attempt: int = 1, ended: bool = False
    ) -> None:
        """A runner publishes a piece of what a task prints."""
        chunk = LogChunk(
            run_id=run_id(job_id, index, attempt), time=datetime.now(UTC), offset=offset, data=data, ended=ended
        )
        subject = subjects.log_subject(HOST, job_id, index, part, self.jobs[job_id].job.owner)
        await self.nc.jetstream().publish(subject, codec.encode(chunk))

    # What is asked

    async def _on_request(self, message: Msg) -> None:
        subject = message.subject
        self.asked[subject] += 1
        named = {PlanSubject.JOB: JobAction, PlanSubject.JOB_OVERRIDE: OverrideAction}
        if subject == PlanSubject.JOBS:
            answer: Any = self._list(codec.decode(message.data, JobFilter, codec.JSON))
        elif subject in named:
            asked: Any = codec.decode(message.data, named[subject], codec.JSON)
            answer = await self._act(asked)
        elif subject == PlanSubject.DEVICES:
            answer = operations.Devices(devices=self._statuses())
        elif subject == PlanSubject.FLEET:
            answer = operations.FleetSummary(hosts=1, devices=4, usable_devices=4, active_leases=len(self.leases))
        elif subject == PlanSubject.LEASES:
            answer = operations.Leases(leases=self.leases)
        elif subject == PlanSubject.QUEUE:
            answer = operations.Queue(entries=self.queue, total=len(self.queue))
        else:
            answer = Error(code="invalid", message=f"nothing answers {subject} here")
        await message.respond(codec.encode(answer, codec.JSON))

    def _statuses(self) -> list[operations.DeviceStatus]:
        held = {grant.device: lease.lease_id for lease in self.leases for grant in lease.grants}
        return [
            operations.DeviceStatus(
                uuid=uuid,
                host=HOST,
                index=index,
                model="H100",
                memory_total_bytes=2**36,
                share_free=0.0 if uuid in held else 1.0,
                leases=[held[uuid]] if uuid in held else [],
            )
            for index, uuid in enumerate(self.devices)
        ]

    def _list(self, only: JobFilter) -> Jobs:
        found = [kept for kept in reversed(self.jobs.values()) if _matches(kept.job, only)]
        total = len(found)
        if not only.tasks:
            last = None if only.limit is None else only.offset + only.limit
            return Jobs(jobs=[JobListing(job=kept.job) for kept in found[only.offset : last]], total=total)
        made: list[JobListing] = []
        for kept in found:
            indexes = [index for index in only.indexes if index in kept.known] if only.indexes else kept.indexes
            found_tasks = map(kept.task, indexes)
            tasks = [task for task in found_tasks if not only.task_states or task.state in only.task_states]
            last = None if only.limit is None else only.offset + only.limit
            made.append(JobListing(job=kept.job, tasks=tasks[only.offset : last], total_tasks=len(tasks)))
        return Jobs(jobs=made, total=total)

    async def _act(self, asked: JobAction | OverrideAction) -> JobDetails | Error:
        action, operator = (asked.action, asked.operator) if isinstance(asked, OverrideAction) else (asked, "")
        kept = self.jobs[action.job_id]
        if not operator and action.owner != kept.job.owner:
            return Error(code="not_owner", message=f"job {action.job_id} is not {action.owner}'s", field="$.owner")
        if action.verb is JobVerb.SHOW:
            return JobDetails(job=kept.job, spec=kept.spec)
        self.given.append((operator, action))
        indexes = action.indexes or kept.indexes
        changed: list[JobTask] = []
        if action.verb is JobVerb.CANCEL:
            now = datetime.now(UTC)
            going = [task for task in map(kept.task, indexes) if task.state not in FINAL]
            changed = [replace(task, state=JobState.CANCELLED, ended_at=now) for task in going]
            ended = {task.lease_id for task in changed}
            self.leases = [lease for lease in self.leases if lease.lease_id not in ended]
        elif action.verb is JobVerb.RESUBMIT:
            over = [task for task in map(kept.task, indexes) if task.state in FINAL - {JobState.DONE}]
            changed = [JobTask(index=task.index, attempt=task.attempt) for task in over]
        held = {JobVerb.HOLD: True, JobVerb.RELEASE: False}.get(action.verb, kept.job.held)
        await self.change(action.job_id, *changed, held=held)
        return JobDetails(job=kept.job, changed=len(changed))

    async def _publish(self, kept: Kept, tasks: list[JobTask], kind: JobEventKind) -> None:
        kept.version += 1
        event = JobEvent(kind=kind, time=datetime.now(UTC), job=kept.job, version=kept.version, tasks=tasks)
        subject = subjects.job_events_subject(kept.job.job_id)
        await self.nc.jetstream().publish(subject, codec.encode(event, codec.JSON))


def _matches(job: Job, only: JobFilter) -> bool:
    return (
        (not only.job_ids or job.job_id in only.job_ids)
        and (only.owner is None or job.owner == only.owner)
        and (not only.active or job.ended_at is None)
        and (not only.states or job.state in only.states)
        and (not only.name or globs.matches(job.name.lower(), only.name.lower()))
    )


class InThread:
    """`FakeJobs` in a loop of its own, for tests that drive a browser, whose loop is busy."""

    def __init__(self, fake: FakeJobs, loop: asyncio.AbstractEventLoop) -> None:
        self.fake = fake
        self._loop = loop

    def do(self, what: Callable[[FakeJobs], Awaitable[Any]]) -> Any:
        async def done() -> Any:
            return await what(self.fake)

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(20)


@contextlib.contextmanager
def fake_jobs(url: str) -> Iterator[InThread]:
    """A planner's side on a bus, in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> FakeJobs:
        fake = FakeJobs(await connect(url, name="fake-planner"))
        await fake.start()
        return fake

    made = InThread(asyncio.run_coroutine_threadsafe(start(), loop).result(20), loop)
    try:
        yield made
    finally:
        made.do(lambda fake: fake.nc.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
