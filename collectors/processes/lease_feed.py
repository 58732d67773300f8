"""Active leases, followed on the bus: to attribute processes to them, and for a source that acts by them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ...bus import stream_reader
from ...bus.tasks import heed_cancellation
from ...schemas import codec, subjects
from ...schemas.operations import LeaseFilter, Leases
from ...schemas.requests import Lease, LeaseEvent, LeaseEventKind, LeaseState

log = logging.getLogger("corral.collector")

TELL_SECONDS: Final = 0.05
EXPIRY_CHECK_SECONDS: Final = 2.0
EXPIRY_GRACE_SECONDS: Final = 10.0
"""A lease counts as ended this long after its expiry, even if no end was announced (the planner is down)."""
ASK_EVERY_SECONDS: Final = 600.0
"""Time between a host's requests for its leases, in case that it has missed an event."""
ASK_AGAIN_SECONDS: Final = 1.0
"""Shortest time between such requests, whatever is announced; doubled, up to `ASK_AGAIN_MOST_SECONDS`, while no planner
answers."""
ASK_AGAIN_MOST_SECONDS: Final = 30.0
MAX_AT_ONCE: Final = 500
"""Leases in one answer of the planner; longer lists are read in parts."""

_CHANGES: Final = (
    LeaseEventKind.GRANTED,
    LeaseEventKind.RESIZED,
    LeaseEventKind.RELEASED,
    LeaseEventKind.EXPIRED,
    LeaseEventKind.LOST,
    LeaseEventKind.EVICTED,
)


