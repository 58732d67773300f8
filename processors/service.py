"""The processor: ingest, maintenance and the query service over one database, until it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from ..schemas import bus
from ..schemas.query import ProcessorStatus
from .deadletters import DeadLetters
from .ingest import CONSUMERS, Ingest
from .query import QueryService
from .storage import Database, Maintenance, Retention

log = logging.getLogger("corral.processor")


async def process(
    db: Path,
    *,
    nats_url: str | None = None,
    archive: Path | None = None,
    memory_bytes: int | None = None,
    wait_seconds: float | None = None,
    query: bool = True,
    retention: Retention | None = None,
    ready: asyncio.Event | None = None,
) -> None:
    """Bring what is published into a database and answer queries, until cancelled.

    Args:
        db: path of the DuckDB file; made where it is missing.
        nats_url: see `bus.connect`.
        archive: folder of the Parquet files; `archive` beside the file by default.
        memory_bytes: that DuckDB may take.
        wait_seconds: give up after so long where no server answers at the start; None tries for ever.
        query: answer SQL over the bus.
        retention: how long things are kept.
        ready: set once it reads and answers.

    Raises:
        StorageError: the database can't be used; the message says why and what to do.
        BusUnavailable: no server answered.
    """
    loop = asyncio.get_running_loop()
    storage = await loop.run_in_executor(None, lambda: Database(db, archive=archive, memory_bytes=memory_bytes))
    try:
        nc = await bus.connect(nats_url, name=f"processor-{storage.processor}", wait_seconds=wait_seconds)
        try:
            js = nc.jetstream()
            await bus.ensure_layout(js)
            letters = DeadLetters(js)
            maintenance = Maintenance(storage, retention)
            maintenance.start()
            ingests = [Ingest(nc, storage, consumer, letters) for consumer in CONSUMERS]

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

            service = QueryService(nc, storage.cursor, processor=storage.processor, status=status) if query else None
            async with asyncio.TaskGroup() as tasks:
                for ingest in ingests:
                    tasks.create_task(ingest.run())
                if service is not None:
                    await service.start()
                log.info("processor %s writes %s", storage.processor, storage.path)
                if ready is not None:
                    ready.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    if service is not None:
                        await service.stop()
                    await asyncio.shield(loop.run_in_executor(None, maintenance.stop))
        finally:
            with contextlib.suppress(Exception):
                await nc.close()
    finally:
        await loop.run_in_executor(None, storage.close)
