"""The agent: packs the readings of the reader into messages, and reports on itself.

Every message carries the agent's id and the next number of one sequence, and waits in the outbox under the message id
`<nonce>.<agent>-<sequence>`. A stream deduplicates by that id alone, whoever publishes, so other publishers must not be
able to guess the next one: hence the nonce.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...bus.process import corral_version, peak_resident_bytes, resident_bytes
from ...schemas import codec, subjects
from ...schemas.inventory import possible
from ...schemas.requests import Lease
from ...schemas.telemetry import AgentReport, DeviceEvent, Inventory, ProcessBatch, Severity
from ..processes.attribution import GRACE_SECONDS
from ..processes.violations import Attribution
from ..source import HostSource, PatientSource, Source, SourceEvent
from ..text import cleaned
from .outbox import Outbox
from .packing import MAX_MESSAGE_BYTES, Pack, Packer
from .reader import Reader, Reading

log = logging.getLogger("corral.collector")

REPORT_SECONDS: Final = 10.0
PROCESSES_SECONDS: Final = 10.0
HANG_SECONDS: Final = 10.0
"""A read that takes longer, and longer than three intervals, is reported as an event."""
HIDDEN_PROCESSES: Final = (
    "processes can't be attributed to leases: this collector has its own pid namespace, and the driver "
    "gives the host's. Let it see the host's (hostPID: true on Kubernetes, --pid=host for a container)"
)
_YIELD_EVERY: Final = 64
_INVENTORY_EVENTS: Final = frozenset({"mig_changed", "device_lost", "device_returned", "driver_returned"})


class AgentSettings(Struct, frozen=True, kw_only=True):
    """Settings of an agent.

    Attributes:
        name: name of the agent: its host, or the fleet that it simulates or replays.
        interval_seconds: time between ticks.
        batch_seconds: ticks of this period share one message.
        processes_seconds: time between lists of processes; 0 publishes none.
        report_seconds: time between the agent's reports on itself.
        grace_seconds: use of a device without a lease or beyond it is reported as an event once it lasts this long.
    """

    name: str
    interval_seconds: float = 1.0
    batch_seconds: float = 0.25
    processes_seconds: float = PROCESSES_SECONDS
    report_seconds: float = REPORT_SECONDS
    grace_seconds: float = GRACE_SECONDS


class Agent:
    """One run of a collector, between a source and an outbox.

    Args:
        source: the source to read.
        outbox: queue of messages for the bus.
        settings: see `AgentSettings`.
        wake: called when the outbox has new messages.
        published: returns the number of messages that the bus has acknowledged.

    Attributes:
        id: id of this run.
        ended: done when the source has no more data, or with the error that ended it.
        identifies_processes: as in `ProcessBatch.identified`.
    """

    def __init__(
        self,
        source: Source,
        outbox: Outbox,
        settings: AgentSettings,
        *,
        wake: Callable[[], None],
        published: Callable[[], int],
    ) -> None:
        self.id = secrets.token_hex(6)
        self.settings = settings
        self._source = source
        self._outbox = outbox
        self._wake = wake
        self._published = published
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._sequence = 0
        self._samples = 0
        readings_per_batch = max(round(settings.batch_seconds / settings.interval_seconds), 1)
        if isinstance(source, PatientSource):
            # Nothing is held back between readings, so that half a buffer of room is enough for the next.
            readings_per_batch = 1
            source.limit_read(outbox.limit_bytes // 8)
        self._packer = Packer(readings_per_batch)
        self._readings: asyncio.Queue[list[Reading] | SourceEvent | None] = asyncio.Queue()
        self._reported_drops = 0
        self._leases: set[str] = set()
        self._attribution = Attribution(settings.grace_seconds, self._forward, here=isinstance(source, HostSource))
        self._hangs = False
        self._published_inventory: Inventory | None = None
        self.identifies_processes = bool(getattr(source, "identifies_processes", True))
        self._reader = Reader(
            source,
            host=settings.name,
            interval_seconds=settings.interval_seconds,
            processes_seconds=settings.processes_seconds,
            readings_per_delivery=readings_per_batch,
            deliver=self._hand_over,
            emit=self._hand_over,
            finished=self._finished,
            full=lambda: outbox.bytes > outbox.limit_bytes // 2,
        )

    @property
    def ticks(self) -> int:
        """Ticks read since the start."""
        return self._reader.ticks

    @property
    def late_ticks(self) -> int:
        """Ticks skipped since the start because an earlier one was still being read."""
        return self._reader.late_ticks

    @property
    def impossible(self) -> dict[str, int]:
        """Number of values of the driver that their metric can't have, by metric."""
        return dict(getattr(self._source, "impossible", {}))

    @property
    def read_errors(self) -> int:
        """Readings and driver calls that failed, since the start."""
        return self._reader.read_errors

    @property
    def trouble(self) -> str:
        """Reason why the source can't be read just now, in words; empty if it can."""
        busy = self._reader.busy_seconds
        if busy > max(HANG_SECONDS, 3 * self.settings.interval_seconds):
            return f"reading {self._source.name} hangs for {busy:.0f} s"
        return f"{self._source.name} can't be read" if self._reader.failing else ""

    async def run(self) -> None:
        """Read and queue messages until the data ends or the task is cancelled.

        Raises:
            Exception: whatever ended the source.
        """
        self._event("agent_started", f"collector {corral_version()} reads {self._source.name}")
        if not self.identifies_processes:
            log.warning("%s", HIDDEN_PROCESSES)
            self._event("processes_hidden", HIDDEN_PROCESSES)
        self._reader.start()
        reports = asyncio.create_task(self._report_for_ever(), name="reports")
        taking: Iterator[None] = iter(())
        try:
            while (item := await self._readings.get()) is not None:
                taking = self._take(item)
                for _ in taking:
                    await asyncio.sleep(0)
            await self.ended
        finally:
            reports.cancel()
            if not await asyncio.to_thread(self._reader.stop):
                log.error("a call of %s hangs; leaving it behind", self._source.name)
            # Finish the item that was interrupted, then take all that wait behind it.
            for _ in taking:
                await asyncio.sleep(0)
            while not self._readings.empty():
                if (item := self._readings.get_nowait()) is not None:
                    for _ in self._take(item):
                        await asyncio.sleep(0)
            for pack in self._packer.flush():
                self._put_pack(pack)
            self._report()
            self._leave()
            stopped = f"collector stopped after {self._reader.ticks} ticks"
            self._event("agent_stopped", stopped, beyond_limit=True)

    def _hand_over(self, item: list[Reading] | SourceEvent | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._readings.put_nowait, item)
        except RuntimeError:  # the loop has ended before the reader
            log.debug("dropped what was read after the end")

    def _finished(self, error: BaseException | None) -> None:
        def settle() -> None:
            if not self.ended.done():
                if error is None:
                    self.ended.set_result(None)
                else:
                    self.ended.set_exception(error)
            self._readings.put_nowait(None)

        try:
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:
            log.debug("the reader ended after the loop")

    def set_leases(self, leases: list[Lease] | None) -> None:
        """Set all leases that are active now, on this agent's hosts at least; None while they are not known."""
        self._attribution.set_leases(leases)
        if leases is None:
            return
        before, self._leases = self._leases, {lease.lease_id for lease in leases}
        if before - self._leases:
            self._reader.want_processes()

    def limit_message_bytes(self, max_payload: int) -> None:
        """Keep batches well below the server's limit of a message, so that headers and names fit, too."""
        self._packer.max_bytes = min(MAX_MESSAGE_BYTES, max_payload * 3 // 4)

    def _take(self, item: list[Reading] | SourceEvent) -> Iterator[None]:
        """Queue an item of the reader as messages; yields where other tasks should run."""
        if isinstance(item, SourceEvent):
            self._forward(item)
            return
        for reading in item:
            yield from self._take_reading(reading)
            self._reader.taken += 1
        self._wake()

    def _take_reading(self, reading: Reading) -> Iterator[None]:
        for inventory in reading.inventory or ():
            told = replace(
                inventory,
                devices=[possible(device) for device in inventory.devices],
                agent=self.id,
                source=self._source.name,
                interval_seconds=self.settings.interval_seconds,
            )
            self._put(subjects.inventory_subject(inventory.host.name), told)
            if isinstance(self._source, HostSource):
                self._published_inventory = told
        for count, pack in enumerate(self._packer.add(reading.ticks), start=1):
            self._put_pack(pack)
            if count % _YIELD_EVERY == 0:
                # A fleet's tick is thousands of messages: let those that wait be sent meanwhile.
                self._wake()
                yield
        for host, seen in (reading.processes or {}).items():
            processes = seen
            if self.identifies_processes:
                processes = self._attribution.take(host, seen, reading.ancestry, reading.time_ns)
            batch = ProcessBatch(
                host=host,
                agent=self.id,
                sequence=self._next(),
                time_ns=reading.time_ns,
                processes=processes,
                identified=self.identifies_processes,
                unreadable=list(reading.unreadable),
            )
            self._put(subjects.processes_subject(host), batch, sequence=batch.sequence)

    def _forward(self, event: SourceEvent, *, beyond_limit: bool = False) -> None:
        if event.kind in _INVENTORY_EVENTS:
            self._reader.want_inventory()
        sequence = self._next()
        message = DeviceEvent(
            host=event.host,
            agent=self.id,
            sequence=sequence,
            time_ns=event.time_ns,
            kind=event.kind,
            severity=event.severity,
            device=event.device,
            code=event.code,
            message=event.message,
            data=event.data,
        )
        self._put(subjects.events_subject(event.host), message, sequence=sequence, beyond_limit=beyond_limit)
        self._wake()

    def _event(
        self,
        kind: str,
        message: str,
        severity: Severity = Severity.INFO,
        *,
        beyond_limit: bool = False,
        **data: str | int | float,
    ) -> None:
        """Queue an event about the agent itself."""
        self._forward(
            SourceEvent(
                host=self.settings.name,
                time_ns=time.time_ns(),
                kind=kind,
                severity=severity,
                message=message,
                data=dict(data),
            ),
            beyond_limit=beyond_limit,
        )

    async def _report_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.report_seconds)
            self._report()

    def _watch(self) -> None:
        """Report that a read hangs, or no longer does: the thread that makes the driver call can't."""
        busy = self._reader.busy_seconds
        hangs = busy > max(HANG_SECONDS, 3 * self.settings.interval_seconds)
        if hangs and not self._hangs:
            log.error("reading %s hangs for %.0f s now", self._source.name, busy)
            self._event("driver_hangs", f"reading {self._source.name} hangs for {busy:.0f} s now", Severity.WARNING)
        elif self._hangs and not hangs:
            log.warning("reading %s goes on", self._source.name)
            self._event("driver_returned", f"reading {self._source.name} goes on", Severity.CLEARED)
        self._hangs = hangs

    def _report(self) -> None:
        """Report dropped messages and the agent's state; nothing is dropped to make room for these messages."""
        self._watch()
        dropped = self._outbox.dropped_messages
        if dropped > self._reported_drops:
            lost = dropped - self._reported_drops
            self._reported_drops = dropped
            self._event(
                "samples_dropped",
                f"{lost} messages were dropped: the buffer of {self._outbox.limit_bytes} bytes was full, "
                "the disk spoilt them, or the bus takes none so large",
                Severity.WARNING,
                beyond_limit=True,
                messages=lost,
                messages_total=dropped,
                samples_total=self._outbox.dropped_samples,
            )
        mean, longest = self._reader.durations()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        report = AgentReport(
            host=self.settings.name,
            agent=self.id,
            sequence=self._next(),
            time_ns=time.time_ns(),
            source=self._source.name,
            ticks=self._reader.ticks,
            samples=self._samples,
            late_ticks=self._reader.late_ticks,
            read_seconds_mean=mean,
            read_seconds_max=longest,
            read_errors=self._reader.read_errors,
            published_messages=self._published(),
            buffered_bytes=self._outbox.bytes,
            dropped_messages=dropped,
            dropped_samples=self._outbox.dropped_samples,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            resident_bytes=resident_bytes() or peak_resident_bytes(),
            corral_version=corral_version(),
            processes_identified=self.identifies_processes,
        )
        self._put(subjects.agent_subject(self.settings.name), report, sequence=report.sequence, beyond_limit=True)
        self._wake()

    def report_drops(self) -> bool:
        """Report once more if messages were dropped since the last report; True if so."""
        untold = self._outbox.dropped_messages > self._reported_drops
        if untold:
            self._report()
        return untold

    def _leave(self) -> None:
        """Release the devices for other host names: a machine that was renamed goes on under its new name."""
        if self._published_inventory is not None:
            left = replace(self._published_inventory, time_ns=time.time_ns(), leaving=True)
            self._put(subjects.inventory_subject(left.host.name), left, beyond_limit=True)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _put_pack(self, pack: Pack) -> None:
        sequence = self._next()
        self._samples += pack.samples
        self._put(
            subjects.samples_subject(pack.host),
            pack.batch(self.id, sequence, self._source.name),
            sequence=sequence,
            samples=pack.samples,
        )

    def _put(
        self,
        subject: str,
        message: Struct,
        *,
        sequence: int | None = None,
        samples: int = 0,
        beyond_limit: bool = False,
    ) -> None:
        number = self._next() if sequence is None else sequence
        try:
            payload = codec.encode(message)
        except UnicodeEncodeError:  # a name that no source has cleaned must not stop the agent
            payload = codec.encode(cleaned(message))
        message_id = f"{secrets.token_hex(8)}.{self.id}-{number}"
        self._outbox.put(subject, message_id, payload, samples, beyond_limit=beyond_limit)
