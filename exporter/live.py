"""Last state of each host, as it arrives from the bus. The devices of a host that falls silent are no longer shown.

Samples are kept as bytes and decoded at a scrape: a fleet sends far more samples than Prometheus scrapes. A host's
messages count in the order of arrival, whatever its clock says, and for its own devices alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Final, TypeVar

import nats.aio.client
import nats.errors
from msgspec.structs import replace
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..bus import stream_reader
from ..schemas import codec, columns, speakers, subjects
from ..schemas.telemetry import AgentReport, DeviceEvent, DeviceInfo, Inventory, ProcessBatch, SampleBatch
from ..schemas.values import clocks
from .counters import CounterState, filter_counters
from .expected import EXPECTED_SECONDS, ExpectedDevices, expected
from .xids import History, Xids, concerns

log = logging.getLogger("corral.exporter")

T = TypeVar("T", SampleBatch, Inventory, DeviceEvent, AgentReport, ProcessBatch)

FORGET_SECONDS: Final = 60.0
GONE_SECONDS: Final = EXPECTED_SECONDS
"""Time without a message after which a host is forgotten: names come and go, as those of a cloud's machines."""
_LOOK_SECONDS: Final = 3600.0
"""Time between searches for such hosts."""
_PENDING: Final = 65536
PROCESSES_SECONDS: Final = 60.0
"""Time for which a list of processes counts. Collectors send one every 10 s by default."""
_READING_SECONDS: Final = 10.0
"""Time that a start waits for the events of a month; the rest of a long stream is read concurrently with scrapes."""
_ENERGY: Final = "energy_millijoules"

Block = tuple[bytes, bytes, bytes]
"""Values and nulls of one metric, and the lines that were written from them."""


