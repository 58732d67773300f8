"""From a stream to the database: fetch, decode and write overlap, each at most one batch ahead of the next.

A batch is committed with the sequence that it ends on, and acknowledged after that. While nothing can be written the
batch is kept and tried again; the reader then stops by itself, since what may wait in it is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from msgspec import Struct
from nats.aio.client import Client

from ..schemas import bus
from . import facts
from .arrivals import Arrivals
from .columnar import Decoder, Incoming, Refusal
from .deadletters import DeadLetters
from .reader import Reader
from .storage.errors import StorageError, StoragePaused
from .storage.interface import Batch, Storage

log = logging.getLogger("corral.ingest")


class Consumer(Struct, frozen=True):
    """A durable consumer of the history.

    Attributes:
        stream: that it reads.
        suffix: what its name ends on, behind the id of the history.
        batch_bytes: payload of one transaction.
        linger_seconds: a transaction waits so long for more; with the commit it bounds the delay to less than 1 s.
    """

    stream: str
    suffix: str
    batch_bytes: int
    linger_seconds: float


CONSUMERS: Final = (
    Consumer(bus.TELEMETRY_STREAM, "telemetry", 32 * 2**20, 0.3),
    Consumer(bus.FACTS_STREAM, "facts", 4 * 2**20, 0.2),
)
"""One for each stream; there are no others."""

RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0)


class Counts(Struct):
    """What was done since the start.

    Attributes:
        messages: stored.
        samples: device samples stored.
        duplicates: messages that came again and changed nothing.
        batches: transactions.
        decode_seconds: spent decoding.
        write_seconds: spent in transactions.
    """

    messages: int = 0
    samples: int = 0
    duplicates: int = 0
    batches: int = 0
    decode_seconds: float = 0.0
    write_seconds: float = 0.0


class _Decoded(NamedTuple):
    batch: Batch
    refused: list[Refusal]
    reply: str


class Ingest:
    """Brings one stream into a storage, for as long as `run` runs.

    Args:
        nc: connection to the bus.
        storage: to write to.
        consumer: which stream, and how.
        dead_letters: where refused messages go.

    Attributes:
        counts: see `Counts`.
        paused: why nothing is stored at the moment; empty while it is.
    """

    def __init__(self, nc: Client, storage: Storage, consumer: Consumer, dead_letters: DeadLetters) -> None:
        self.consumer = consumer
        self._storage = storage
        self._dead_letters = dead_letters
        self._reader = Reader(
            nc,
            consumer.stream,
            f"history-{storage.processor}-{consumer.suffix}",
            buffer_bytes=2 * consumer.batch_bytes,
        )
        self._arrivals = Arrivals()
        self._decoder = Decoder(storage.series, self._arrivals.is_new)
        self._threads = ThreadPoolExecutor(2, f"ingest-{consumer.suffix}")
        self.counts = Counts()
        self.paused = ""

    @property
    def lag_messages(self) -> int:
        """Messages in the stream that have not been fetched yet."""
        return self._reader.pending

    async def run(self) -> None:
        """Read, decode and write until cancelled."""
        stream = self.consumer.stream
        loop = asyncio.get_running_loop()
        created = await self._reader.identify()
        after = await loop.run_in_executor(self._threads, self._storage.resume, stream, created)
        stored = await loop.run_in_executor(self._threads, self._storage.arrivals, stream)
        self._arrivals = Arrivals(stored)
        self._decoder = Decoder(self._storage.series, self._arrivals.is_new)
        await self._reader.start(after)
        log.info("%s: reading from %d", stream, after + 1)
        decoded: asyncio.Queue[_Decoded] = asyncio.Queue(1)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._decode_all(decoded))
                tasks.create_task(self._write_all(decoded))
        finally:
            await self._reader.stop()
            self._threads.shutdown(wait=True, cancel_futures=True)

    async def _decode_all(self, decoded: asyncio.Queue[_Decoded]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = await self._reader.take(self.consumer.batch_bytes, self.consumer.linger_seconds)
            messages = [message for message, _ in taken]
            batch, refused = await loop.run_in_executor(self._threads, self._decode, messages)
            await decoded.put(_Decoded(batch, refused, taken[-1][1]))

    async def _write_all(self, decoded: asyncio.Queue[_Decoded]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch, refused, reply = await decoded.get()
            if refused:
                await self._dead_letters.publish(self.consumer.stream, refused)
            tries = 0
            while True:
                try:
                    await loop.run_in_executor(self._threads, self._commit, batch)
                    break
                except (StoragePaused, StorageError) as error:
                    if str(error) != self.paused:
                        log.error("%s: paused, and tried again until it works: %s", self.consumer.stream, error)
                    self.paused = str(error)
                await asyncio.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                tries += 1
            if self.paused:
                log.info("%s: goes on", self.consumer.stream)
                self.paused = ""
            await self._reader.acknowledge(reply)

    def _commit(self, batch: Batch) -> None:
        began = time.perf_counter()
        self._storage.commit(batch)
        self.counts.write_seconds += time.perf_counter() - began
        self.counts.batches += 1
        self.counts.messages += batch.messages
        self.counts.samples += batch.samples.num_rows if batch.samples is not None else 0

    def _decode(self, messages: Sequence[Incoming]) -> tuple[Batch, list[Refusal]]:
        began = time.perf_counter()
        now_ns = time.time_ns()
        prefix = bus.SAMPLES + "."
        columnar = [message for message in messages if message.subject.startswith(prefix)]
        others = [message for message in messages if not message.subject.startswith(prefix)]
        table, refused = self._decoder.decode(columnar, now_ns) if columnar else (None, [])
        found = facts.decode(others, self._arrivals.is_new, now_ns) if others else facts.Facts()
        refused = [*refused, *found.refused]
        self.counts.duplicates += found.duplicates + self._decoder.duplicates
        self._decoder.duplicates = 0
        codes: dict[str, int] = {}
        for refusal in refused:
            codes[refusal.code] = codes.get(refusal.code, 0) + 1
        batch = Batch(
            stream=self.consumer.stream,
            sequence=messages[-1].sequence,
            samples=table,
            tables=found.tables(),
            inventories=found.inventories,
            leases=found.leases,
            arrivals=self._arrivals.take_changed(),
            refused=codes,
            messages=len(messages) - len(refused),
        )
        self.counts.decode_seconds += time.perf_counter() - began
        return batch, refused
