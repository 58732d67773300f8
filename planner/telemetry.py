"""From the bus to the fleet: what collectors publish is folded in as it comes, and caught up with from the streams.

Live messages come by plain subscriptions, with no consumer to fall behind. The streams are read at the start and after
each reconnection: the last message of each host where the last says it all (samples, processes, inventory), every
event where each counts. The fleet ignores what it knows already, so that overlap does no harm.

Of samples only a host's newest message is decoded, a few hosts at a time, so that a burst of telemetry never stands in
the way of a request for longer than a few decodings.
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

from ..bus import stream_messages
from ..bus.elapsed import elapsed_seconds
from ..bus.stream_reader import read
from ..schemas import codec, inventory, speakers, subjects
from ..schemas.clocks import AHEAD_SECONDS
from ..schemas.telemetry import DeviceEvent, Inventory, ProcessBatch, SampleBatch
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
"""Messages that are decoded before others get their turn."""
_SETTLED_SECONDS: Final = 5.0
"""What was on the stream so long ago has been folded in."""
_OVERLAP_SECONDS: Final = 10.0
"""Events are read again from so long before the connection was lost."""
_HEADROOM_BYTES: Final = 16 * 1024
"""Of a message beside the faults that it carries."""
_WATCH_SECONDS: Final = 1.0
_SET_SECONDS: Final = 1.0
"""A clock that is set by less is borne as messages are that take longer at one time than at another."""
_JUMP_SECONDS: Final = 5.0
"""Where so much more time has gone by than was waited for, the clock was set or this process did not run."""


class Health(Struct, frozen=True, kw_only=True):
    """The faults of devices and hosts as kept in the bucket, since events reach back for weeks.

    Attributes:
        sequence: events up to this one on the stream of facts are in it.
        faults: as in `Fleet.faults`, those that matter.
    """

    sequence: int
    faults: dict[str, Fault]


class Telemetry:
    """Keeps a fleet up to date.

    Args:
        nc: a connection of its own, so that telemetry and requests do not wait for each other.
        fleet: to fold into.

    Attributes:
        ignored: messages that could not be decoded or folded; the processor keeps them as dead letters.
        hearing_since: seconds since the epoch; hosts could not be heard before it, or not by the clock of now.
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
        """It catches up with the streams."""
        return self._reading

    @property
    def waiting(self) -> int:
        """Messages that are not folded in yet; of samples only a host's newest counts."""
        return len(self._facts) + len(self._newest)

    @property
    def waiting_seconds(self) -> float:
        """For how long something has waited without a break; 0 where nothing waits."""
        return time.monotonic() - self._idle_at if self.waiting else 0.0

    @property
    def age_seconds(self) -> float:
        """Since the last message was folded in."""
        return time.monotonic() - self._folded_at

    def hears(self, now: float) -> bool:
        """Whether a host that says something is heard. Where that was not so, silence counts from now on.

        Args:
            now: seconds since the epoch, by the clock that tells when a host was heard.
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
        """Where this machine's clock was set, all that is known by it moves along, before anything is folded in."""
        wall, elapsed = time.time(), elapsed_seconds()
        moved = (wall - self._wall) - (elapsed - self._elapsed)
        self._wall, self._elapsed = wall, elapsed
        if abs(moved) > _SET_SECONDS:
            self._ahead_seconds += moved
            self._events_until += moved if self._events_until else 0.0
            apply(self._fleet, ClockSet(moved, wall))

    def _watch_clock(self) -> None:
        """A standby looks too: it may lead the moment after."""
        self.hears(time.time())
        self._watch = asyncio.get_running_loop().call_later(_WATCH_SECONDS, self._watch_clock)

    async def start(self, health: Health | None = None) -> None:
        """Subscribe, then read what is known; after it the fleet is ready for decisions.

        Args:
            health: as it was kept; only later events are read then.
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
        """Read the streams: at the start, and after the bus was away."""
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
        """By how much this machine's clock is ahead of the server's, which says when messages were stored: what comes
        live has the time of this one, and both have to be of one clock."""
        before = time.time()
        with contextlib.suppress(NatsError, TimeoutError):
            server = await stream_messages.clock(self._nc, subjects.INVENTORY_STREAM)
            if server is not None:
                self._ahead_seconds = (before + time.time()) / 2 - server
                if abs(self._ahead_seconds) > AHEAD_SECONDS:
                    log.warning("this clock is %+.0f s off that of the bus", self._ahead_seconds)

    async def health(self) -> Health:
        """What events have said so far, and how far that goes: some seconds behind, so that nothing is on its way."""
        state = (await self._js.stream_info(subjects.FACTS_STREAM)).state
        await asyncio.sleep(_SETTLED_SECONDS)
        faults = to_keep(self._fleet, time.time(), self._nc.max_payload - _HEADROOM_BYTES)
        return Health(sequence=state.last_seq, faults=faults)

    async def run(self) -> None:
        """Fold in what arrives, for ever. Facts come before samples, since they say what there is."""
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
        except Exception as error:  # whatever one host sends, the others go on
            self.ignored += 1
            if self.ignored <= 10 or self.ignored % 1000 == 0:
                place = {"subject": subject} | ({"stream": stream, "sequence": sequence} if stream else {})
                log.warning("ignored a message on %s (%d so far): %s", subject, self.ignored, error, extra=place)

    def _tell_claim(self, host: str) -> None:
        """Say once of which devices two hosts say that they have them."""
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