class Host:
    """State of one host.

    Attributes:
        name: name of the host.
        inventory: the last inventory; None before the first.
        batch: the last good samples; None before the first.
        payload: samples message that is not decoded yet; None without one.
        report: the agent's last report on itself; None before the first.
        heard: when samples last arrived, on the monotonic clock.
        heard_ns: the same by this machine's clock, in nanoseconds since the epoch.
        clock_offset_seconds: seconds that the host's clock is ahead of this machine's; None before the first samples.
        listed: when its last inventory arrived, on the monotonic clock.
        inventory_reading: number of the reading of the streams at which the host last published an inventory live.
        seen: when samples or a stored inventory last arrived, on a clock that stops while the bus is away.
        xids: Xids of each device that has had some.
        xids_known: False while a device that is not in `xids` may have had some.
        expected: True if it was heard lately, and has not left in order.
        reported: when the report arrived, on the monotonic clock.
        processes: the last list of processes; None before the first.
        listed_processes: when it arrived, on the monotonic clock.
        labels: labels by device, as text behind a series name.
        static: lines that depend only on the inventory, by name of the family.
        blocks: lines of metrics, valid as long as the values stay the same.
        counters: accepted values of each counter of each device.
        order: the devices of the lines.
    """

    __slots__ = (
        "batch",
        "blocks",
        "clock_offset_seconds",
        "counters",
        "expected",
        "heard",
        "heard_ns",
        "inventory",
        "inventory_reading",
        "labels",
        "listed",
        "listed_processes",
        "name",
        "order",
        "payload",
        "processes",
        "report",
        "reported",
        "seen",
        "static",
        "xids",
        "xids_known",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.inventory: Inventory | None = None
        self.batch: SampleBatch | None = None
        self.report: AgentReport | None = None
        self.heard = 0.0
        self.heard_ns = 0
        self.clock_offset_seconds: float | None = None
        self.listed = 0.0
        self.inventory_reading = 0
        self.seen: float | None = None
        self.expected = False
        self.xids: dict[str, Xids] = {}
        self.xids_known = True
        self.processes: ProcessBatch | None = None
        self.listed_processes = 0.0
        self.reported = 0.0
        self.payload: bytes | None = None
        self.labels: dict[str, str] = {}
        self.static: dict[str, bytes] = {}
        self.blocks: dict[str, Block] = {}
        self.counters: dict[str, CounterState] = {}
        self.order: list[str] = []

    @property
    def devices(self) -> list[DeviceInfo]:
        """Devices that the last inventory lists; empty before the first."""
        return self.inventory.devices if self.inventory else []


class LiveFleet:
    """State of all hosts that publish on the bus.

    Args:
        nc: a connected client of the bus.
        forget_seconds: a host that sends no samples for this long is no longer shown.
        clock: returns monotonic seconds.
        processes: True to follow the lists of processes, too.
    """

    def __init__(
        self,
        nc: nats.aio.client.Client,
        *,
        forget_seconds: float = FORGET_SECONDS,
        processes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nc = nc
        self.forget_seconds = forget_seconds
        self.clock = clock
        self.processes = processes
        self.messages = 0
        self.undecodable = 0
        self._owners = speakers.Owners()
        self._refused: dict[str, dict[str, str]] = {}
        self._readings = 0
        self._look_again = 0.0
        self._away_since: float | None = None
        self._away_seconds = 0.0
        self._xids = History()
        self._boards = ExpectedDevices()
        self._reading: asyncio.Task[None] | None = None
        self._hosts: dict[str, Host] = {}
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        """Subscribe, then read the last inventories of each host and all events that the streams keep."""
        self._readings += 1
        for prefix, take in (
            (subjects.SAMPLES, self.take_samples),
            (subjects.INVENTORY, self.take_inventory),
            (subjects.EVENTS, self.take_event),
            (subjects.AGENTS, self.take_report),
            *([(subjects.PROCESSES, self.take_processes)] if self.processes else ()),
        ):

            async def on_message(message: Msg, take: Callable[[str, bytes], None] = take) -> None:
                take(message.subject, message.data)

            self._subscriptions.append(
                await self.nc.subscribe(f"{prefix}.*", cb=on_message, pending_msgs_limit=_PENDING)
            )
        await self.nc.flush()
        await self._read_streams()

    async def catch_up(self) -> None:
        """Read what the streams still have, after the bus was away.

        Where they can't be read (no stream yet, no permission), live messages bring the same within a minute.
        """
        if self._away_since is not None:
            self._away_seconds += self.clock() - self._away_since
            self._away_since = None
        self._readings += 1
        await self._read_streams()

    def away(self) -> None:
        """Record that the bus is away: no host counts as silent meanwhile."""
        if self._away_since is None:
            self._away_since = self.clock()

    @property
    def reads(self) -> bool:
        """True if the streams are being read, for the first time or after an outage."""
        return self._reading is not None and not self._reading.done()

    async def _read_streams(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._xids.begin()
        self._reading = asyncio.create_task(self._read_all())
        await asyncio.wait([self._reading], timeout=_READING_SECONDS)

    async def _read_all(self) -> None:
        complete = False
        try:
            await self._read(subjects.INVENTORY_STREAM, f"{subjects.INVENTORY}.*", self._take_stored_inventory)
            complete = await self._read(subjects.FACTS_STREAM, f"{subjects.EVENTS}.*", self._take_stored_event)
        finally:
            if self._reading is asyncio.current_task():  # else another has begun
                self._xids.end(complete=complete)

    async def stop(self) -> None:
        """Stop reading, and unsubscribe."""
        if self._reading is not None:
            self._reading.cancel()
        for subscription in self._subscriptions:
            if not self.nc.is_closed:
                await subscription.unsubscribe()

    async def _read(self, stream: str, subject: str, take: Callable[[str, bytes, float], None]) -> bool:
        """Read the stored messages of a subject; True if they were read to the end."""
        try:
            async with contextlib.aclosing(stream_reader.read_direct(self.nc, stream, subject)) as messages:
                async for message in messages:
                    take(message.subject, message.data, message.stored_at)
        except (nats.errors.Error, TimeoutError) as error:
            log.warning(
                "%s can't be read from a stream (%s): only new messages are used", subject, type(error).__name__
            )
            return False
        return True

    def take_samples(self, subject: str, data: bytes) -> None:
        """Keep a samples message until the next scrape, or until a newer one arrives."""
        host = self._host(subject)
        host.payload = data
        host.heard = self.clock()
        host.seen = self._awake()
        host.heard_ns = time.time_ns()
        self._owners.hear(host.name, host.heard_ns * 1e-9)
        self.messages += 1

    def take_inventory(self, subject: str, data: bytes) -> None:
        """Take an inventory that a host publishes now."""
        self._forget_gone()
        host = self._host(subject)
        host.inventory_reading = self._readings
        if host.seen is None:
            host.seen = self._awake()
        self._take_inventory(subject, data, time.time())

    def _take_stored_inventory(self, subject: str, data: bytes, stored_at: float) -> None:
        """Take an inventory of the stream, unless the host has published one live since the reading began."""
        host = self._host(subject)
        if host.inventory_reading < self._readings:
            if host.heard == 0.0:  # not heard since this exporter's start: silent since then at the least
                host.seen = self._awake() - max(0.0, time.time() - stored_at if math.isfinite(stored_at) else 0.0)
            self._take_inventory(subject, data, stored_at)

    def _take_inventory(self, subject: str, data: bytes, at: float) -> None:
        inventory = self._decoded(subject, data, Inventory)
        if inventory is None:
            return
        host = self._host(subject)
        host.listed = self.clock()
        others = self._owners.claim(host.name, [device.uuid for device in inventory.devices], at)
        if inventory.leaving:  # the machine may go on under another name at once
            self._owners.leave(host.name)
            host.heard = -math.inf
        self._refuse_devices(host.name, others)
        if others:
            inventory = replace(inventory, devices=[d for d in inventory.devices if d.uuid not in others])
        changed = (
            host.inventory is None
            or host.inventory.devices != inventory.devices
            or host.inventory.host != inventory.host
        )
        host.inventory = inventory
        if not inventory.leaving:
            self._boards.take(host.name, inventory.devices, at)
        if changed:
            host.labels, host.static, host.blocks = {}, {}, {}

    def _forget_gone(self) -> None:
        """Forget hosts that are gone. It runs in the thread that takes messages, since other threads write pages."""
        now = self.clock()
        if now < self._look_again:
            return
        self._look_again = now + _LOOK_SECONDS
        for name, host in self._hosts.copy().items():
            if now - max(host.heard, host.reported, host.listed) >= GONE_SECONDS:
                self._hosts.pop(name, None)
                self._refused.pop(name, None)
                self._owners.forget(name)
                self._xids.forget(name)
                self._boards.forget(name)

    def take_event(self, subject: str, data: bytes) -> None:
        """Take an event about an Xid of a device, its reset, or its start."""
        if not concerns(data):
            return
        event = self._decoded(subject, data, DeviceEvent)
        if event is None or event.device is None:
            return
        now = time.time()
        self._boards.take_event(event, now)
        if self._xids.take(event, now):
            self._parts_were_reset(event.host, event.device)

    def _take_stored_event(self, subject: str, data: bytes, stored_at: float) -> None:
        """Take an event of the stream."""
        if not concerns(data):
            return
        event = self._decoded(subject, data, DeviceEvent)
        if event is not None:
            self._boards.take_event(event, stored_at)
            self._xids.take_stored(event, stored_at, self._parts(event.host, event.device or ""))

    def _parts(self, host: str, whole: str) -> list[str]:
        """MIG instances of a device, which are reset with it."""
        found = self._hosts.get(host)
        return [device.uuid for device in found.devices if device.mig_parent == whole] if found is not None else []

    def _parts_were_reset(self, host: str, whole: str) -> None:
        for part in self._parts(host, whole):
            if (xids := self._xids.of(host, part)) is not None:
                xids.reset()

    def take_report(self, subject: str, data: bytes) -> None:
        """Take an agent's report on itself."""
        report = self._decoded(subject, data, AgentReport)
        if report is None:
            return
        host = self._host(subject)
        host.report, host.reported = report, self.clock()

    def take_processes(self, subject: str, data: bytes) -> None:
        """Take the list of a host's processes."""
        batch = self._decoded(subject, data, ProcessBatch)
        if batch is None:
            return
        host = self._host(subject)
        host.processes, host.listed_processes = batch, self.clock()

    def hosts(self) -> list[Host]:
        """Hosts that were heard lately, by name, with their samples decoded."""
        now = self.clock()
        shown: list[Host] = []
        for name, host in sorted(self._hosts.copy().items()):
            if host.reported and now - host.reported > self.forget_seconds:
                host.report = None
            if now - host.heard > self.forget_seconds:
                host.batch, host.payload, host.blocks = None, None, {}
                if host.report is None and host.inventory is None:
                    self._hosts.pop(name, None)
                if host.report is None:
                    continue
            if now - host.listed_processes > PROCESSES_SECONDS:
                host.processes = None
            payload, host.payload = host.payload, None
            if payload is not None:
                self._open(host, payload)
            host.xids = self._xids_of(host)
            host.xids_known = self._xids.settled
            shown.append(host)
        return shown

    def known(self) -> list[Host]:
        """Every host that has published an inventory, by name, whether it was heard lately or not."""
        now = self.clock()
        hosts = [host for _, host in sorted(self._hosts.copy().items()) if host.inventory is not None]
        heard = {host.name: host for host in hosts if now - host.heard <= self.forget_seconds}
        listed = {device.uuid for host in heard.values() for device in host.devices}
        for host in hosts:
            assert host.inventory is not None
            elsewhere = set[str]() if host.name in heard else listed
            host.expected = expected(host.inventory, self.age_seconds(host), elsewhere)
            if host.name not in heard:
                found = self._xids_of(host) if host.expected else {}
                host.xids = {uuid: xids for uuid, xids in found.items() if xids.fatal}
        return hosts

    def _xids_of(self, host: Host) -> dict[str, Xids]:
        uuids = (device.uuid for device in host.devices)
        return {uuid: xids for uuid in uuids if (xids := self._xids.of(host.name, uuid)) is not None}

    def missing(self) -> list[DeviceInfo]:
        """Boards that their hosts had lately and no longer have."""
        inventories = {name: host.inventory for name, host in self._hosts.copy().items() if host.inventory is not None}
        return self._boards.missing(inventories, time.time())

    def age_seconds(self, host: Host) -> float:
        """Seconds since samples last arrived, without the time in which the bus was away; infinite before the first."""
        return math.inf if host.seen is None else max(0.0, self._awake() - host.seen)

    def _awake(self) -> float:
        """Monotonic seconds on a clock that stops while the bus is away."""
        now = self.clock() if self._away_since is None else self._away_since
        return now - self._away_seconds

    def _open(self, host: Host, payload: bytes) -> None:
        batch = self._decoded(subjects.samples_subject(host.name), payload, SampleBatch)
        if batch is None:
            return
        try:
            columns.check(batch)
        except codec.DecodeError as error:
            self._refuse(host.name, error)
            return
        batch = columns.possible(batch)
        self._check_energy(host.name, batch)
        host.batch = filter_counters(batch, host.counters, self.clock())
        host.clock_offset_seconds = clocks.offset_seconds(batch.times_ns, host.heard_ns)

    def _check_energy(self, host: str, batch: SampleBatch) -> None:
        """Treat an energy counter that begins anew as a reset of its device, which no event has reported."""
        marked = [
            (at, xids) for at, uuid in enumerate(batch.devices) if (xids := self._xids.of(host, uuid)) is not None
        ]
        if not marked or (energy := columns.column(batch, _ENERGY)) is None:
            return
        last = energy[-len(batch.devices) :]
        for at, xids in marked:
            if (value := last[at]) is not None and xids.look(value, self.clock()):
                self._parts_were_reset(host, batch.devices[at])

    def _host(self, subject: str) -> Host:
        name = subject.rpartition(".")[2]
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(name)
        return host

    def _decoded(self, subject: str, data: bytes, type: type[T]) -> T | None:
        try:
            message = codec.decode(data, type)
            speakers.check(message, subject)
            return message
        except codec.DecodeError as error:
            self._refuse(subject, error)
            return None

    def _refuse_devices(self, host: str, others: dict[str, str]) -> None:
        known = self._refused.pop(host, {})
        if others:
            self._refused[host] = others
        for device, owner in others.items() - known.items():
            log.warning("%s reports %s, a device of %s: it is shown for that host only", host, device, owner)

    def _refuse(self, subject: str, error: codec.DecodeError) -> None:
        self.undecodable += 1
        log.debug("%s: %s", subject, error)