class LeaseFeed:
    """All leases of the fleet, folded from lease events: the newest event of each lease decides.

    Args:
        changed: takes all active leases whenever they change, and True if the list is complete: leases granted before
            the feed began may not be known.
    """

    def __init__(self, changed: Callable[[list[Lease], bool], None]) -> None:
        self._changed = changed
        self._complete = False
        self._active: dict[str, Lease] = {}
        self._newest: dict[str, datetime] = {}
        self._telling: asyncio.TimerHandle | None = None

    async def follow(self, nc: Client) -> None:
        """Read what the stream still has, then listen, until cancelled."""
        subject = f"{subjects.LEASE_EVENTS}.>"
        # Listen first: what is announced while the past is read is not missed, and events carry their times.
        subscription = await nc.subscribe(subject, cb=self._on_message)
        try:
            try:
                await self._catch_up(nc, subject)
                self._complete = True
                self._tell()
            except (NatsError, TimeoutError) as error:
                log.warning("leases granted before now are not known: %s", error)
            while True:
                heed_cancellation()
                await asyncio.sleep(EXPIRY_CHECK_SECONDS)
                self._expire()
        finally:
            self._complete = False
            self._tell()
            if not nc.is_closed:
                await subscription.unsubscribe()

    async def _catch_up(self, nc: Client, subject: str) -> None:
        async with contextlib.aclosing(stream_reader.read_direct(nc, subjects.FACTS_STREAM, subject)) as messages:
            async for message in messages:
                heed_cancellation()
                self.apply(message.data, message.subject, tell=False)

    def _tell_soon(self) -> None:
        """Pass changes on after a short delay: a busy planner announces many at once, which are passed on together."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._changed(list(self._active.values()), self._complete)

    async def _on_message(self, message: Msg) -> None:
        self.apply(message.data, message.subject)

    def apply(self, payload: bytes, subject: str, *, tell: bool = True) -> None:
        """Fold one event in; ignores a message that is no lease event, or one that does not belong to its subject."""
        event = _event_of(payload, subject)
        if event is None:
            return
        lease = event.lease
        newest = self._newest.get(lease.lease_id)
        if newest is not None and event.time < newest:
            return
        self._newest[lease.lease_id] = event.time
        before = self._active.get(lease.lease_id)
        if lease.state is LeaseState.ACTIVE and not _is_over(lease):
            self._active[lease.lease_id] = lease
        else:
            self._active.pop(lease.lease_id, None)
        if tell and before != self._active.get(lease.lease_id):
            self._tell_soon()

    def _expire(self) -> None:
        over = [lease_id for lease_id, lease in self._active.items() if _is_over(lease)]
        for lease_id in over:
            del self._active[lease_id]
        if over:
            self._tell()
        if len(self._newest) > 10 * len(self._active) + 10_000:
            self._newest = {key: time for key, time in self._newest.items() if key in self._active}


class HostLeaseFeed:
    """Leases on one host: requested from the planner, and again whenever it announces a change of one.

    An announcement is only a hint: a compromised host can have stored messages delivered as if they were announced, but
    it can't answer for the planner. The feed does not subscribe to renewals: a fleet has hundreds a second, and each
    host would get all of them.

    Args:
        host: the host's name.
        changed: takes the host's active leases whenever they may have changed; None while they are not known.
    """

    def __init__(self, host: str, changed: Callable[[list[Lease] | None], None]) -> None:
        self._host = host
        self._needle = f'"{host}"'.encode()
        self._changed = changed
        self._hinted = asyncio.Event()
        self._logged = False

    async def follow(self, nc: Client) -> None:
        """Ask, then listen, until cancelled."""
        # Listen first: what is announced while the planner answers is asked for again.
        subscriptions = [
            await nc.subscribe(subjects.lease_subject(kind.value, "*"), cb=self._on_message) for kind in _CHANGES
        ]
        pause = ASK_AGAIN_SECONDS
        try:
            while True:
                heed_cancellation()
                self._hinted.clear()
                try:
                    self._changed(await self._ask(nc))
                    pause = ASK_AGAIN_SECONDS
                    await self._rest(ASK_EVERY_SECONDS * random.uniform(0.75, 1.25))
                except (NatsError, TimeoutError, codec.DecodeError) as error:
                    if not self._logged and pause > 4 * ASK_AGAIN_SECONDS:
                        self._logged = True
                        log.warning("no planner answers which leases are on this host (%r), retrying", error)
                    await self._rest(pause)
                    pause = min(pause * 2, ASK_AGAIN_MOST_SECONDS)
        finally:
            self._changed(None)
            if not nc.is_closed:
                for subscription in subscriptions:
                    await subscription.unsubscribe()

    async def _rest(self, seconds: float) -> None:
        """Wait until the planner is to be asked again: at a hint, but not at once after the last time."""
        await asyncio.sleep(ASK_AGAIN_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - ASK_AGAIN_SECONDS):
                await self._hinted.wait()

    async def _ask(self, nc: Client) -> list[Lease]:
        found: dict[str, Lease] = {}
        while True:
            wanted = LeaseFilter(hosts=[self._host], offset=len(found), limit=MAX_AT_ONCE)
            reply = await nc.request(subjects.PlanSubject.LEASES, codec.encode(wanted, codec.JSON), timeout=5.0)
            # An error is no `Leases` and so can't be decoded.
            leases = codec.decode(reply.data, Leases, codec.JSON).leases
            found.update((lease.lease_id, lease) for lease in leases)
            if len(leases) < MAX_AT_ONCE:
                return list(found.values())

    async def _on_message(self, message: Msg) -> None:
        if self._needle not in message.data:  # most are of other hosts, and not worth more
            return
        event = _event_of(message.data, message.subject)
        if event is None:
            return
        if any(grant.host == self._host for grants in (event.lease.grants, event.returned) for grant in grants):
            self._hinted.set()


def _event_of(payload: bytes, subject: str) -> LeaseEvent | None:
    """Decode a lease event; None if it does not belong to its subject, since readers of a stream choose the latter."""
    try:
        event = codec.decode(payload, LeaseEvent, codec.JSON)
    except codec.DecodeError as error:
        log.debug("no lease event: %s", error)
        return None
    return event if subject == subjects.lease_subject(event.kind.value, event.lease.lease_id) else None


def _is_over(lease: Lease) -> bool:
    return (datetime.now(UTC) - lease.expires_at).total_seconds() > EXPIRY_GRACE_SECONDS
