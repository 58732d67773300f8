"""A history in a lake, which several processors share, for `service.process`.

Each processor ingests the parts of the streams that it owns, and any of them answers SQL over all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from duckdb import DuckDBPyConnection
from nats.aio.client import Client

from ..bus.connect import first_of
from ..bus.layout import ensure_layout
from .ingest import partitions
from .ingest.deadletters import DeadLetters
from .ingest.ingest import Ingest, permitted
from .ingest.origin import Origin
from .metrics import ProcessorMetrics
from .storage.errors import Deposed, StorageError, StoragePaused
from .storage.lake.lake import Lake, LakePart, prepare
from .storage.lake.maintenance import LakeMaintenance
from .storage.lake.partition import PartRollups
from .storage.lake.progress import number_of
from .storage.lake.readers import Readers
from .storage.lake.snapshot import write_snapshot
from .storage.retention import Retention

log = logging.getLogger("corral.processor")


class LakeHistory:
    """A history in a lake, of which this processor ingests some parts.

    Args:
        lake: that all processors write to.
        count: number of partitions; the same for all processors.
        retention: how long data is kept; the same for all processors.
        force_retention: delete all that is old by this machine's clock alone, once it runs the lake's maintenance.
    """

    def __init__(
        self, lake: Lake, count: int, *, retention: Retention | None = None, force_retention: bool = False
    ) -> None:
        self._lake = lake
        self._count = count
        self._retention = retention or Retention()
        self._force_retention = force_retention
        self.processor = ""
        self.owner = uuid.uuid4().hex[:12]
        self.location = lake.data
        self.spool: Path | None = None
        self.snapshots = Path(tempfile.gettempdir()) / f"corral-copies-{self.owner}"
        self._readers: Readers
        self._maintenance: LakeMaintenance
        self._nc: Client
        self._letters: DeadLetters
        self._metrics: ProcessorMetrics
        self._origin: Origin
        self._consumers = partitions.consumers(count)
        self._rollups: dict[str, PartRollups] = {}

    @property
    def failing(self) -> Mapping[str, str]:
        """Maintenance steps that fail at the moment, and parts whose rollups do."""
        rolled = {f"rollups of {part}": found.failing for part, found in self._rollups.items() if found.failing}
        return {**self._maintenance.failing, **rolled}

    @property
    def behind(self) -> Mapping[str, float]:
        """Maintenance that is behind, and parts whose rollups are, each with the seconds since it was due."""
        rolled = {part: found.behind_seconds for part, found in self._rollups.items()}
        return {**self._maintenance.behind, **{f"rollups of {part}": late for part, late in rolled.items() if late}}

    @property
    def held_back(self) -> str:
        """Reason why retention is held back."""
        return self._maintenance.held_back

    async def open(self, server_now: Callable[[], datetime | None]) -> None:
        """Create or upgrade the lake, and attach it for readers."""
        self.processor = await asyncio.to_thread(prepare, self._lake, self._count)
        self._readers = await asyncio.to_thread(Readers, self._lake)
        self._maintenance = LakeMaintenance(
            self._lake, self._retention, server_now=server_now, force=self._force_retention
        )

    async def join(self, nc: Client, letters: DeadLetters, metrics: ProcessorMetrics) -> None:
        """Create the stream of partitions, and prepare the check that it mirrors telemetry.

        Raises:
            StorageError: the stream is there with another number of partitions.
        """
        await partitions.ensure_stream(nc.jetstream(), self._count)
        readable = await permitted(nc.jetstream(), self._consumers.values())
        self._consumers = {part: one for part, one in self._consumers.items() if one in readable}
        self._nc, self._letters, self._metrics = nc, letters, metrics
        self._origin = metrics.origin = Origin(nc, self.owner, self._count, self._make_streams)

    async def _make_streams(self) -> None:
        js = self._nc.jetstream()
        await ensure_layout(js)
        await partitions.ensure_stream(js, self._count)

    async def run(self) -> None:
        """Claim parts of the streams, and ingest those that are owned."""
        log.info("processor %s shares the history %s, in %d partitions", self.owner, self.processor, self._count)
        parts = [*self._consumers, partitions.MAINTENANCE]
        claims = partitions.Claims(self._nc, self.processor, self.owner, parts, self._work)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(claims.run())
            tasks.create_task(self._origin.run())

    async def _work(self, part: str) -> None:
        """Ingest one part while it is owned; or maintain the lake, which is a part, too."""
        if part == partitions.MAINTENANCE:
            await self._maintenance.run()
            return
        consumer = self._consumers[part]
        storage = await asyncio.to_thread(LakePart, self._lake, self.processor, part)
        origin = self._origin if consumer.stream == partitions.STREAM else None
        rolled = PartRollups(storage, self._retention.minutes) if number_of(part) is not None else None
        ingest = Ingest(self._nc, storage, consumer, self._letters, self._make_streams, origin)
        self._metrics.add(ingest)
        try:
            async with asyncio.TaskGroup() as tasks:
                ingesting = tasks.create_task(ingest.run())
                if rolled is not None:
                    self._rollups[part] = rolled
                    rolling = tasks.create_task(rolled.run())
                    ingesting.add_done_callback(lambda _: rolling.cancel())
        except* Deposed as gone:
            log.warning("%s", first_of(gone))
        except* (StorageError, StoragePaused) as failed:
            log.error("%s: %s", part, first_of(failed))
        finally:
            self._metrics.remove(ingest)
            self._rollups.pop(part, None)
            if rolled is not None:
                # Not awaited, since a refresh may take seconds: the next owner finds what is not written.
                asyncio.get_running_loop().run_in_executor(None, rolled.close)
            await asyncio.to_thread(storage.close)

    async def store_received(self) -> None:
        """Nothing to do: see `reading`."""

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncGenerator[None]:
        """Nothing to prepare: other processors read the lake, too, so each part is stored within seconds anyway."""
        yield

    def cursor(self) -> DuckDBPyConnection:
        """New cursor for readers."""
        return self._readers.cursor()

    def write_snapshot(self, target: Path, archive: bool) -> int:
        """Write a copy of one snapshot of the lake."""
        return write_snapshot(self._lake, target, archive, timedelta(seconds=self._retention.raw))

    def size_bytes(self) -> int | None:
        """Not known here: the files are elsewhere."""
        return None

    async def close(self) -> None:
        """Close the instance for readers."""
        await asyncio.to_thread(self._readers.close)
