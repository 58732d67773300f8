"""The processor: ingest, maintenance and the endpoints for readers over one history, until it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

from duckdb import DuckDBPyConnection
from nats.aio.client import Client

from ..bus.connect import BusUnavailable, connect, first_of, until_closed
from ..bus.health import HealthEndpoint
from ..bus.layout import until_laid_out
from ..schemas.instruments import ServiceKind
from .ingest.deadletters import DeadLetters
from .metrics import ProcessorMetrics
from .query.durations import DurationsService
from .query.service import QueryService
from .query.snapshots import SnapshotService
from .serverclock import ServerClock
from .storage.errors import StorageDamaged

log = logging.getLogger("corral.processor")

CLOSE_SECONDS: Final = 2.0
"""Time limit for closing the connection, since its server may be gone or frozen."""


class History(Protocol):
    """A history that a processor writes and serves: `EmbeddedHistory` or `LakeHistory`."""

    @property
    def processor(self) -> str:
        """Id of the history: part of the names of its durable consumers."""
        ...

    @property
    def owner(self) -> str:
        """Id of this process among those that write the history; the history's own id where there is only one."""
        ...

    @property
    def location(self) -> str:
        """Path or URL of the data."""
        ...

    @property
    def spool(self) -> Path | None:
        """Folder for answers that wait for their readers; None for the system's."""
        ...

    @property
    def snapshots(self) -> Path:
        """Folder for copies that wait to be fetched."""
        ...

    @property
    def failing(self) -> Mapping[str, str]:
        """Maintenance jobs that fail at the moment, each with the reason."""
        ...

    @property
    def behind(self) -> Mapping[str, float]:
        """Maintenance jobs that are behind, each with the seconds since it was due."""
        ...

    @property
    def held_back(self) -> str:
        """Reason why retention is held back; empty if nothing is wrong."""
        ...

    async def open(self, server_now: Callable[[], datetime | None]) -> None:
        """Open the storage.

        Args:
            server_now: the time by the bus's clock; None while it is not known.

        Raises:
            StorageError: it can't be used; the message says why and what to do.
            StoragePaused: the catalog of a lake does not answer.
            QuackError: the endpoint for DuckDB clients can't be opened.
        """
        ...

    async def join(self, nc: Client, letters: DeadLetters, metrics: ProcessorMetrics) -> None:
        """Prepare ingest from a bus whose streams exist.

        Args:
            nc: connection to the bus.
            letters: where refused messages go.
            metrics: learn which parts of the streams are read.
        """
        ...

    async def run(self) -> None:
        """Ingest the streams and maintain the storage until cancelled.

        Raises:
            StorageDamaged: the file was found to be damaged meanwhile; the next start rebuilds it.
        """
        ...

    async def store_received(self) -> None:
        """Store what has been received until now, if anything waits. Bounded in time, and fails never."""
        ...

    def reading(self) -> AbstractAsyncContextManager[None]:
        """Context of a reader: what has been received until it is entered is stored by then.

        Entering it is bounded in time, and fails never: a disk that is full is no reason to answer no query.
        """
        ...

    def cursor(self) -> DuckDBPyConnection:
        """New cursor for readers. May be called from any thread."""
        ...

    def write_snapshot(self, target: Path, archive: bool) -> int:
        """Write a copy to a file, with the archive or without; return the number of samples in it."""
        ...

    def size_bytes(self) -> int | None:
        """Size of the database on this disk; None if it is elsewhere."""
        ...

    async def close(self) -> None:
        """Stop maintenance, write what is left, and release the storage."""
        ...


async def process(
    history: History,
    *,
    nats_url: str | None = None,
    wait_seconds: float | None = None,
    ready: asyncio.Event | None = None,
    named: Callable[[str], None] | None = None,
    beside: Callable[[Client], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Ingest the streams into a history and answer queries, until cancelled.

    Args:
        history: to write and serve; it is opened here, and closed at the end.
        nats_url: see `bus.connect`.
        wait_seconds: give up after this time if no server answers at the start; None retries forever.
        ready: set once it reads and answers.
        named: called with the processor's id once it has one.
        beside: work that reads the history beside it, from when it answers until the end; gets the connection.

    Raises:
        StorageError, StoragePaused, QuackError, StorageDamaged: see `History`.
        BusUnavailable: no server answered, or it has closed the connection for good.
    """
    server = ServerClock()
    await history.open(server.now)
    try:
        if named is not None:
            named(history.owner)
        closed = asyncio.Event()
        # One of several writers has a name of its own on the bus.
        name = "-".join(dict.fromkeys(("processor", history.processor, history.owner)))
        nc = await connect(nats_url, name=name, wait_seconds=wait_seconds, closed=closed)
        try:
            await _serve(history, nc, server, closed, ready, beside)
        except* (BusUnavailable, StorageDamaged) as gone:
            raise first_of(gone) from None
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await nc.close()
    finally:
        await history.close()


async def _serve(
    history: History,
    nc: Client,
    server: ServerClock,
    closed: asyncio.Event,
    ready: asyncio.Event | None,
    beside: Callable[[Client], Coroutine[Any, Any, None]] | None,
) -> None:
    js = nc.jetstream()
    await until_laid_out(js)
    letters = DeadLetters(js)
    metrics = ProcessorMetrics(
        letters, history.size_bytes, lambda: history.failing, lambda: history.held_back, lambda: history.behind
    )
    await history.join(nc, letters, metrics)
    health = HealthEndpoint(ServiceKind.PROCESSOR, history.owner, metrics.health_status)
    await health.open(nc)
    queries = QueryService(
        nc,
        history.cursor,
        processor=history.processor,
        status=lambda: metrics.status(history.processor, history.location),
        spool=history.spool,
        reading=history.reading,
    )
    lasted = DurationsService(nc, history.cursor, history.store_received)
    copies = SnapshotService(
        nc, history.snapshots, history.write_snapshot, lambda: history.size_bytes() or 0, history.reading
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(history.run())
            tasks.create_task(server.run(nc))
            await queries.start()
            await copies.start()
            await lasted.start()
            metrics.queries = queries
            log.info("processor %s writes %s", history.owner, history.location)
            if ready is not None:
                ready.set()
            if beside is not None:
                tasks.create_task(beside(nc))
            try:
                await until_closed(nc, closed)
            finally:
                health.stopping = True
    finally:
        # Last, so that other processors get the parts of this one at once.
        await queries.stop()
        await copies.stop()
        await lasted.stop()
