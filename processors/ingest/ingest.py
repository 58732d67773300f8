"""Ingest of a stream into the database: fetch, decode and write overlap, each at most one batch ahead of the next.

A batch is committed with the sequence that it ends on, and then acknowledged. While nothing can be written, the batch
is kept and retried. The reader then stops fetching, since its buffer is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from typing import Final, NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from ...bus.layout import ensure_layout, is_permitted
from ...bus.tasks import heed_cancellation
from ...schemas import subjects
from ...schemas.instruments import ROWS, SECONDS, SIZES, Histogram
from ...schemas.metrics import METRICS
from ..storage.errors import StorageDamaged, StorageError, StoragePaused, Unstorable
from ..storage.protocol import ROW_GROUP_ROWS, Batch, HostClock, Storage
from . import facts
from .columnar import Decoder
from .deadletters import DeadLetters
from .deduplication import Arrivals
from .hostclocks import HostClocks
from .incoming import Incoming, Refusal
from .origin import Origin
from .reader import Reader, StreamReplaced

log = logging.getLogger("corral.ingest")


class Consumer(Struct, frozen=True):
    """A durable consumer of the history.

    Attributes:
        stream: that it reads.
        suffix: of its name, after the id of the history.
        batch_bytes: payload of one transaction.
        linger_seconds: how long a transaction waits for more messages. With the commit, the delay stays below 1 s.
        subjects: only these of the stream; all by default.
        part: name under which the storage keeps the watermark; the stream's by default.
    """

    stream: str
    suffix: str
    batch_bytes: int
    linger_seconds: float
    subjects: tuple[str, ...] = ()
    part: str = ""


CONSUMERS: Final = (
    Consumer(subjects.TELEMETRY_STREAM, "telemetry", 64 * 2**20, 0.3),
    Consumer(subjects.INVENTORY_STREAM, "inventory", 4 * 2**20, 0.2),
    Consumer(subjects.FACTS_STREAM, "facts", 4 * 2**20, 0.2),
    Consumer(subjects.REQUESTS_STREAM, "requests", 4 * 2**20, 0.2),
    Consumer(subjects.JOBS_STREAM, "jobs", 4 * 2**20, 0.2),
)
"""One for each stream; there are no others."""


async def permitted(js: JetStreamContext, consumers: Iterable[Consumer]) -> list[Consumer]:
    """Leave out the consumers of optional streams that the server does not let this processor read."""
    optional = {stream.name for stream in subjects.STREAMS if stream.optional}
    return [one for one in consumers if one.stream not in optional or await is_permitted(js, one.stream)]


RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0)
REST_SECONDS: Final = 2.0
"""Time limit for storing what was received, when ingest stops."""


class Counts(Struct):
    """Counters since the start.

    Attributes:
        messages: stored.
        samples: device samples stored.
        duplicates: messages that came again and changed nothing.
        impossible: values that their metrics can't have, stored as null, by metric.
        batches: transactions.
        decode_seconds: CPU time spent decoding.
        write_seconds: CPU time spent in transactions, DuckDB's own threads left out.
        batch_messages: in one transaction.
        batch_samples: device samples in one transaction that has any.
        commit_seconds: of one transaction.
    """

    messages: int = 0
    samples: int = 0
    duplicates: int = 0
    impossible: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    decode_seconds: float = 0.0
    write_seconds: float = 0.0
    batch_messages: Histogram = field(default_factory=lambda: Histogram(SIZES))
    batch_samples: Histogram = field(default_factory=lambda: Histogram(ROWS))
    commit_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))


class _Decoded(NamedTuple):
    """A batch, its accepted messages in any order, its refused ones, and the reply subject to acknowledge it on."""

    batch: Batch
    accepted: list[Incoming]
    refused: list[Refusal]
    reply: bytes


def _logged(changed: Sequence[HostClock]) -> Sequence[HostClock]:
    """Log whose clock is off, or right again, and return the clocks."""
    for clock in changed:
        if clock.until_ns is not None:
            log.info("the clock of %s is correct again", clock.host)
        elif clock.offset_seconds > 0:
            log.warning("the clock of %s is %.0f s ahead: its times are corrected", clock.host, clock.offset_seconds)
        else:
            log.warning("the clock of %s is %.0f s behind, and so are its times", clock.host, -clock.offset_seconds)
    return changed


def _always(_host: str, _agent: str, _sequence: int) -> bool:
    """Treat every message as new."""
    return True


class Ingest:
    """Ingests one stream into a storage while `run` runs.

    Args:
        nc: connection to the bus.
        storage: to write to.
        consumer: which stream, and how.
        dead_letters: where refused messages go.
        make_streams: creates missing streams; those of `subjects.STREAMS` by default.
        origin: for a stream that mirrors another one: decides which of its messages are to be stored.
        unread_seconds: how long messages may wait for more while nobody calls `flush`; 0 for the consumer's linger.
        stored: called after each transaction, in the thread that wrote it.

    Attributes:
        counts: see `Counts`.
        paused: why nothing is stored at the moment; empty while it is.
        begun: true once reading has started from the storage's watermark; false again if the stream is gone.
        part: name in the storage of what it reads.
    """

    def __init__(
        self,
        nc: Client,
        storage: Storage,
        consumer: Consumer,
        dead_letters: DeadLetters,
        make_streams: Callable[[], Awaitable[None]] | None = None,
        origin: Origin | None = None,
        unread_seconds: float = 0.0,
        stored: Callable[[], None] | None = None,
    ) -> None:
        self.consumer = consumer
        self._unread_seconds = unread_seconds
        self._on_stored = stored
        self._make_streams = make_streams or partial(ensure_layout, nc.jetstream())
        self.part = consumer.part or consumer.stream
        self._storage = storage
        self._dead_letters = dead_letters
        self._origin = origin
        self._reader = Reader(
            nc,
            consumer.stream,
            f"history-{storage.processor}-{consumer.suffix}",
            filter_subjects=consumer.subjects,
            buffer_bytes=2 * consumer.batch_bytes,
            with_headers=origin is not None,
        )
        self._arrivals = Arrivals()
        self._clocks = HostClocks()
        self._without_processes: set[str] = set()
        self._decoder = Decoder(storage.series, self._clocks)
        self._decoding = threading.Lock()
        self._threads = ThreadPoolExecutor(2, f"ingest-{consumer.suffix}")
        self._bytes_per_sample = 0.0
        self._stored = 0
        """Sequence of the last message that is stored, or that reading started after."""
        self._progress = asyncio.Event()
        self.counts = Counts()
        self.paused = ""
        self.begun = False

    @property
    def lag_seconds(self) -> float:
        """Age of the last message received, in seconds, while more are pending; 0 if none are."""
        return self._reader.lag_seconds

    @property
    def lag_messages(self) -> int:
        """Number of messages in the stream that have not been fetched yet."""
        return self._reader.pending

    @property
    def received(self) -> int:
        """Sequence of the last message received."""
        return self._reader.received

    def watermarks(self) -> dict[str, int]:
        """Last stored sequence of each stream in the storage."""
        return self._storage.watermarks()

    async def flush(self, timeout_seconds: float) -> bool:
        """Store what has been received until now; False if that has not succeeded in time."""
        wanted = self._reader.received
        if self.paused:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while self.begun and self._stored < wanted:
                    self._progress.clear()
                    self._reader.hurry()
                    await self._progress.wait()
        return self._stored >= wanted

    async def run(self) -> None:
        """Read, decode and write until cancelled; then store what was received."""
        try:
            while True:
                while not await self._begin():
                    heed_cancellation()
                    await asyncio.sleep(RETRY_SECONDS[0])
                decoded: asyncio.Queue[_Decoded | None] = asyncio.Queue(1)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._decode_all(decoded))
                    tasks.create_task(self._write_all(decoded))
        finally:
            if self._origin is not None:
                self._origin.end(self.part)
            await self._reader.stop()
            await self._store_rest()
            self._threads.shutdown(wait=True, cancel_futures=True)

    async def _begin(self) -> bool:
        """Start reading after what is stored; False if the bus is unavailable, or the stream is missing."""
        stream = self.part
        loop = asyncio.get_running_loop()
        try:
            created, last = await self._reader.identify()
            after = await loop.run_in_executor(self._threads, self._storage.resume, stream, created, last)
            marked_ns = await loop.run_in_executor(self._threads, self._storage.marked_ns, stream)
            stored = await loop.run_in_executor(self._threads, self._storage.arrivals, stream)
            self._arrivals = Arrivals(stored)
            self._without_processes.clear()
            self._clocks = HostClocks(await loop.run_in_executor(self._threads, self._storage.clocks))
            self._decoder = Decoder(self._storage.series, self._clocks)
            await self._reader.start(after, marked_ns)
            self._reader.taken = self._stored = after
            self._progress.set()
            if self._origin is not None:
                self._origin.begin(stream, after)
        except NotFoundError:
            self.begun = False
            log.warning("%s is gone: creating it again", stream)
            await self._create_streams()
            return False
        except (NatsError, TimeoutError) as error:
            log.warning("%s can't be read yet: %r", stream, error)
            return False
        log.info("%s: reading from %d", stream, after + 1)
        self.begun = True
        return True

    async def _create_streams(self) -> None:
        """Create missing streams: a server that lost its disk has none, and collectors may not create any."""
        with contextlib.suppress(NatsError, TimeoutError, OSError):
            await self._make_streams()

    async def _decode_all(self, decoded: asyncio.Queue[_Decoded | None]) -> None:
        """Decode batches until the stream is replaced; then put None, which ends the writer."""
        loop = asyncio.get_running_loop()
        while True:
            heed_cancellation()
            try:
                taken = await self._reader.take(self._batch_bytes(), self.consumer.linger_seconds, self._unread_seconds)
            except StreamReplaced as replaced:
                log.warning("%s: %s", self.consumer.stream, replaced)
                return await decoded.put(None)
            messages, newest = taken, taken[-1]
            if self._origin is not None:
                messages = await self._origin.passed(self._reader.created, messages)
            batch, accepted, refused = await loop.run_in_executor(self._threads, self._decode, messages, None, newest)
            await decoded.put(_Decoded(batch, accepted, refused, newest.reply))

    def _batch_bytes(self) -> int:
        """Payload of the next batch, in bytes: whole row groups of samples, estimated from the last batch.

        DuckDB writes each large transaction as separate row groups, and a checkpoint then rewrites those that are
        partly filled: a quarter of a row group too many costs as much as all others together.
        """
        group = ROW_GROUP_ROWS * self._bytes_per_sample * 0.998
        groups = int(self.consumer.batch_bytes / group) if group else 0
        return int(groups * group) if groups else self.consumer.batch_bytes

    async def _write_all(self, decoded: asyncio.Queue[_Decoded | None]) -> None:
        while True:
            heed_cancellation()
            item = await decoded.get()
            if item is None:
                return
            if item.refused:
                await self._dead_letters.publish(self.consumer.stream, item.refused)
            try:
                await self._commit(item.batch)
            except Unstorable as error:
                log.warning("%s: searching for the bad message: %s", self.consumer.stream, error)
                await self._commit_parts(item.batch, sorted(item.accepted, key=attrgetter("sequence")))
                nothing = replace(
                    item.batch,
                    samples=None,
                    tables={},
                    inventories=(),
                    leases=(),
                    requests=(),
                    request_events=(),
                    jobs=(),
                    messages=0,
                )
                await self._commit(nothing)
            self._stored = item.batch.sequence
            self._progress.set()
            await self._reader.acknowledge(item.reply)
            if self._on_stored is not None:
                await asyncio.get_running_loop().run_in_executor(self._threads, self._on_stored)

    async def _store_rest(self) -> None:
        """Store what still waits for more, unless a batch before it may not be stored: then all of it comes again."""
        if not self.begun or self.paused or self._reader.taken != self._stored or self._origin is not None:
            return
        if not (taken := self._reader.take_rest()):
            return
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError, StorageError, StoragePaused, NatsError):
            async with asyncio.timeout(REST_SECONDS):
                batch, _, refused = await loop.run_in_executor(self._threads, self._decode, taken)
                if not refused:
                    await loop.run_in_executor(self._threads, self._store, batch)
                    await self._reader.acknowledge(taken[-1].reply)

    async def _commit(self, batch: Batch) -> None:
        """Commit a batch, and retry until it works. Errors of an unstorable batch or a damaged database are raised."""
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            try:
                await loop.run_in_executor(self._threads, self._store, batch)
                break
            except (Unstorable, StorageDamaged):
                raise
            except (StoragePaused, StorageError) as error:
                if str(error) != self.paused:
                    log.error("%s: paused, retrying: %s", self.consumer.stream, error)
                self.paused = str(error)
            await asyncio.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
            tries += 1
        if self.paused:
            log.info("%s: resumed", self.consumer.stream)
            self.paused = ""

    async def _commit_parts(self, batch: Batch, messages: list[Incoming]) -> None:
        """Store the messages of a refused batch in halves, down to single ones. The refused ones are dead letters."""
        if not messages:
            return
        half = len(messages) // 2
        for part in (messages[:half], messages[half:]) if half else (messages,):
            loop = asyncio.get_running_loop()
            rows, _, _ = await loop.run_in_executor(self._threads, self._decode, part, batch)
            try:
                await self._commit(rows)
            except Unstorable as error:
                if len(part) > 1:
                    await self._commit_parts(batch, part)
                    continue
                refusal = Refusal(part[0], "unstorable", str(error))
                await self._dead_letters.publish(self.consumer.stream, [refusal])
                await self._commit(Batch(stream=batch.stream, sequence=part[0].sequence, refused={"unstorable": 1}))

    def _store(self, batch: Batch) -> None:
        began, began_at = time.thread_time(), time.perf_counter()
        self._storage.commit(batch)
        self.counts.write_seconds += time.thread_time() - began
        self.counts.commit_seconds.observe(time.perf_counter() - began_at)
        self.counts.batch_messages.observe(batch.messages)
        if batch.samples is not None:
            self.counts.batch_samples.observe(batch.samples.num_rows)
        self.counts.batches += 1
        self.counts.messages += batch.messages
        self.counts.samples += batch.samples.num_rows if batch.samples is not None else 0

    def _decode(
        self, messages: Sequence[Incoming], whole: Batch | None = None, newest: Incoming | None = None
    ) -> tuple[Batch, list[Incoming], list[Refusal]]:
        """Decode messages into a batch.

        Args:
            messages: to decode.
            whole: the batch that they are a part of, if that could not be stored. They are not deduplicated again, and
                the part gets the arrivals and clocks of the whole.
            newest: message that the batch ends on, if that is not the last of `messages`.
        """
        with self._decoding:  # parts are decoded while the next batch is
            return self._decode_one(messages, whole, newest or messages[-1])

    def _decode_one(
        self, messages: Sequence[Incoming], whole: Batch | None, newest: Incoming
    ) -> tuple[Batch, list[Incoming], list[Refusal]]:
        is_new = self._arrivals.is_new if whole is None else _always
        began = time.thread_time()
        now_ns = time.time_ns()
        prefix = subjects.SAMPLES + "."
        columnar, others = messages, []
        if not all(subject.startswith(prefix) for subject in {message.subject for message in messages}):
            columnar = [message for message in messages if message.subject.startswith(prefix)]
            others = [message for message in messages if not message.subject.startswith(prefix)]
        table, accepted, refused = self._decoder.decode(columnar, is_new, now_ns)
        found = facts.decode(others, is_new, now_ns, self._clocks, self._without_processes)
        accepted += found.accepted
        refused = [*refused, *found.refused]
        self.counts.duplicates += found.duplicates + self._decoder.duplicates
        self._decoder.duplicates = 0
        self._count_impossible(self._decoder.impossible)
        if table is not None and table.num_rows > ROW_GROUP_ROWS // 2:
            self._bytes_per_sample = sum([len(message.payload) for message in messages]) / table.num_rows
        codes: dict[str, int] = {}
        for refusal in refused:
            codes[refusal.code] = codes.get(refusal.code, 0) + 1
        batch = Batch(
            stream=self.part,
            sequence=newest.sequence,
            stored_ns=newest.stored_ns,
            samples=table,
            tables=found.tables(),
            inventories=found.inventories,
            leases=found.leases,
            requests=found.requests,
            request_events=found.request_events,
            jobs=found.jobs,
            arrivals=self._arrivals.take_changed() if whole is None else whole.arrivals,
            clocks=_logged(self._clocks.take_changed()) if whole is None else whole.clocks,
            refused=codes,
            messages=len(messages) - len(refused),
        )
        self.counts.decode_seconds += time.thread_time() - began
        return batch, accepted, refused

    def _count_impossible(self, found: dict[str, int]) -> None:
        for name, number in found.items():
            if name not in self.counts.impossible:
                metric = METRICS[name]
                log.warning(
                    "%s: impossible values (outside of %s to %s) are stored as null (logged once)",
                    name, metric.minimum, metric.maximum,
                )  # fmt: skip
            self.counts.impossible[name] = self.counts.impossible.get(name, 0) + number
        found.clear()
