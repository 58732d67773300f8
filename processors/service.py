"""The processor: ingest, maintenance and the endpoints for readers over one database, until it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from ..bus.connect import BusUnavailable, connect, first_of, until_closed
from ..bus.health import HealthEndpoint
from ..bus.layout import until_laid_out
from ..schemas.instruments import ServiceKind
from ..schemas.query import ProcessorStatus
from .ingest.deadletters import DeadLetters
from .ingest.ingest import CONSUMERS, Ingest
from .metrics import ProcessorMetrics
from .query import quack, snapshots
from .query.service import QueryService
from .serverclock import ServerClock
from .storage import Database, Maintenance, Retention, StoragePaused
from .storage.embedded.snapshot import write_snapshot
from .storage.errors import StorageDamaged

log = logging.getLogger("corral.processor")

SETTLED_SECONDS: Final = 3.0
CLOSE_SECONDS: Final = 2.0
"""Time limit for closing the connection, since its server may be gone or frozen."""


class Quack(Struct, frozen=True):
    """Settings of the endpoint for DuckDB clients.

    Attributes:
        address: as `quack.parse_address` takes it.
        token: that clients must give.
    """

    address: str
    token: str


async def process(
    db: Path,
    *,
    nats_url: str | None = None,
    archive: Path | None = None,
    memory_bytes: int | None = None,
    threads: int | None = None,
    wait_seconds: float | None = None,
    retention: Retention | None = None,
    force_retention: bool = False,
    remote: Quack | None = None,
    ready: asyncio.Event | None = None,
    named: Callable[[str], None] | None = None,
) -> None:
    """Ingest the streams into a database and answer queries, until cancelled.

    Args:
        db: path of the DuckDB file; created if it is missing.
        nats_url: see `bus.connect`.
        archive: folder of the Parquet files; `archive` next to the file by default.
        memory_bytes: that DuckDB may take.
        threads: that DuckDB may use; None for every core.
        wait_seconds: give up after this time if no server answers at the start; None tries for ever.
        retention: how long data is kept.
        force_retention: delete all that is old by this machine's clock alone, once.
        remote: serve DuckDB's remote protocol, too.
        ready: set once it reads and answers.
        named: called with the processor's id once it has one.

    Raises:
        StorageError: the database can't be used; the message says why and what to do.
        QuackError: the endpoint for DuckDB clients can't be opened; likewise.
        StorageDamaged: its file was found to be damaged meanwhile; the next start rebuilds it.
        BusUnavailable: no server answered, or it has closed the connection for good.
    """
    loop = asyncio.get_running_loop()
    opened = False
    closed = asyncio.Event()

    def prepare(connection: DuckDBPyConnection) -> Callable[[], None] | None:
        nonlocal opened
        if remote is None:
            return None
        try:
            quack.load(connection)
            door = quack.QuackDoor(connection, connection.cursor, remote.address, remote.token)
        except quack.QuackError:
            if not opened:
                raise
            # When a database is reopened after a failure, ingest goes on without the endpoint.
            log.exception("the remote door stays shut")
            return None
        opened = True
        return door.close

    storage = await loop.run_in_executor(
        None, lambda: Database(db, archive=archive, memory_bytes=memory_bytes, threads=threads, prepare=prepare)
    )
    if named is not None:
        named(storage.processor)
    server = ServerClock()
    maintenance = Maintenance(storage, retention, server_now=server.now, force=force_retention)
    try:
        nc = await connect(nats_url, name=f"processor-{storage.processor}", wait_seconds=wait_seconds, closed=closed)
        try:
            js = nc.jetstream()
            await until_laid_out(js)
            letters = DeadLetters(js)
            ingests = [Ingest(nc, storage, consumer, letters) for consumer in CONSUMERS]
            vitals = ProcessorMetrics(letters, storage.size_bytes, maintenance.failing, lambda: maintenance.held_back)
            for ingest in ingests:
                vitals.add(ingest)
            health = HealthEndpoint(ServiceKind.PROCESSOR, storage.processor, vitals.judge)
            await health.open(nc)

            def status() -> ProcessorStatus:
                return ProcessorStatus(
                    processor=storage.processor,
                    database=str(storage.path),
                    watermarks=storage.watermarks(),
                    lag_messages={ingest.consumer.stream: ingest.lag_messages for ingest in ingests},
                    samples=sum(ingest.counts.samples for ingest in ingests),
                    dead_letters=letters.total,
                    duplicates=sum(ingest.counts.duplicates for ingest in ingests),
                    paused=next((ingest.paused for ingest in ingests if ingest.paused), ""),
                    database_bytes=storage.size_bytes(),
                )

            service = QueryService(
                nc, storage.cursor, processor=storage.processor, status=status, spool=storage.path.parent
            )
            write = partial(write_snapshot, storage)
            copies = snapshots.SnapshotService(nc, storage.snapshots, write, storage.size_bytes)
            maintenance.start()
            async with asyncio.TaskGroup() as tasks:
                for ingest in ingests:
                    tasks.create_task(ingest.run())
                tasks.create_task(_settle_recovery(storage, ingests))
                tasks.create_task(server.run(nc))
                await service.start()
                await copies.start()
                vitals.queries = service
                log.info("processor %s writes %s", storage.processor, storage.path)
                if ready is not None:
                    ready.set()
                try:
                    await until_closed(nc, closed)
                finally:
                    health.stopping = True
                    await service.stop()
                    await copies.stop()
        except* (BusUnavailable, StorageDamaged) as gone:
            raise first_of(gone) from None
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await nc.close()
    finally:
        await asyncio.shield(loop.run_in_executor(None, maintenance.stop))
        await loop.run_in_executor(None, storage.close)


async def _settle_recovery(storage: Database, ingests: Sequence[Ingest]) -> None:
    """After a recovery, wait until all that the streams still have is stored, and report what is lost."""
    while True:
        await asyncio.sleep(SETTLED_SECONDS)
        if all(ingest.begun and not ingest.lag_messages and not ingest.paused for ingest in ingests):
            await asyncio.sleep(SETTLED_SECONDS)
            with contextlib.suppress(StoragePaused, duckdb.Error):
                return await asyncio.to_thread(storage.settle_recovery)
