"""Events of jobs: each job that has changed is published soon, with the tasks that have, as they are then.

What the stream has not acknowledged is published again, as it is then. So little is kept while the stream takes none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ....bus.permissions import NotAllowed, request
from ....schemas import codec, subjects
from ....schemas.work.jobs import JobEvent, JobEventKind, JobTask
from ...jobs.job import Job
from ...jobs.listing import listed, public, task_of
from ...jobs.records import state_key
from .records import JobRecords, encoded

log = logging.getLogger("corral.planner.broker.jobs.broker")

LINGER_SECONDS: Final = 0.05
"""Time for which a change waits for others of the same job."""
TASKS_MOST: Final = 500
"""Limit on the tasks of an event."""
_AT_ONCE: Final = 16
_ACK_SECONDS: Final = 5.0
_REFUSED_SECONDS: Final = 60.0
"""Time for which nothing is published once the server did not permit it."""


class JobEvents:
    """Publishes the events of one term.

    Args:
        nc: connection of the planner.
        planner: id of this planner.
        records: reserves versions.
        max_bytes: size limit of an event.
        job: returns a job by its id; None if it was forgotten.
    """

    def __init__(
        self, nc: Client, planner: str, records: JobRecords, max_bytes: int, job: Callable[[str], Job | None]
    ) -> None:
        self._nc = nc
        self._planner = planner
        self._records = records
        self._max_bytes = max_bytes
        self._job = job
        self._changed: dict[str, set[int]] = {}
        self._ended: dict[str, list[JobTask]] = {}
        self._added = asyncio.Event()
        self._refused_at = -_REFUSED_SECONDS

    def add(self, job_id: str, indexes: Iterable[int] = (), ended: Sequence[JobTask] = ()) -> None:
        """Publish that a job has changed, and some of its tasks.

        Args:
            job_id: of the job.
            indexes: of the tasks.
            ended: attempts that have ended, of tasks that are at a further one now.
        """
        if ended:
            self._ended.setdefault(job_id, []).extend(ended)
        self._changed.setdefault(job_id, set()).update(indexes)
        self._added.set()

    async def publish_added(self) -> float:
        """Wait for changes and publish them; returns the seconds until the next time.

        Raises:
            NatsError, TimeoutError: the stream did not acknowledge; the changes stay for the next time.
        """
        if not self._changed:
            self._added.clear()
            await self._added.wait()
            await asyncio.sleep(LINGER_SECONDS)
        await self.flush()
        return 0.0

    async def flush(self) -> None:
        """Publish all changes.

        Raises:
            NatsError, TimeoutError: as `publish_added`.
        """
        if time.monotonic() - self._refused_at < _REFUSED_SECONDS:
            self._changed.clear()
            self._ended.clear()
        changed, self._changed = self._changed, {}
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(job_id: str, indexes: set[int]) -> None:
            async with gate:
                try:
                    await self._publish(job_id, indexes)
                except BaseException:
                    self.add(job_id, indexes)
                    raise

        results = await asyncio.gather(*(one(*each) for each in changed.items()), return_exceptions=True)
        for error in results:
            if isinstance(error, NotAllowed):
                if self._refused_at < 0:
                    log.warning("%s: jobs are not in the history until `corral auth apply`", error)
                self._refused_at = time.monotonic()
                self._changed.clear()
                self._ended.clear()
            elif error is not None:
                raise error

    async def _publish(self, job_id: str, indexes: set[int]) -> None:
        job = self._job(job_id)
        ended = self._ended.pop(job_id, [])
        if job is None:
            return
        try:
            await self._publish_tasks(job, [*ended, *sorted(indexes)])
        except BaseException:
            self.add(job_id, (), ended)
            raise

    async def _publish_tasks(self, job: Job, left: list[JobTask | int]) -> None:
        """Publish tasks: those that are given by their index as they are now."""
        job_id = job.job_id
        while True:
            count = min(TASKS_MOST, len(left))
            reserved, new = job.versions, not job.announced
            version = job.next_version()
            if job.versions != reserved:
                self._records.save(state_key(job_id), lambda: encoded(job.to_store()))
                await self._records.saved([state_key(job_id)])
            while True:
                event = JobEvent(
                    kind=JobEventKind.SUBMITTED if new else JobEventKind.CHANGED,
                    time=datetime.now(UTC),
                    job=listed(job, brief=not new),
                    version=version,
                    tasks=[task_of(job, each) if isinstance(each, int) else public(job, each) for each in left[:count]],
                    planner=self._planner,
                )
                data = codec.encode(event, codec.JSON)
                if len(data) <= self._max_bytes or count <= 1:
                    break
                count //= 2
            await self._send(job_id, data)
            job.announced = True
            left = left[count:]
            if not left:
                return

    async def _send(self, job_id: str, data: bytes) -> None:
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
        subject = subjects.job_events_subject(job_id)
        ack = await request(self._nc, subject, data, timeout=_ACK_SECONDS, headers=headers)
        if b'"error"' in ack.data:
            raise NatsError(ack.data.decode(errors="replace"))
