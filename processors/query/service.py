"""SQL over the bus: the micro service `corral-history`.

A query waits in a queue (`fairqueue.py`) and runs in a thread of low priority (`execution.py`) once the guard
has checked it (`guard/`). Its answer is sent in parts (`delivery.py`), which wait for their reader without a slot
(`spool.py`).
Slots, memory and time are bounded, so that no query can stop ingest, which shares the process and the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Final

from duckdb import DuckDBPyConnection
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, EndpointStats, Service, ServiceConfig

from ...bus.permissions import with_name
from ...bus.process import resident_bytes, service_version
from ...bus.tasks import BackgroundTasks
from ...schemas import codec, replies, subjects
from ...schemas.query import END_HEADER, PART_HEADER, Cancelled, CancelRequest, ProcessorStatus, QueryEnd, QueryRequest
from ...schemas.requests import Error
from .delivery import Answer, header
from .execution import SET_BACK, Execution, timed_out
from .fairqueue import FairQueue
from .guard.errors import QueryError
from .guard.guard import SqlGuard
from .results import CONTENT_TYPES
from .spool import Room, SpoolRoom

log = logging.getLogger("corral.query")

HEADER_ROOM_BYTES: Final = 8192
TICK_SECONDS: Final = 0.05
GROWN_BYTES: Final = 64 * 2**20
"""A query during which the process has grown by less than this is not ended for the memory of the process."""
NICENESS: Final = 10
ACROSS: Final = "_R_"
"""First token of the reply subjects that the server generates for requests from another account."""
STOP_SECONDS: Final = 2.0


class Limits(Struct, frozen=True, kw_only=True):
    """Limits of all queries together.

    Attributes:
        slots: queries that run at the same time.
        per_asker: the same of one asker (`asker_of`); less than `slots`, so that one asker can't fill them all.
        express: additional queries, each the first of an asker with none running.
        express_seconds: a query in an express slot that takes longer is requeued if another one could run there.
        waiting: queries in the queue; more are answered `busy`, those of the asker with the most first.
        resident_bytes: memory of the whole process above which the youngest query that has added to it is ended; None
            for 90% of the memory of the machine or its control group (DuckDB's own limit is 80%).
        acknowledge_seconds: a reader that takes no part for this time while its query runs is given up.
        reading_seconds: the same once the answer is computed.
        blocked_seconds: a reader may block a query whose answer has no room left for this time, and a second more for
            each MiB that was sent.
        room: for answers that wait for their readers.
    """

    slots: int = 4
    per_asker: int = 2
    express: int = 1
    express_seconds: float = 2.0
    waiting: int = 64
    resident_bytes: int | None = None
    acknowledge_seconds: float = 30.0
    reading_seconds: float = 600.0
    blocked_seconds: float = 10.0
    room: Room = Room()


class QueryService:
    """Answers queries over one database.

    Args:
        nc: connection to the bus.
        connect: gives a new cursor on the database; called from several threads.
        processor: id of this processor, a subject token.
        status: what `history.status` answers.
        limits: see `Limits`.
        private: tables that readers should not see.
        spool: folder for answers that wait for their readers; the system's for temporary files by default.
        reading: gives the context of a query, in which what was received before is stored.
    """

    def __init__(
        self,
        nc: Client,
        connect: Callable[[], DuckDBPyConnection],
        *,
        processor: str = "processor",
        status: Callable[[], ProcessorStatus] | None = None,
        limits: Limits | None = None,
        private: Sequence[str] = (),
        spool: Path | None = None,
        reading: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._nc = nc
        self._connect = connect
        self._reading = reading
        self._processor = subjects.host_token(processor)
        self._instance = secrets.token_hex(8)
        self._status = status or (lambda: ProcessorStatus(processor=self._processor))
        self._limits = limits or Limits()
        self._resident_bytes = self._limits.resident_bytes or memory_of_this_machine() * 9 // 10
        self._guard = SqlGuard(connect, private)
        self._queue: FairQueue[Execution] = FairQueue(
            self._limits.slots, self._limits.per_asker, self._limits.waiting, self._limits.express
        )
        self._room = SpoolRoom(self._limits.room, spool)
        threads = self._limits.slots + self._limits.express
        self._threads = ThreadPoolExecutor(threads, "query", initializer=_lower_priority)
        self._running: dict[Execution, asyncio.Task[None]] = {}
        self._by_id: dict[str, Execution] = {}
        self._answers: dict[str, Answer] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        self._service: Service | None = None
        self._watch: asyncio.Task[None] | None = None
        self._background = BackgroundTasks()
        self._counts = {"answered": 0, "failed": 0, "busy": 0}
        self._stopping = False
        self._busy = asyncio.Event()
        """Set while queries run or wait."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of queries since the start, by outcome."""
        return self._counts

    @property
    def running(self) -> int:
        """Number of running queries."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Number of queries in the queue."""
        return len(self._queue)

    async def start(self) -> None:
        """Start the micro service and the watch over running queries."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._guard.start)
        service = await add_service(
            self._nc,
            ServiceConfig(
                name=subjects.HISTORY_SERVICE,
                version=service_version(),
                description="SQL over the fleet's history",
                metadata={"processor": self._processor},
                stats_handler=self._stats,
            ),
        )
        self._service = service
        # Any processor may answer a query; only the one that runs it can cancel it, so all receive cancellations.
        own = f"q-{self._instance}"
        for config in (
            EndpointConfig(name="query", subject=subjects.QUERY, handler=self._on_query),
            EndpointConfig(name="query-owned", subject=f"{subjects.QUERY}.*", handler=self._on_query),
            EndpointConfig(name="query-delegated", subject=f"{subjects.QUERY}.*.*", handler=self._on_query),
            # A name at the end of these two is allowed, and changes nothing.
            EndpointConfig(name="cancel", subject=subjects.QUERY_CANCEL, handler=self._on_cancel, queue_group=own),
            EndpointConfig(
                name="cancel-owned", subject=f"{subjects.QUERY_CANCEL}.>", handler=self._on_cancel, queue_group=own
            ),
            EndpointConfig(name="status", subject=subjects.HISTORY_STATUS, handler=self._on_status),
            EndpointConfig(name="status-owned", subject=f"{subjects.HISTORY_STATUS}.>", handler=self._on_status),
        ):
            await service.add_endpoint(config)
        for subject in (subjects.QUERY, subjects.SNAPSHOT, subjects.SNAPSHOT_READ):
            told = Error(code="refused", message=with_name(subject, "user"))
            name = f"{subject.rpartition('.')[2]}-unnamed"
            handler = partial(_respond, answer=told)
            await service.add_endpoint(EndpointConfig(name=name, subject=subjects.unnamed(subject), handler=handler))
        await self._nc.subscribe(f"{subjects.QUERY_ACK}.{self._instance}.*", cb=self._on_ack)
        self._watch = asyncio.create_task(self._watch_over())

    async def stop(self) -> None:
        """End all queries and stop listening."""
        self._stopping = True
        if self._service is not None:
            # It waits for an answer of the server per subject, which never comes if the server is gone.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._service.stop()
        stopping = QueryError("unavailable", "the processor is stopping: ask again in a moment")
        for execution in self._queue.remove_if(lambda _: True):
            await self._fail(execution, stopping)
        for execution in self._running:
            execution.stop(stopping.code, str(stopping))
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=5)
        for answer in list(self._answers.values()):
            answer.end(stopping)
        if self._deliveries:
            await asyncio.wait(list(self._deliveries), timeout=STOP_SECONDS)
        for delivery in list(self._deliveries):
            delivery.cancel()
        if self._watch is not None:
            self._watch.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._guard.close()

    async def _on_query(self, request: Request) -> None:
        message = _message(request)
        if not message.reply:
            return
        content = replies.asked_in(message.headers)
        refuse = partial(self._refuse, message.reply, content)
        try:
            content = codec.content_type(message.headers)
            asked, warnings = codec.decode_request(message.data, QueryRequest, content)
        except codec.DecodeError as error:
            await refuse(QueryError(error.code, str(error)), field=error.field)
            return
        execution = Execution(asked, asker_of(message.subject, message.reply), message.reply, content)
        execution.warnings = warnings
        if asked.query_id is not None:
            if asked.query_id in self._by_id:
                await refuse(QueryError("invalid", f"query_id {asked.query_id!r} is in use"), field="$.query_id")
                return
            self._by_id[asked.query_id] = execution
        left = None if self._stopping else self._queue.put(execution.asker, execution)
        for one in [execution] if left is None else left:
            self._counts["busy"] += 1
            await self._fail(one, QueryError("busy", f"{len(self._queue)} queries wait already: ask again later"))
        self._start_next()

    def _start_next(self) -> None:
        self._busy.set()
        while (turn := self._queue.take()) is not None:
            execution = turn.entry
            execution.express = turn.express
            self._running[execution] = asyncio.create_task(self._run(execution))

    async def _run(self, execution: Execution) -> None:
        """Run one query. Its slot is freed when the answer is computed, not when it is read."""
        loop = asyncio.get_running_loop()
        subject = f"{subjects.QUERY_ACK}.{self._instance}.{secrets.token_hex(8)}"
        answer = Answer(execution, subject, self._room, express=execution.express)
        self._answers[subject] = answer
        delivery = asyncio.create_task(self._deliver(answer))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)
        put = partial(answer.put, blocked_seconds=self._limits.blocked_seconds)
        execution.resident_bytes = resident_bytes()
        part_bytes = max(1024, self._nc.max_payload - HEADER_ROOM_BYTES)
        failure: QueryError | None = None
        try:
            async with self._reading():
                await loop.run_in_executor(self._threads, execution.run, self._connect, self._guard, put, part_bytes)
        except QueryError as error:
            failure = error
        except Exception:
            log.exception("a query failed: %s", execution.request.sql[:500], extra={"subject": subjects.QUERY})
            failure = QueryError("internal", "the processor's log says why")
        finally:
            del self._running[execution]
            self._queue.done(execution.asker, execution.express)
            if failure is not None and failure.code == SET_BACK:
                try:
                    execution.check_stopped()
                except QueryError as error:  # it may have been cancelled meanwhile
                    failure = error
            if failure is not None and failure.code == SET_BACK:
                self._set_back(execution)
                delivery.cancel()
            answer.end(failure)
            self._start_next()

    def _set_back(self, execution: Execution) -> None:
        again = execution.again()
        if execution.request.query_id is not None:
            self._by_id[execution.request.query_id] = again
        self._queue.set_back(again.asker, again)

    async def _deliver(self, answer: Answer) -> None:
        execution = answer.execution
        try:
            await answer.deliver(
                partial(self._publish, answer), self._limits.acknowledge_seconds, self._limits.reading_seconds
            )
            self._counts["answered"] += 1
        except QueryError as error:
            execution.stop(error.code, str(error))
            await self._fail(execution, error, answer.parts)
        except Exception as error:  # the connection may be gone, and the asker with it
            execution.stop("unavailable", f"the answer can't be sent: {error}")
        finally:
            answer.close()
            del self._answers[answer.subject]
            self._forget(execution)

    async def _publish(self, answer: Answer, part: bytes, number: int, end: QueryEnd | None) -> None:
        request = answer.execution.request
        headers = {PART_HEADER: str(number), codec.CONTENT_TYPE_HEADER: CONTENT_TYPES[answer.execution.format]}
        if end is not None:
            headers[END_HEADER] = header(end)
            if end.warnings:
                headers[codec.WARNINGS_HEADER] = codec.warnings_header(end.warnings)
        reply = answer.subject if request.window else ""
        await self._nc.publish(answer.execution.reply, part, reply=reply, headers=headers)

    async def _on_ack(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is None:
            return
        if (message.headers or {}).get("Status") == "503":
            # The server reports that there is no subscriber for a part.
            answer.execution.stop("cancelled", "the asker has gone")
        answer.acknowledge()

    async def _on_cancel(self, request: Request) -> None:
        # In a separate task, since messages of a subscription are handled one by one.
        self._background.start(self._cancel(request))

    async def _cancel(self, request: Request) -> None:
        message = _message(request)
        try:
            asked, warnings = codec.decode_request(message.data, CancelRequest, codec.content_type(message.headers))
        except codec.DecodeError as error:
            await _respond(request, Error(code=error.code, message=str(error), field=error.field))
            return
        execution = self._by_id.get(asked.query_id)
        if execution is None:
            # Another processor may know it, and answers at once.
            await asyncio.sleep(0.3)
            error = Error(code="not_found", message=f"no query {asked.query_id!r} runs or waits")
            await _respond(request, error)
            return
        execution.stop("cancelled", "the query was cancelled")
        for answer in self._answers.values():
            if answer.execution is execution:
                answer.look()
        await _respond(request, Cancelled(query_id=asked.query_id, warnings=warnings), warnings)
        if self._queue.remove(execution):
            await self._fail(execution, QueryError("cancelled", "the query was cancelled"))

    async def _on_status(self, request: Request) -> None:
        await _respond(request, self._status())

    async def _fail(self, execution: Execution, error: QueryError, parts: int = 0) -> None:
        self._counts["failed"] += 1
        self._forget(execution)
        await self._refuse(execution.reply, execution.content_type, error, parts)

    async def _refuse(self, reply: str, content: str, error: QueryError, parts: int = 0, field: str = "") -> None:
        """Send an error as the end of an answer.

        Before the first part the payload is an `Error`, for clients that read no headers; later it is empty.
        """
        text = str(error)[:4000]
        told = Error(code=error.code, message=text, field=field)
        headers = {
            PART_HEADER: str(parts),
            END_HEADER: header(QueryEnd(error=text, code=error.code)),
            **replies.headers(told, content),
        }
        with contextlib.suppress(Exception):  # the connection may be gone, and the asker with it
            await self._nc.publish(reply, b"" if parts else codec.encode(told, content), headers=headers)

    def _forget(self, execution: Execution) -> None:
        if execution.request.query_id is not None and self._by_id.get(execution.request.query_id) is execution:
            del self._by_id[execution.request.query_id]

    async def _watch_over(self) -> None:
        """End queries that take too much time or memory, and requeue long ones from express slots."""
        while True:
            if not self._running and not len(self._queue):
                self._busy.clear()
            await self._busy.wait()
            await asyncio.sleep(TICK_SECONDS)
            for execution in self._running:
                tried = time.monotonic() - execution.started if execution.express and execution.started else 0.0
                if tried > self._limits.express_seconds and not execution.stopped and self._queue.newcomers:
                    execution.stop(SET_BACK, "it is long: others are tried meanwhile")
                if time.monotonic() > execution.deadline:
                    error = timed_out(execution)
                    execution.stop(error.code, str(error))
                elif execution.stopped:
                    execution.interrupt()
            for execution in self._queue.remove_if(lambda waiting: time.monotonic() > waiting.deadline):
                await self._fail(execution, timed_out(execution))
            if self._running and (held := resident_bytes()) > self._resident_bytes:
                # An allocator frees memory late: a query that began when memory was full already is not to blame.
                grown = [execution for execution in self._running if held - execution.resident_bytes > GROWN_BYTES]
                if grown:
                    youngest = max(grown, key=lambda execution: execution.started)
                    youngest.stop("too_large", "the query needs more memory than there is: filter or aggregate more")

    def _stats(self, stats: EndpointStats) -> dict[str, int] | None:
        if stats.name != "query":
            return None
        return {**self._counts, "running": self._queue.running, "waiting": len(self._queue)}


def asker_of(subject: str, reply: str) -> str:
    """Asker of a query: the user in the subject, if the server lets each user publish under its name only.

    On the subject without a name the asker is a connection, identified by its reply subject: `_INBOX.<nuid>…`, where
    the first 12 characters of a NATS unique id stay the same for one client. That is no proof of identity; a bus
    without authentication has none. Requests from another account have a different reply subject each time, so all of
    them count as one asker.
    """
    # A second token is a user that a trusted service asks for, such as a dashboard's logged-in user.
    user = subject[len(subjects.QUERY) + 1 :]
    if user:
        return f"user {user}"
    prefix, _, rest = reply.partition(".")
    return prefix if prefix == ACROSS else f"{prefix}.{rest[:12]}"


def _message(request: Request) -> Msg:
    # The service API hides the reply subject, which a streamed answer needs.
    return request._msg  # pyright: ignore[reportPrivateUsage]


async def _respond(request: Request, answer: Struct, warnings: Sequence[str] = ()) -> None:
    if _message(request).reply:  # a cancellation may not care
        content = replies.asked_in(request.headers)
        await request.respond(codec.encode(answer, content), replies.headers(answer, content, warnings))


def _lower_priority() -> None:
    """Lower the priority of a query thread, so that ingest comes first. Only on Linux, where niceness is per thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def memory_of_this_machine() -> int:
    """Memory that this process may use, in bytes: of its control group if that has a limit, else of the machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            total = min(total, int(file.read()))
    return total
