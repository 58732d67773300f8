"""A history in one DuckDB file, for `service.process`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection
from nats.aio.client import Client

from ..bus.process import release_memory
from .ingest.deadletters import DeadLetters
from .ingest.ingest import CONSUMERS, Ingest, permitted
from .metrics import ProcessorMetrics
from .query import quack
from .storage import Database, Maintenance, Retention, StoragePaused
from .storage.embedded.snapshot import write_snapshot

log = logging.getLogger("corral.processor")

SETTLED_SECONDS: Final = 3.0
UNREAD_ROLLUP_SECONDS: Final = 900.0
"""Longest pause between two refreshes of a rollup while nobody reads the history."""
UNREAD_SECONDS: Final = 15.0
"""How long messages wait for a transaction while nobody reads the history. A transaction costs as much for one row as
for a thousand. The stream keeps them until they are acknowledged, and longer."""
RELEASE_SECONDS: Final = 45.0
"""Shortest time between two releases of memory after transactions: each takes 12 ms of CPU time."""
FLUSH_SECONDS: Final = 2.0
"""How long a query waits at most for what was received before it, as when the disk is full."""
REST_SECONDS: Final = 60.0
"""How long after the last query DuckDB goes back to one thread."""
ROLLUP_SECONDS: Final = 5.0
"""How long the first query for some time waits at most for rollups."""


class EmbeddedHistory:
    """A history in one DuckDB file, which one processor writes.

    Args:
        path: of the file; created if it is missing.
        archive: folder of the Parquet files; `archive` next to the file by default.
        memory_bytes: that DuckDB may take.
        threads: that DuckDB may use; None for one per core.
        retention: how long data is kept.
        force_retention: delete all that is old by this machine's clock alone, once.
        remote: serve DuckDB's remote protocol, too.
    """

    def __init__(
        self,
        path: Path,
        *,
        archive: Path | None = None,
        memory_bytes: int | None = None,
        threads: int | None = None,
        retention: Retention | None = None,
        force_retention: bool = False,
        remote: quack.Settings | None = None,
    ) -> None:
        self._path = path
        self._archive = archive
        self._memory_bytes = memory_bytes
        self._threads = threads
        self._retention = retention
        self._force_retention = force_retention
        self._remote = remote
        self._remote_opened = False
        self._ingests: list[Ingest] = []
        self._readers = 0
        self._read_at = 0.0
        self._parallel = False
        """True while DuckDB may use all of its threads."""
        self._changing_threads = threading.Lock()
        self._released_at = 0.0
        self._database: Database
        self._maintenance: Maintenance

    @property
    def processor(self) -> str:
        """Id of the history."""
        return self._database.processor

    @property
    def owner(self) -> str:
        """Id of the history: a file has one writer."""
        return self._database.processor

    @property
    def location(self) -> str:
        """Path of the file."""
        return str(self._database.path)

    @property
    def spool(self) -> Path | None:
        """Folder of the file."""
        return self._database.path.parent

    @property
    def snapshots(self) -> Path:
        """Folder next to the file."""
        return self._database.snapshots

    @property
    def failing(self) -> Mapping[str, str]:
        """Maintenance jobs that fail at the moment."""
        return self._maintenance.failing

    @property
    def behind(self) -> Mapping[str, float]:
        """Maintenance that is behind, each job with the seconds since it was due."""
        return self._maintenance.behind

    @property
    def held_back(self) -> str:
        """Reason why retention is held back."""
        return self._maintenance.held_back

    async def open(self, server_now: Callable[[], datetime | None]) -> None:
        """Open the file; a damaged one is rebuilt."""
        self._database = await asyncio.to_thread(
            Database,
            self._path,
            archive=self._archive,
            memory_bytes=self._memory_bytes,
            threads=self._threads,
            # Clients of the remote protocol could change what is not locked.
            adaptive=self._remote is None,
            prepare=self._open_remote,
        )
        self._maintenance = Maintenance(
            self._database,
            self._retention,
            server_now=server_now,
            force=self._force_retention,
            # The clients of the remote protocol read the tables themselves.
            unread_seconds=None if self._remote_opened else UNREAD_ROLLUP_SECONDS,
        )

    def _open_remote(self, connection: DuckDBPyConnection) -> Callable[[], None] | None:
        """Open the endpoint for DuckDB clients on a new instance; return what closes it."""
        if self._remote is None:
            return None
        try:
            quack.load(connection)
            endpoint = quack.QuackEndpoint(connection, connection.cursor, self._remote.address, self._remote.token)
        except quack.QuackError:
            if not self._remote_opened:
                raise
            # When a database is reopened after a failure, ingest goes on without the endpoint.
            log.exception("the endpoint for DuckDB clients stays closed")
            return None
        self._remote_opened = True
        return endpoint.close

    async def join(self, nc: Client, letters: DeadLetters, metrics: ProcessorMetrics) -> None:
        """Prepare ingest of each stream."""
        consumers = await permitted(nc.jetstream(), CONSUMERS)
        # The clients of the remote protocol read the tables themselves.
        unread_seconds = 0.0 if self._remote_opened else UNREAD_SECONDS
        self._ingests = [
            Ingest(nc, self._database, consumer, letters, unread_seconds=unread_seconds, stored=self._release_memory)
            for consumer in consumers
        ]
        for ingest in self._ingests:
            metrics.add(ingest)

    async def run(self) -> None:
        """Ingest all streams; maintenance runs in its own thread."""
        self._maintenance.start()
        async with asyncio.TaskGroup() as tasks:
            for ingest in self._ingests:
                tasks.create_task(ingest.run())
            tasks.create_task(_settle_recovery(self._database, self._ingests))
            tasks.create_task(self._rest())

    async def store_received(self) -> None:
        """Store what has been received until now."""
        await asyncio.gather(*(ingest.flush(FLUSH_SECONDS) for ingest in self._ingests))

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncGenerator[None]:
        """Store what has been received until now, and refresh rollups that are old since nobody has read them."""
        self._readers += 1
        self._read_at = time.monotonic()
        try:
            await self.store_received()
            await asyncio.to_thread(self._prepare_reading)
            yield
        finally:
            self._readers -= 1
            self._read_at = time.monotonic()

    def _prepare_reading(self) -> None:
        with self._changing_threads:
            if not self._parallel:
                self._parallel = True
                self._database.more_threads()
        self._maintenance.read(ROLLUP_SECONDS)

    async def _rest(self) -> None:
        """Use one thread while there are no readers: with few rows threads mostly wait for each other."""
        while True:
            await asyncio.sleep(REST_SECONDS)
            await asyncio.to_thread(self._stop_threads)

    def _release_memory(self) -> None:
        """After a transaction while nobody reads: give memory back that is not in use until the next one."""
        now = time.monotonic()
        if not self._parallel and now - self._released_at > RELEASE_SECONDS:
            self._released_at = now
            release_memory()

    def _stop_threads(self) -> None:
        with self._changing_threads:  # a reader may come meanwhile
            if self._parallel and not self._readers and time.monotonic() - self._read_at > REST_SECONDS:
                self._parallel = False
                self._database.one_thread()

    def cursor(self) -> DuckDBPyConnection:
        """New cursor for readers."""
        return self._database.cursor()

    def write_snapshot(self, target: Path, archive: bool) -> int:
        """Write a copy of the file."""
        return write_snapshot(self._database, target, archive)

    def size_bytes(self) -> int | None:
        """Size of the file and its write-ahead log."""
        return self._database.size_bytes()

    async def close(self) -> None:
        """Stop maintenance, and close the file."""
        await asyncio.shield(asyncio.to_thread(self._maintenance.stop))
        await asyncio.to_thread(self._database.close)


async def _settle_recovery(database: Database, ingests: Sequence[Ingest]) -> None:
    """After a recovery, wait until all that the streams still have is stored, and report what is lost."""
    while True:
        await asyncio.sleep(SETTLED_SECONDS)
        if all(ingest.begun and not ingest.lag_messages and not ingest.paused for ingest in ingests):
            await asyncio.sleep(SETTLED_SECONDS)
            if not all([await ingest.flush(SETTLED_SECONDS) for ingest in ingests]):
                continue
            with contextlib.suppress(StoragePaused, duckdb.Error):
                return await asyncio.to_thread(database.settle_recovery)
