"""Ingests telemetry from NATS into the fleet: live messages as they come, and the streams to catch up.

Live messages come by core NATS subscriptions, which have no consumer that could fall behind. The streams are read at
the start and after each reconnection: the last message of each host for samples, processes and inventory, and every
message for device events. The fleet ignores messages that it has seen already, so overlap does no harm.

Of samples and process lists only the newest message of a host is decoded. Messages are decoded a few at a time, so that
a burst of telemetry delays a request by a few decodings at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from datetime import UTC, datetime
from itertools import islice
from typing import Final

from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import api

from ..bus.elapsed import elapsed_seconds
from ..bus.stream_reader import read, server_time
from ..schemas import codec, inventory, speakers, subjects
from ..schemas.telemetry import DeviceEvent, Inventory, ProcessBatch, SampleBatch
from ..schemas.values.clocks import AHEAD_SECONDS
from .fleet.device import Fault
from .fleet.faults import to_keep
from .fleet.fleet import ClockSet, Fleet, apply

log = logging.getLogger("corral.planner.telemetry")

_TYPES: Final[tuple[tuple[str, type[Struct]], ...]] = (
    (f"{subjects.SAMPLES}.", SampleBatch),
    (f"{subjects.PROCESSES}.", ProcessBatch),
    (f"{subjects.INVENTORY}.", Inventory),
    (f"{subjects.EVENTS}.", DeviceEvent),
)
_SPOKEN: Final = (SampleBatch, ProcessBatch, Inventory, DeviceEvent)
_NEWEST_ONLY: Final = (SampleBatch, ProcessBatch)
_SLICE: Final = 8
"""Messages that are decoded before the event loop runs other tasks."""
_SETTLED_SECONDS: Final = 5.0
"""Age from which on messages of the stream count as folded in."""
_OVERLAP_SECONDS: Final = 10.0
"""Overlap: after a reconnection, events are read from so long before the connection was lost."""
_HEADROOM_BYTES: Final = 16 * 1024
"""Room that is left in a message for all but the faults that it carries."""
_WATCH_SECONDS: Final = 1.0
_SET_SECONDS: Final = 1.0
"""Smaller steps of the clock are ignored: they are no worse than variations of message latency."""
_JUMP_SECONDS: Final = 5.0
"""If a wait took longer than asked for by this, the clock was set or this process did not run."""


class Health(Struct, frozen=True, kw_only=True):
    """Snapshot of the faults of devices and hosts in the bucket, which saves reading weeks of events.

    Attributes:
        sequence: last sequence of the facts stream whose event is included.
        faults: as in `Fleet.faults`, cut to those that matter.
    """

    sequence: int
    faults: dict[str, Fault]


class Telemetry:
    """Keeps a fleet up to date.

    Args:
        nc: a separate connection, so that telemetry and requests do not wait for each other.
        fleet: to fold into.

    Attributes:
        ignored: number of messages that could not be decoded or folded; the processor keeps them as dead letters.
        hearing_since: seconds since the epoch from which on silence of a host counts: before it this planner received
            no telemetry, or the clock was another one.
    """

    def __init__(self, nc: Client, fleet: Fleet) -> None:
        self._nc = nc
        self._js = nc.jetstream()
        self._fleet = fleet
        self._newest: dict[str, tuple[bytes, type[Struct]]] = {}
        self._facts: list[tuple[str, bytes, type[Struct], float]] = []
        self._arrived = asyncio.Event()
        self._subscriptions: list[Subscription] = []
        self._reading = False
        self._ahead_seconds = 0.0
        self._events_until = 0.0
        self._events_after = 0
        self._folded_at = self._idle_at = time.monotonic()
        self._watch: asyncio.TimerHandle | None = None
        self.ignored = 0
        self._claims_told: dict[str, dict[str, str]] = {}
        self.hearing_since = self._watched_at = self._wall = time.time()
        self._elapsed = elapsed_seconds()

    @property
    def reading(self) -> bool:
        """True while the streams are read to catch up."""
        return self._reading

    @property
    def waiting(self) -> int:
        """Number of messages not folded in yet; of samples and process lists only a host's newest counts."""
        return len(self._facts) + len(self._newest)

    @property
    def waiting_seconds(self) -> float:
        """Seconds for which messages have been waiting without a break; 0 if none wait."""
        return time.monotonic() - self._idle_at if self.waiting else 0.0

    @property
    def age_seconds(self) -> float:
        """Seconds since the last message was folded in."""
        return time.monotonic() - self._folded_at

    def hears(self, now: float) -> bool:
        """True if telemetry is received: connected, and not catching up. If not, silence of hosts counts from now on.

        Silence counts anew also if the time has jumped since the last call: the clock was set, or this process did not
        run.

        Args:
            now: seconds since the epoch, by the clock that stamps when a host was heard.
        """
        self._heed_clock()
        hears = self._nc.is_connected and not self._reading
        gap = abs(now - self._watched_at)
        self._watched_at = now
        if not hears:
            self.hearing_since = now
        elif gap > _WATCH_SECONDS + _JUMP_SECONDS:
            log.warning("the clock has moved by %.0f s at once: hosts are given time to be heard again", gap)
            self.hearing_since = now
        return hears

    def _heed_clock(self) -> None:
        """If this machine's clock was set, shift all times taken by it. Called before a message is folded in."""
        wall, elapsed = time.time(), elapsed_seconds()
        moved = (wall - self._wall) - (elapsed - self._elapsed)
        self._wall, self._elapsed = wall, elapsed
        if abs(moved) > _SET_SECONDS:
            self._ahead_seconds += moved
            self._events_until += moved if self._events_until else 0.0
            apply(self._fleet, ClockSet(moved, wall))

    def _watch_clock(self) -> None:
        """Check the clock every second, also on a standby: it may become the leader at any moment."""
        self.hears(time.time())
        self._watch = asyncio.get_running_loop().call_later(_WATCH_SECONDS, self._watch_clock)

    async def start(self, health: Health | None = None) -> None:
        """Subscribe, then read the streams; after that the fleet is ready for decisions.

        Args:
            health: snapshot from the bucket; only later events are read then.
        """
        if health is not None:
            self._fleet.faults.update(health.faults)
            self._events_after = health.sequence
        for prefix, kind in _TYPES:

            async def on_message(message: Msg, kind: type[Struct] = kind) -> None:
                self._take(message.subject, message.data, kind)

            self._subscriptions.append(await self._nc.subscribe(f"{prefix}*", cb=on_message))
        await self._nc.flush()
        await self.catch_up()
        self._watched_at = time.time()
        self._watch_clock()

    async def stop(self) -> None:
        """Unsubscribe."""
        if self._watch is not None:
            self._watch.cancel()
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            if not self._nc.is_closed:
                await subscription.unsubscribe()

    async def catch_up(self) -> None:
        """Read the streams, at the start and after a reconnection. Returns at once if that is already running."""
        if self._reading:
            return
        self._reading = True
        try:
            await self._compare_clocks()
            last = api.DeliverPolicy.LAST_PER_SUBJECT
            since = self._events_until - self._ahead_seconds - _OVERLAP_SECONDS if self._events_until else 0.0
            started = time.time()
            config = api.ConsumerConfig(deliver_policy=last)
            await self._read(subjects.INVENTORY_STREAM, f"{subjects.INVENTORY}.*", Inventory, config)
            if since:
                config = api.ConsumerConfig(
                    deliver_policy=api.DeliverPolicy.BY_START_TIME, opt_start_time=datetime.fromtimestamp(since, UTC)
                )
            elif self._events_after:
                config = api.ConsumerConfig(
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self._events_after + 1
                )
            else:
                config = api.ConsumerConfig(deliver_policy=api.DeliverPolicy.ALL)
            await self._read(subjects.FACTS_STREAM, f"{subjects.EVENTS}.*", DeviceEvent, config)
            for prefix, kind in ((subjects.PROCESSES, ProcessBatch), (subjects.SAMPLES, SampleBatch)):
                config = api.ConsumerConfig(deliver_policy=last)
                await self._read(subjects.TELEMETRY_STREAM, f"{prefix}.*", kind, config)
            self._events_until = started
        finally:
            self._reading = False
            self._arrived.set()

    async def _compare_clocks(self) -> None:
        """Measure by how much this machine's clock is ahead of the NATS server's.

        Messages of a stream have the server's time, live ones the time of this machine. The difference maps the former
        to this machine's clock, so that they compare.
        """
        before = time.time()
        with contextlib.suppress(NatsError, TimeoutError):
            server = await server_time(self._nc, subjects.INVENTORY_STREAM)
            if server is not None:
                self._ahead_seconds = (before + time.time()) / 2 - server
                if abs(self._ahead_seconds) > AHEAD_SECONDS:
                    log.warning("this clock is %+.0f s off that of the bus", self._ahead_seconds)

    async def health(self) -> Health:
        """Snapshot of the faults, with the sequence of the last event that is certainly included.

        The sequence is read some seconds before the faults, so that no event up to it is still on its way.
        """
        state = (await self._js.stream_info(subjects.FACTS_STREAM)).state
        await asyncio.sleep(_SETTLED_SECONDS)
        faults = to_keep(self._fleet, time.time(), self._nc.max_payload - _HEADROOM_BYTES)
        return Health(sequence=state.last_seq, faults=faults)

    async def run(self) -> None:
        """Fold in messages as they arrive, until cancelled. Inventory and device events come before samples."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            if self._reading:
                continue
            self._idle_at = time.monotonic()
            while self._facts or self._newest:
                started = time.perf_counter()
                facts, self._facts = self._facts[:_SLICE], self._facts[_SLICE:]
                for subject, data, kind, at in facts:
                    self._fold(subject, data, kind, at)
                for subject in list(islice(self._newest, _SLICE - len(facts))):
                    data, kind = self._newest.pop(subject)
                    self._fold(subject, data, kind, time.time())
                # At most a third of the time, so that requests have the rest; a huge fleet is then seen a little later.
                await asyncio.sleep(2 * (time.perf_counter() - started))

    def _take(self, subject: str, data: bytes, kind: type[Struct]) -> None:
        if kind in _NEWEST_ONLY:
            self._newest[subject] = (data, kind)
        else:
            now = time.time()
            self._facts.append((subject, data, kind, now))
            if not self._reading:
                self._events_until = now
        self._arrived.set()

    def _fold(
        self, subject: str, data: bytes, kind: type[Struct], at: float, stream: str = "", sequence: int = 0
    ) -> None:
        try:
            self._heed_clock()
            message = codec.decode(data, kind)
            assert isinstance(message, _SPOKEN)
            speakers.check(message, subject)
            if isinstance(message, Inventory):
                inventory.check(message)
            apply(self._fleet, message, at)
            self._folded_at = time.monotonic()
            if isinstance(message, Inventory):
                self._tell_claim(message.host.name)
        except Exception as error:  # a bad message of one host must not stop the others
            self.ignored += 1
            if self.ignored <= 10 or self.ignored % 1000 == 0:
                place = {"subject": subject} | ({"stream": stream, "sequence": sequence} if stream else {})
                log.warning("ignored a message on %s (%d so far): %s", subject, self.ignored, error, extra=place)

    def _tell_claim(self, host: str) -> None:
        """Log each device once that a host lists although it belongs to another host."""
        claim = self._fleet.claims.get(host)
        owners = {} if claim is None else claim.owners
        for uuid, owner in owners.items():
            if self._claims_told.get(host, {}).get(uuid) != owner:
                log.warning(
                    "%s lists %s, which is a device of %s and stays it while that host reports", host, uuid, owner
                )
        if owners:
            self._claims_told[host] = owners
        else:
            self._claims_told.pop(host, None)

    async def _read(self, stream: str, subject: str, kind: type[Struct], config: api.ConsumerConfig) -> None:
        async for message in read(self._nc, stream, subject, config):
            at = min(message.stored_at + self._ahead_seconds, time.time())
            self._fold(message.subject, message.data, kind, at, stream, message.sequence)
