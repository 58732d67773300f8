"""Durable records of jobs: written key by key, each with its latest value alone, and read at the begin of a term."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final

from msgspec import Struct
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from ....bus.permissions import NotAllowed
from ....bus.tasks import BackgroundTasks
from ....schemas import codec, subjects
from ...durable.store import Deposed, Store, WriteFailed, decode_or_none
from ...jobs.job import Job
from ...jobs.records import (
    JOB_PREFIX,
    NEXT_ID,
    STATE_PREFIX,
    TASK_PREFIX,
    StoredJob,
    StoredState,
    StoredTask,
    job_key,
    state_key,
)
from ...jobs.task import Task

log = logging.getLogger("corral.planner.broker.jobs.broker")

ID_BLOCK: Final = 100
"""Number of job ids that are reserved at a time."""
_RETRY_SECONDS: Final = 1.0
_GONE_SECONDS: Final = 1.0


class FoundJobs(Struct):
    """Records of jobs in the bucket, by key, not decoded.

    Attributes:
        jobs: jobs as submitted.
        states: states of jobs.
        tasks: tasks.
        next_id: first id that is not reserved; empty if there is none.
    """

    jobs: list[tuple[str, bytes]] = []
    states: list[tuple[str, bytes]] = []
    tasks: list[tuple[str, bytes]] = []
    next_id: bytes = b""

    def take(self, key: str, value: bytes) -> bool:
        """Take an entry of the bucket; false if it is none of jobs."""
        if key.startswith(TASK_PREFIX):
            self.tasks.append((key, value))
        elif key.startswith(STATE_PREFIX):
            self.states.append((key, value))
        elif key.startswith(JOB_PREFIX):
            self.jobs.append((key, value))
        elif key == NEXT_ID:
            self.next_id = value
        else:
            return False
        return True

    async def first_id(self, nc: Client, last_id: int) -> int:
        """First job id to give: after those that were reserved; if that is not known, after the last one published.

        Args:
            nc: connection of the planner.
            last_id: greatest id in the bucket.
        """
        reserved = decode_or_none(NEXT_ID, self.next_id, int)
        if reserved is not None:
            return max(reserved, last_id + 1)
        return max(last_id, await _last_published(nc)) + 1

    def decode(self) -> tuple[list[Job], set[str]]:
        """Decode the jobs with their tasks, the oldest first; and find the ids of those that were forgotten."""
        states = {
            key.removeprefix(STATE_PREFIX): found
            for key, value in self.states
            if (found := decode_or_none(key, value, StoredState)) is not None
        }
        jobs: dict[str, Job] = {}
        for key, value in self.jobs:
            stored = decode_or_none(key, value, StoredJob)
            if stored is not None:
                job = jobs[stored.job_id] = Job(stored, len(value), states.get(stored.job_id))
                # An event of any version below may have been published. The next one reserves further ones.
                job.version = job.versions - 1
        orphans = {job_id for job_id in states if job_id not in jobs}
        for key, value in self.tasks:
            job_id = key.removeprefix(TASK_PREFIX).partition(".")[0]
            job = jobs.get(job_id)
            if job is None:
                orphans.add(job_id)
            elif (task := decode_or_none(key, value, StoredTask)) is not None and job.has(task.task.index):
                job.put(Task.restored(task))
        return [jobs[job_id] for job_id in sorted(jobs, key=int)], orphans


async def _last_published(nc: Client) -> int:
    """Greatest id of the jobs that the stream has events of; 0 if it has none, or can't be read."""
    try:
        info = await nc.jetstream().stream_info(subjects.JOBS_STREAM, subjects_filter=f"{subjects.JOB_EVENTS}.*")
    except NotFoundError:
        return 0
    except (NatsError, TimeoutError) as error:
        log.warning("job ids begin anew: the stream %s can't be read: %r", subjects.JOBS_STREAM, error)
        return 0
    return max((int(subject.rpartition(".")[2]) for subject in info.state.subjects or ()), default=0)


class JobRecords:
    """Writes the records of one term.

    Args:
        store: the bucket.
        term: revision of the leader's key.
        deposed: called when a write was refused since another planner leads.
    """

    def __init__(self, store: Store, term: int, deposed: Callable[[], None]) -> None:
        self._store = store
        self._term = term
        self._deposed = deposed
        self._tasks = BackgroundTasks()
        self._values: dict[str, Callable[[], bytes]] = {}
        """What makes the newest value of the keys that are to be written."""
        self._saved: dict[str, asyncio.Event] = {}
        """Keys that are being written, or are to be."""

    def save(self, key: str, value: Callable[[], bytes]) -> None:
        """Write an entry, in place of a write of the key that has not begun.

        Args:
            key: of the entry.
            value: makes the value, when it is written.
        """
        self._values[key] = value
        if key not in self._saved:
            self._saved[key] = asyncio.Event()
            self._tasks.start(self._write(key))

    async def _write(self, key: str) -> None:
        try:
            while (make := self._values.pop(key, None)) is not None:
                try:
                    await self._store.put(key, make(), self._term)
                except Deposed:
                    raise
                except Exception as error:
                    unusual = not isinstance(error, WriteFailed | NatsError | OSError | TimeoutError)
                    log.warning("%s is not written yet: %r", key, error, exc_info=unusual)
                    self._values.setdefault(key, make)
                    await asyncio.sleep(_RETRY_SECONDS)
        except Deposed:
            self._deposed()
            await asyncio.Event().wait()  # nobody may take it for written; the end of the term cancels this
        self._saved.pop(key).set()

    def is_saved(self, key: str) -> bool:
        """True if a key has its newest value in the bucket."""
        return key not in self._saved

    async def saved(self, keys: Iterable[str]) -> None:
        """Wait until some keys have their newest values in the bucket."""
        for key in keys:
            while (event := self._saved.get(key)) is not None:
                await event.wait()

    async def put(self, key: str, value: bytes, *, once: bool = False) -> None:
        """Write an entry.

        Args:
            key: of the entry.
            value: of the entry.
            once: true for a key that is never written again.

        Raises:
            Deposed: another planner leads.
            WriteFailed: the bucket refused it.
        """
        await self._store.put(key, value, self._term, message_id=key if once else "")

    def forget(self, job_ids: Iterable[str]) -> None:
        """Start to delete all records of jobs."""
        for job_id in job_ids:
            self._tasks.start(self._forget(job_id))

    async def _forget(self, job_id: str) -> None:
        # The job first: without it, the others count for nothing, also where a server that is killed brings them back.
        for keys in (job_key(job_id), state_key(job_id), f"{TASK_PREFIX}{job_id}.*"):
            try:
                await self._store.purge(keys)
            except NotAllowed:
                if "*" not in keys:
                    await self._store.put(keys, b"", self._term, ttl_seconds=_GONE_SECONDS)
            except (NatsError, OSError, TimeoutError, Deposed, WriteFailed) as error:
                log.debug("job %s is not deleted yet: %r", job_id, error)  # a later term does
                return

    async def close(self) -> None:
        """End the writes that are in flight. Call it once the store has abandoned them."""
        await self._tasks.cancel()


def encoded(record: Struct) -> bytes:
    """A record as the bucket holds it."""
    return codec.encode(record, codec.JSON)
