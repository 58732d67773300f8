"""The leases that are active now, followed on the bus: to join processes to them, and for a source that obeys them."""

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

from ..schemas import bus, codec, stored
from ..schemas.operations import LeaseFilter, Leases
from ..schemas.requests import Lease, LeaseEvent, LeaseEventKind, LeaseState

log = logging.getLogger("corral.collector")

TELL_SECONDS: Final = 0.05
EXPIRY_CHECK_SECONDS: Final = 2.0
EXPIRY_GRACE_SECONDS: Final = 10.0
"""A lease whose end was not announced so long after its time (the planner is down) counts as ended."""
ASK_EVERY_SECONDS: Final = 600.0
"""A host asks the planner for its leases so often, in case that it has missed an event."""
ASK_AGAIN_SECONDS: Final = 1.0
ASK_AGAIN_MOST_SECONDS: Final = 30.0
MOST_AT_ONCE: Final = 500
"""Leases in one answer of the planner."""

_CHANGES: Final = (
    LeaseEventKind.GRANTED,
    LeaseEventKind.RELEASED,
    LeaseEventKind.EXPIRED,
    LeaseEventKind.LOST,
    LeaseEventKind.EVICTED,
)


class LeaseFeed:
    """All leases of the fleet, as a fold of lease events: the newest of each lease decides.

    Args:
        changed: takes all active leases whenever they change, and whether that is all there are: what was granted
            before the feed began may not be known.
    """

    def __init__(self, changed: Callable[[list[Lease], bool], None]) -> None:
        self._changed = changed
        self._complete = False
        self._active: dict[str, Lease] = {}
        self._newest: dict[str, datetime] = {}
        self._telling: asyncio.TimerHandle | None = None

    async def follow(self, nc: Client) -> None:
        """Read what the stream still has, then listen, until cancelled."""
        subject = f"{bus.LEASE_EVENTS}.>"
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
                bus.heed_cancellation()
                await asyncio.sleep(EXPIRY_CHECK_SECONDS)
                self._expire()
        finally:
            self._complete = False
            self._tell()
            if not nc.is_closed:
                await subscription.unsubscribe()

    async def _catch_up(self, nc: Client, subject: str) -> None:
        async with contextlib.aclosing(stored.read(nc, bus.FACTS_STREAM, subject)) as messages:
            async for message in messages:
                bus.heed_cancellation()
                self.apply(message.data, tell=False)

    def _tell_soon(self) -> None:
        """A busy planner announces many at once: they are told together."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._changed(list(self._active.values()), self._complete)

    async def _on_message(self, message: Msg) -> None:
        self.apply(message.data)

    def apply(self, payload: bytes, *, tell: bool = True) -> None:
        """Fold one event in; what is no lease event is left alone."""
        try:
            event = codec.decode(payload, LeaseEvent, codec.JSON)
        except codec.DecodeError as error:
            log.debug("no lease event: %s", error)
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
    """The leases on one host: asked of the planner, then kept up to date from what it announces.

    Renewals are not listened to: a fleet has hundreds a second, and each host would get all of them. So a lease ends
    here when its end is told, by an event or by the planner's next answer.

    Args:
        host: the host's name.
        changed: takes the host's active leases whenever they change; None while they are not known.
    """

    def __init__(self, host: str, changed: Callable[[list[Lease] | None], None]) -> None:
        self._host = host
        self._needle = f'"{host}"'.encode()
        self._changed = changed
        self._active: dict[str, Lease] = {}
        self._touched: set[str] = set()
        self._ended: dict[str, None] = {}
        self._known = False
        self._told = False

    async def follow(self, nc: Client) -> None:
        """Ask, then listen, until cancelled."""
        # Listen first: what is announced while the planner answers goes before its answer.
        subscriptions = [
            await nc.subscribe(bus.lease_subject(kind.value, "*"), cb=self._on_message) for kind in _CHANGES
        ]
        pause = ASK_AGAIN_SECONDS
        try:
            while True:
                bus.heed_cancellation()
                try:
                    await self._ask(nc)
                    pause = ASK_AGAIN_SECONDS
                    await asyncio.sleep(ASK_EVERY_SECONDS * random.uniform(0.75, 1.25))
                except (NatsError, TimeoutError, codec.DecodeError) as error:
                    if not self._told and pause > 4 * ASK_AGAIN_SECONDS:
                        self._told = True
                        log.warning("no planner tells which leases are on this host (%r): it is asked again", error)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, ASK_AGAIN_MOST_SECONDS)
        finally:
            self._known = False
            self._changed(None)
            if not nc.is_closed:
                for subscription in subscriptions:
                    await subscription.unsubscribe()

    async def _ask(self, nc: Client) -> None:
        self._touched.clear()
        found: dict[str, Lease] = {}
        while True:
            wanted = LeaseFilter(hosts=[self._host], offset=len(found), limit=MOST_AT_ONCE)
            reply = await nc.request(bus.PlanSubject.LEASES, codec.encode(wanted, codec.JSON), timeout=5.0)
            # An error is no `Leases` and so can't be decoded.
            leases = codec.decode(reply.data, Leases, codec.JSON).leases
            found.update((lease.lease_id, lease) for lease in leases)
            if len(leases) < MOST_AT_ONCE:
                break
        for lease_id in [lease_id for lease_id in self._active if lease_id not in found]:
            if lease_id not in self._touched:
                del self._active[lease_id]
        for lease_id, lease in found.items():
            if lease_id not in self._touched and self._is_here(lease):
                self._active[lease_id] = lease
        self._known = True
        self._changed(list(self._active.values()))

    async def _on_message(self, message: Msg) -> None:
        if self._needle not in message.data:  # most are of other hosts, and not worth more
            return
        try:
            lease = codec.decode(message.data, LeaseEvent, codec.JSON).lease
        except codec.DecodeError as error:
            log.debug("no lease event: %s", error)
            return
        if not self._is_here(lease):
            return
        self._touched.add(lease.lease_id)
        if lease.state is not LeaseState.ACTIVE:
            self._active.pop(lease.lease_id, None)
            self._ended[lease.lease_id] = None
            while len(self._ended) > MOST_AT_ONCE:
                del self._ended[next(iter(self._ended))]
        elif lease.lease_id not in self._ended:  # kinds come by subscriptions of their own, and may overtake
            self._active[lease.lease_id] = lease
        if self._known:
            self._changed(list(self._active.values()))

    def _is_here(self, lease: Lease) -> bool:
        return any(grant.host == self._host for grant in lease.grants)


def _is_over(lease: Lease) -> bool:
    return (datetime.now(UTC) - lease.expires_at).total_seconds() > EXPIRY_GRACE_SECONDS
