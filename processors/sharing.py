"""Several processors that share one history: each ingests the parts that it owns into the lake, until cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid

from ..schemas import bus
from . import partitions
from .deadletters import DeadLetters
from .ingest import Ingest
from .storage import upkeep
from .storage.errors import Deposed, StorageError, StoragePaused
from .storage.lake import Lake, LakePart, prepare

log = logging.getLogger("corral.processor")


async def share(
    lake: Lake,
    count: int,
    *,
    nats_url: str | None = None,
    wait_seconds: float | None = None,
    ready: asyncio.Event | None = None,
) -> None:
    """Bring this processor's parts of what is published into a lake, until cancelled.

    Args:
        lake: that all of them write.
        count: partitions of the samples; the same for all.
        nats_url: see `bus.connect`.
        wait_seconds: give up after so long where no server answers at the start; None tries for ever.
        ready: set once it takes parts.

    Raises:
        StorageError: the lake can't be used; the message says why and what to do.
        StoragePaused: its catalog does not answer at the start.
        BusUnavailable: no server answered.
    """
    history = await asyncio.to_thread(prepare, lake, count)
    owner = uuid.uuid4().hex[:12]
    nc = await bus.connect(nats_url, name=f"processor-{history}-{owner}", wait_seconds=wait_seconds)
    try:
        js = nc.jetstream()
        await bus.ensure_layout(js)
        await partitions.ensure_stream(js, count)
        letters = DeadLetters(js)
        consumers = partitions.consumers(count)

        async def work(part: str) -> None:
            if part == partitions.UPKEEP:
                await upkeep.run(lake)
                return
            storage = await asyncio.to_thread(LakePart, lake, history, part)
            try:
                await Ingest(nc, storage, consumers[part], letters).run()
            except* Deposed as gone:
                log.warning("%s", gone.exceptions[0])
            except* (StorageError, StoragePaused) as failed:
                log.error("%s: %s", part, failed.exceptions[0])
            finally:
                await asyncio.to_thread(storage.close)

        claims = partitions.Claims(nc, history, owner, [*consumers, partitions.UPKEEP], work)
        log.info("processor %s shares the history %s, in %d partitions", owner, history, count)
        if ready is not None:
            ready.set()
        await claims.run()
    finally:
        with contextlib.suppress(Exception):
            await nc.close()
