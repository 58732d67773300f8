"""Answers that come in pieces: rows of a query, events, what a job prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from ..bus.tasks import cancel_all
from ..client import subscriptions
from ..client.errors import CorralError, InvalidRequest, NoService
from ..client.jobs.names import parse_selection
from ..client.query import parts
from ..client.rpc import RETRY_SECONDS
from ..schemas import codec, subjects
from ..schemas.operations import QueueEntry
from ..schemas.query import END_HEADER, MAX_ROWS, QueryRequest, ResultFormat
from ..schemas.work.jobs import JobEvent
from .answers import error_of
from .callers import Caller
from .calls import Passing
from .routes import JobEventsFilter, LeaseEventsFilter, LogsFilter
from .waiting import WaitingRequest

T = TypeVar("T")

EVENT_STREAM: Final = "text/event-stream"
TEXT: Final = "text/plain; charset=utf-8"
KEEP_ALIVE_SECONDS: Final = 15.0
"""Time without an event after which a comment keeps proxies from closing the stream."""
_CONTENT_TYPES: Final = {
    ResultFormat.JSON: codec.JSON,
    ResultFormat.CSV: "text/csv; charset=utf-8",
    ResultFormat.ARROW: "application/vnd.apache.arrow.stream",
    ResultFormat.MSGPACK: codec.MSGPACK,
}
_WINDOW: Final = 8
_PENDING: Final = 4096


class Pieces(Struct, frozen=True):
    """An answer in pieces.

    Attributes:
        headers: with the content type.
        pieces: its bytes. An error after the first piece breaks the answer off.
    """

    headers: dict[str, str]
    pieces: AsyncGenerator[bytes]


class _Limited(Struct, frozen=True):
    """The limit that a query names, if it names one."""

    limit: int | UnsetType = UNSET


async def query(caller: Caller, body: bytes) -> Pieces:
    """Run a query. What goes wrong before its first rows is raised.

    Raises:
        CorralError, DecodeError: the statement or its fields are wrong, or no processor answers.
    """
    request, warnings = codec.decode_request(body, QueryRequest)
    # The first is for being cancelled when the client goes away, the second for answers of any size.
    request = replace(request, query_id=request.query_id or uuid.uuid4().hex, window=_WINDOW)
    if codec.decode(body, _Limited, codec.JSON).limit is UNSET:
        # Where the rows go on in a second part, no header can say any more that some were left out.
        request = replace(request, limit=MAX_ROWS)
    loop = asyncio.get_running_loop()
    end = loop.time() + caller.client.patience
    while True:
        stream = parts(caller.nc, request, margin_seconds=caller.client.timeout)
        try:
            first, ended = await anext(stream)
            break
        except NoService:
            if loop.time() >= end:
                raise
        except nats.errors.Error as error:
            calls = Passing(caller)
            raise calls._bus_error(error, subjects.QUERY) from error  # pyright: ignore[reportPrivateUsage]
        await asyncio.sleep(RETRY_SECONDS)
    headers = {codec.CONTENT_TYPE_HEADER: _CONTENT_TYPES[request.format]}
    if ended is not None:
        headers[END_HEADER] = json.dumps(msgspec.to_builtins(ended))
    if warnings:
        headers[codec.WARNINGS_HEADER] = codec.warnings_header(warnings)

    async def pieces() -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(stream):
            yield first
            async for piece, _ in stream:
                yield piece

    return Pieces(headers, pieces())


def request_events(waiting: WaitingRequest) -> Pieces:
    """Places of a request in the queue, and its answer."""

    async def found() -> AsyncGenerator[tuple[str, Struct]]:
        async with contextlib.aclosing(waiting.events()) as events:
            async for event in events:
                yield "queued" if isinstance(event, QueueEntry) else str(event.__struct_config__.tag), event

    return _events(found())


def lease_events(caller: Caller, wanted: LeaseEventsFilter) -> Pieces:
    """Lease events, until the client goes away."""

    async def found() -> AsyncGenerator[tuple[str, Struct]]:
        kind = "*" if wanted.kind is None else wanted.kind.value
        events = subscriptions.lease_events(caller.nc, wanted.lease_id or "*", kind)
        async for event in _until_closed(events, caller.closed):
            if wanted.owner in (None, event.lease.owner):
                yield "lease_event", event

    return _events(found())


def job_events(caller: Caller, wanted: JobEventsFilter) -> Pieces:
    """Events of jobs, until the client goes away."""

    async def found() -> AsyncGenerator[tuple[str, Struct]]:
        async for event in _until_closed(_job_events(caller, wanted.job_id or "*"), caller.closed):
            if wanted.owner in (None, event.job.owner):
                yield "job_event", event

    return _events(found())


async def logs(caller: Caller, wanted: LogsFilter) -> Pieces:
    """Output of a task on one host.

    Raises:
        CorralError: there is no such job, it is another owner's, or several tasks or hosts are meant.
    """
    chosen = parse_selection(wanted.job_id)
    listing = await caller.client.jobs.get(chosen)
    if len(listing.tasks) != 1:
        text = "The job has several tasks: name one, such as 1234_7" if listing.tasks else "The job has no such task"
        raise InvalidRequest(f"{text} - at `$.job_id`", "invalid", "$.job_id")
    if listing.job.hosts > 1 and wanted.host is None:
        raise InvalidRequest("The task is on several hosts: name one - at `$.host`", "invalid", "$.host")
    stream = caller.client.jobs.logs(chosen, follow=wanted.follow, host=wanted.host)
    # Whether they may be read is seen before the answer begins; one that follows may wait for long.
    first = None if wanted.follow else await anext(stream, None)

    async def pieces() -> AsyncGenerator[bytes]:
        if first is not None:
            yield _with_gap(first.missed, first.file) + first.data
        async for piece in stream:
            yield _with_gap(piece.missed, piece.file) + piece.data

    return Pieces({codec.CONTENT_TYPE_HEADER: TEXT}, pieces())


def _with_gap(missed: int, file: str) -> bytes:
    where = f": they are in {file}" if file else ""
    return f"\n[{missed} bytes were not kept here{where}]\n".encode() if missed else b""


def sse(kind: str, message: Struct) -> bytes:
    """A message as a server-sent event: JSON has no line feeds."""
    return b"event: " + kind.encode() + b"\ndata: " + codec.encode(message, codec.JSON) + b"\n\n"


def _events(found: AsyncGenerator[tuple[str, Struct]]) -> Pieces:
    async def pieces() -> AsyncGenerator[bytes]:
        yield b": corral\n\n"
        coming: asyncio.Future[tuple[str, Struct]] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(found))
                await asyncio.wait({coming}, timeout=KEEP_ALIVE_SECONDS)
                if not coming.done():
                    yield b": still here\n\n"
                    continue
                try:
                    kind, message = coming.result()
                except StopAsyncIteration:
                    return
                except (CorralError, codec.DecodeError) as error:
                    yield sse("error", error_of(error))
                    return
                finally:
                    coming = None
                yield sse(kind, message)
        finally:
            if coming is not None:
                await cancel_all([coming])
            await found.aclose()

    return Pieces({codec.CONTENT_TYPE_HEADER: EVENT_STREAM}, pieces())


async def _job_events(caller: Caller, job_id: str) -> AsyncIterator[JobEvent]:
    subscription = await caller.nc.subscribe(subjects.job_events_subject(job_id), pending_msgs_limit=_PENDING)
    try:
        async for message in subscription.messages:
            with contextlib.suppress(codec.DecodeError):
                event = codec.decode(message.data, JobEvent, codec.JSON)
                # As in `subscriptions.lease_events`: stored events can be delivered to any subject.
                if message.subject == subjects.job_events_subject(event.job.job_id):
                    yield event
    finally:
        with contextlib.suppress(nats.errors.Error):  # the connection may be closed already
            await subscription.unsubscribe()


async def _until_closed(events: AsyncIterator[T], closed: asyncio.Event) -> AsyncGenerator[T]:
    """Events, until the server has closed the connection for good."""
    ending = asyncio.ensure_future(closed.wait())
    stream: Any = events
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(stream))
            await asyncio.wait({coming, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        await cancel_all([ending] if coming is None else [ending, coming])
        await stream.aclose()


__all__ = ["Pieces", "job_events", "lease_events", "logs", "query", "request_events", "sse"]
