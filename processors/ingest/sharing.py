"""Processors that share one history: each ingests the parts that it owns, and any of them answers SQL over all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from duckdb import DuckDBPyConnection

from ...bus.connect import BusUnavailable, connect, first_of, until_closed
from ...bus.health import HealthEndpoint
from ...bus.layout import ensure_layout, until_laid_out
from ...schemas import subjects
from ...schemas.instruments import ServiceKind
from ...schemas.query import ProcessorStatus
from ..metrics import ProcessorMetrics
from ..query.service import QueryService
from ..query.snapshots import SnapshotService
from ..serverclock import ServerClock
from ..storage import hardening
from ..storage.errors import Deposed, StorageError, StoragePaused
from ..storage.lake import maintenance
from ..storage.lake.lake import RENEW_COMMITS, Lake, LakePart, attach, prepare
from ..storage.lake.object_storage import is_url
from ..storage.lake.snapshot import write_snapshot
from ..storage.retention import Retention
from . import partitions
from .deadletters import DeadLetters
from .ingest import Ingest
from .origin import Origin

log = logging.getLogger("corral.processor")


async def share(
    lake: Lake,
    count: int,
    *,
    nats_url: str | None = None,
    retention: Retention | None = None,
    force_retention: bool = False,
    wait_seconds: float | None = None,
    ready: asyncio.Event | None = None,
    named: Callable[[str], None] | None = None,
) -> None:
    """Ingest this processor's parts of the streams into a lake, and answer queries over it, until cancelled.

    Args:
        lake: that all processors write to.
        count: number of partitions; the same for all processors.
        nats_url: see `bus.connect`.
        retention: how long data is kept; the same for all processors.
        force_retention: delete all that is old by this machine's clock alone, once it runs the lake's maintenance.
        wait_seconds: give up after this time if no server answers at the start; None tries for ever.
        ready: set once it takes parts.
        named: called with the processor's id once it has one.

    Raises:
        StorageError: the lake can't be used; the message says why and what to do.
        StoragePaused: its catalog does not answer at the start.
        BusUnavailable: no server answered, or it has closed the connection for good.
    """
    history = await asyncio.to_thread(prepare, lake, count)
    reading = await asyncio.to_thread(Readers, lake)
    owner = uuid.uuid4().hex[:12]
    kept = retention or Retention()
    if named is not None:
        named(owner)
    closed = asyncio.Event()
    nc = await connect(nats_url, name=f"processor-{history}-{owner}", wait_seconds=wait_seconds, closed=closed)
    try:
        js = nc.jetstream()
        await until_laid_out(js)
        await partitions.ensure_stream(js, count)
        letters = DeadLetters(js)
        server = ServerClock()
        care = maintenance.Upkeep(lake, kept, server_now=server.now, force=force_retention)

        async def make_streams() -> None:
            await ensure_layout(js)
            await partitions.ensure_stream(js, count)

        origin = Origin(nc, owner, count, make_streams)
        vitals = ProcessorMetrics(letters, failing=care.failing, held_back=lambda: care.held_back, origin=origin)
        health = HealthEndpoint(ServiceKind.PROCESSOR, owner, vitals.judge)
        await health.open(nc)
        consumers = partitions.consumers(count)
        working: dict[str, Ingest] = {}
        storages: dict[str, LakePart] = {}
        # Counts of parts that were released meanwhile.
        before = {"samples": 0, "duplicates": 0}

        async def work(part: str) -> None:
            if part == partitions.UPKEEP:
                await care.run()
                return
            storage = await asyncio.to_thread(LakePart, lake, history, part)
            repeats = consumers[part].stream == partitions.STREAM
            ingest = Ingest(nc, storage, consumers[part], letters, make_streams, origin if repeats else None)
            working[part], storages[part] = ingest, storage
            vitals.add(ingest)
            try:
                await ingest.run()
            except* Deposed as gone:
                log.warning("%s", gone.exceptions[0])
            except* (StorageError, StoragePaused) as failed:
                log.error("%s: %s", part, failed.exceptions[0])
            finally:
                del working[part], storages[part]
                vitals.remove(ingest)
                before["samples"] += ingest.counts.samples
                before["duplicates"] += ingest.counts.duplicates
                await asyncio.to_thread(storage.close)

        def status() -> ProcessorStatus:
            return ProcessorStatus(
                processor=history,
                database=lake.data,
                watermarks={
                    part: number for storage in storages.values() for part, number in storage.watermarks().items()
                },
                lag_messages={subjects.TELEMETRY_STREAM: origin.behind}
                | {part: ingest.lag_messages for part, ingest in working.items()},
                samples=before["samples"] + sum(ingest.counts.samples for ingest in working.values()),
                dead_letters=letters.total,
                duplicates=before["duplicates"] + sum(ingest.counts.duplicates for ingest in working.values()),
                paused=next((ingest.paused for ingest in working.values() if ingest.paused), ""),
            )

        def copy(target: Path, archive: bool) -> int:
            return write_snapshot(lake, target, archive, timedelta(seconds=kept.raw))

        copies = SnapshotService(nc, Path(tempfile.gettempdir()) / f"corral-copies-{owner}", copy)
        service = QueryService(nc, reading.cursor, processor=history, status=status)
        claims = partitions.Claims(nc, history, owner, [*consumers, partitions.UPKEEP], work)
        log.info("processor %s shares the history %s, in %d partitions", owner, history, count)
        await service.start()
        await copies.start()
        vitals.queries = service
        if ready is not None:
            ready.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(claims.run())
                tasks.create_task(origin.run())
                tasks.create_task(server.run(nc))
                tasks.create_task(until_closed(nc, closed))
        finally:
            health.stopping = True
            await service.stop()
            await copies.stop()
    except* BusUnavailable as gone:
        raise first_of(gone) from None
    finally:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2.0):
                await nc.close()
        reading.close()


class Readers:
    """Cursors for readers of a lake, on an instance that is replaced after every `RENEW_COMMITS` cursors.

    DuckLake keeps what it has read of each snapshot for as long as it is attached. A replaced instance lives until its
    last cursor is closed.

    Args:
        lake: which.

    Raises:
        StorageError, StoragePaused: see `attach`.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._lock = threading.Lock()
        self._made = 0
        self._connection = for_readers(lake)

    def cursor(self) -> DuckDBPyConnection:
        """New cursor. May be called from any thread."""
        with self._lock:
            self._made += 1
            if self._made % RENEW_COMMITS == 0:
                # Closing the old one would close its cursors too; letting go of it does not.
                self._connection = for_readers(self._lake)
            made = self._connection.cursor()
        made.execute("USE lake")
        return made

    def close(self) -> None:
        """Close the current instance."""
        with self._lock:
            self._connection.close()


def for_readers(lake: Lake) -> DuckDBPyConnection:
    """Separate DuckDB instance that can't write to the lake, nor open anything but the lake's files."""
    connection = attach(lake, read_only=True)
    hardening.lock(connection, directories=[lake.data if is_url(lake.data) else Path(lake.data)])
    return connection
