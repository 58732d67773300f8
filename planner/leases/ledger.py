"""Durable changes of leases, in one term: write, then apply, then publish the event.

A lease has one change in flight at a time; others are queued behind it. Devices are held from the decision on a grant,
and freed only when the end of a lease is durable. So a device can't be granted twice, in whatever order writes succeed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from heapq import heapify, heappop, heappush
from typing import Final

from msgspec.structs import replace

from ...bus.elapsed import elapsed_seconds
from ...schemas import codec
from ...schemas.requests import Error, Lease, LeaseState
from ..durable.store import Deposed, Outcome, Store, WriteFailed, lease_key
from ..fleet.fleet import Fleet
from ..fleet.holdings import free
from . import lifecycle
from .events import LeaseEventPublisher
from .lifecycle import LeaseRecord, LeaseTable, Refused
from .service_time import ServiceTime
from .usage import size_of

log = logging.getLogger("corral.planner.ledger")

RETAIN_SECONDS: Final = 3600.0
"""Retention of an ended lease, and of the answer to its request."""
_RETAIN_AT_LEAST_SECONDS: Final = 15.0
_RETAIN_BYTES: Final = 24 * 2**20
"""If more than that ends within the time, the retention is shorter: about 20,000 leases of a device or two."""
_RETAIN_PART: Final = 1 / 8
"""The same as a part of the bucket, if that is less."""
_RETRY_SECONDS: Final = 1.0
_RATE_SECONDS: Final = 10.0
_CLOCKS_DIFFER_SECONDS: Final = 10.0
"""Tolerance for the difference between the clocks of planners."""
_AT_ITS_TIME: Final = timedelta(seconds=3)
_ROUNDED_OFF: Final = timedelta(milliseconds=100)

Step = Callable[[LeaseRecord | None], LeaseRecord | None]
"""Maps the present record to the next one; the same record, or None, changes nothing."""
Settled = Callable[[Lease | Error | Deposed | None], Awaitable[None]]
"""Called with the lease as it is now, the error, `Deposed` if another planner must be asked, or None for no lease."""


class Ledger:
    """The leases of a term.

    Args:
        store: the bucket.
        publisher: of the term.
        fleet: in which leases hold devices.
        table: as read at the start of the term.
        service: service time, by which leases end.
        term: revision of the leader's key.
        planner: id of this planner.
        freed: called when devices have come free.
        deposed: called when a write was refused since another planner leads.
        max_bytes: size limit of a record, which must fit in a message.
    """

    def __init__(
        self,
        store: Store,
        publisher: LeaseEventPublisher,
        fleet: Fleet,
        table: LeaseTable,
        service: ServiceTime,
        *,
        term: int,
        planner: str,
        freed: Callable[[], None],
        deposed: Callable[[], None],
        max_bytes: int,
    ) -> None:
        self.table = table
        self.service = service
        self._store = store
        self._publisher = publisher
        self._fleet = fleet
        self._term = term
        self._planner = planner
        self._freed = freed
        self._deposed = deposed
        self._max_bytes = max_bytes
        self._busy: dict[str, deque[tuple[Step, Settled]]] = {}
        self._end_rate = 0.0
        self._end_rate_at = time.monotonic()
        now = time.time()
        # The bucket expires them by TTL; here they are forgotten an hour after their end at the latest. It is a heap,
        # since a lease that ends later may have to be forgotten earlier.
        self._ended = [
            (min(record.changed_at.timestamp(), now) + RETAIN_SECONDS, record.lease.lease_id)
            for record in table
            if record.lease.state is not LeaseState.ACTIVE
        ]
        heapify(self._ended)

    def service_seconds(self) -> float:
        """Service time now, rounded as in records."""
        return round(self.service.now(elapsed_seconds()), 3)

    def with_actual_end(self, record: LeaseRecord, now: datetime) -> Lease:
        """Lease of a record, with a corrected end if necessary.

        An end in the past or too far off can't be right: an outage extended the lease, or the clock was set. It is then
        computed from service time.
        """
        lease = record.lease
        told = (lease.expires_at - now).total_seconds()
        if lease.state is not LeaseState.ACTIVE or 0.0 < told < record.life_seconds + _CLOCKS_DIFFER_SECONDS:
            return lease
        left = record.ends_at(self.service.outages) - self.service_seconds()
        return replace(lease, expires_at=now + timedelta(seconds=max(0.0, left)))

    async def grant(self, record: LeaseRecord, settled: Settled) -> None:
        """Make a new lease durable; its devices are held already, and are freed if that fails."""
        lease_id = record.lease.lease_id
        value = codec.encode(record, codec.JSON)
        if len(value) > self._max_bytes:
            free(self._fleet, lease_id)
            await settled(
                Error(
                    code="too_large",
                    message=f"The assignment would take {len(value)} bytes, {self._max_bytes} fit in a message: "
                    "give fewer work items, or give them as a count",
                    field="$.distribution",
                )
            )
            return
        # A number that JSON can't represent is encoded as null, and no planner could decode the record again. A new
        # lease has at most two legitimate nulls: its end, and the distribution if there is none.
        if record.lease.distribution is not None or value.count(b"null") > 2:
            try:
                codec.decode(codec.encode(lifecycle.without_items(record), codec.JSON), LeaseRecord, codec.JSON)
            except codec.DecodeError as error:
                free(self._fleet, lease_id)
                log.error("lease %s could not be read again, and is not granted: %s", lease_id, error)
                text = f"The assignment could not be written down: {error}; give other weights, or another distribution"
                await settled(Error(code="internal", message=text, field="$.distribution"))
                return

        async def landed(outcome: Outcome) -> None:
            if isinstance(outcome, int):
                self.table.put(record)
                await settled(record.lease)
                await self._publisher.publish(record, outcome)
                return
            free(self._fleet, lease_id)
            await settled(self._failure(outcome))

        await self._store.write(
            lease_key(lease_id), value, self._term, landed, message_id=lifecycle.change_id(lease_id, record.version)
        )

    async def change(self, lease_id: str, step: Step, settled: Settled) -> None:
        """Apply a step to a lease, after the changes of it that are in flight or queued."""
        waiting = self._busy.get(lease_id)
        if waiting is not None:
            waiting.append((step, settled))
            return
        self._busy[lease_id] = deque([(step, settled)])
        await self._next(lease_id)

    async def expire(self, now: datetime) -> None:
        """Publish warnings for, and end, the leases that are due in service time.

        Args:
            now: time of these changes.
        """
        outages = self.service.outages
        served = self.service_seconds()
        for record in self.table.due(served, outages):

            def step(current: LeaseRecord | None) -> LeaseRecord | None:
                # A renewal may have been in flight.
                if current is None or current.lease.state is not LeaseState.ACTIVE or current.due_at(outages) > served:
                    return current
                if not current.warned:
                    return lifecycle.warn(current, now, self._planner)
                early = current.lease.expires_at - now
                if timedelta() < early < _ROUNDED_OFF:  # service time is kept in milliseconds, published times are not
                    self.table.reschedule(current, served + early.total_seconds())
                    return current
                ended_at = _ended_at(current.lease.expires_at, now)
                reason = f"not renewed within {current.life_seconds:g} s"
                return lifecycle.end(current, LeaseState.EXPIRED, reason, now, self._planner, ended_at)

            await self.change(record.lease.lease_id, step, _ignore_outcome)

    async def end_lost(self, host: str, silent_seconds: float, lost_after_seconds: float, now: datetime) -> None:
        """End the leases on a lost host, except those that are renewed: their work is running."""
        for record in self.table.on_host(host):

            def step(current: LeaseRecord | None) -> LeaseRecord | None:
                if current is None or current.lease.state is not LeaseState.ACTIVE:
                    return current
                unrenewed = self._unrenewed_seconds(current)
                if lifecycle.outlives_silence(current, unrenewed, lost_after_seconds):
                    return current
                reason = f"host {host} has been silent for {silent_seconds:.0f} s, and it was not renewed meanwhile"
                return lifecycle.end(current, LeaseState.LOST, reason, now, self._planner)

            await self.change(record.lease.lease_id, step, _ignore_outcome)

    async def warn_unrenewed(self, host: str, after_seconds: float, now: datetime) -> None:
        """Publish `expiring` events for the leases on a silent host that have not been renewed for a while.

        Holders renew when they receive it, which shows also for leases with a long time to live that they are there.
        """
        for record in self.table.on_host(host):

            def step(current: LeaseRecord | None) -> LeaseRecord | None:
                if current is None or current.lease.state is not LeaseState.ACTIVE or current.warned:
                    return current
                late = self._unrenewed_seconds(current) > after_seconds
                return lifecycle.warn(current, now, self._planner) if late else current

            await self.change(record.lease.lease_id, step, _ignore_outcome)

    def _unrenewed_seconds(self, record: LeaseRecord) -> float:
        return self.service_seconds() - (record.extended_service_seconds or 0.0)

    def evict_ended(self, now: float) -> None:
        """Forget leases whose retention is over."""
        while self._ended and self._ended[0][0] <= now:
            self.table.remove(heappop(self._ended)[1])

    async def _next(self, lease_id: str) -> None:
        waiting = self._busy[lease_id]
        while waiting:
            step, settled = waiting.popleft()
            before = self.table.get(lease_id)
            try:
                after = step(before)
            except Refused as refused:
                await settled(refused.error)
                continue
            except Exception as error:  # the lease stays as it is, and queued changes must not wait for ever
                log.exception("a change of lease %s failed", lease_id)
                await settled(Error(code="internal", message=f"The planner failed: {error}"))
                continue
            if after is None or after is before:
                await settled(None if after is None else after.lease)
                continue
            await self._write(after, settled)
            return
        del self._busy[lease_id]

    async def _write(self, record: LeaseRecord, settled: Settled) -> None:
        lease_id = record.lease.lease_id
        ends = record.lease.state is not LeaseState.ACTIVE
        ttl = self._retention(size_of(record.lease)) if ends else 0.0
        value = codec.encode(record, codec.JSON)
        most = self._max_bytes if self._store.has_room else 0
        if len(value) > most and record.earlier:
            # The lease without them did fit when it was granted: renewals and its end must always be possible.
            known = len(record.earlier)
            record = lifecycle.fitting(record, most, _json_bytes)
            value = codec.encode(record, codec.JSON)
            log.warning("lease %s: %d events that wait are kept in memory alone", lease_id, known - len(record.earlier))

        async def landed(outcome: Outcome) -> None:
            try:
                if isinstance(outcome, int):
                    await took_effect(outcome)
                else:
                    await failed(outcome)
            finally:
                await self._next(lease_id)

        async def took_effect(revision: int) -> None:
            self.table.put(record)
            if ends:
                # Samples from before the release was requested are of the time when it was held.
                free(self._fleet, lease_id, record.lease.state, record.changed_at.timestamp())
                heappush(self._ended, (time.time() + ttl, lease_id))
                self._freed()
            await settled(record.lease)
            await self._publisher.publish(record, revision)

        async def failed(outcome: Deposed | WriteFailed) -> None:
            before = self.table.get(lease_id)
            if isinstance(outcome, WriteFailed) and before is not None and before.lease.state is LeaseState.ACTIVE:
                log.warning("lease %s stays as it was: %s", lease_id, outcome)
                self.table.reschedule(before, self.service_seconds() + _RETRY_SECONDS)
            await settled(self._failure(outcome))

        await self._store.write(
            lease_key(lease_id),
            value,
            self._term,
            landed,
            message_id=lifecycle.change_id(lease_id, record.version),
            ttl_seconds=ttl,
        )

    def _failure(self, outcome: Deposed | WriteFailed) -> Error | Deposed:
        if isinstance(outcome, Deposed):
            self._deposed()
            return outcome
        return Error(
            code="unavailable",
            message=f"The planner's bucket does not take writes ({outcome}): nothing was changed, try again later",
        )

    def _retention(self, size: int) -> float:
        """Retention in seconds of a lease of so many bytes that ends now: less if very many end."""
        now = time.monotonic()
        gap = now - self._end_rate_at
        self._end_rate_at = now
        # Exponentially weighted bytes per second.
        self._end_rate = self._end_rate * max(0.0, 1.0 - gap / _RATE_SECONDS) + size / _RATE_SECONDS
        most = _RETAIN_BYTES
        if self._store.max_bytes > 0:
            most = min(most, self._store.max_bytes * _RETAIN_PART)
        return min(RETAIN_SECONDS, max(_RETAIN_AT_LEAST_SECONDS, most / self._end_rate))


def _ended_at(expires_at: datetime, now: datetime) -> datetime:
    """Time of the end of an expired lease: `expires_at` if that was just now, else now (extended, or the clock set)."""
    return expires_at if timedelta() <= now - expires_at < _AT_ITS_TIME else now


def _json_bytes(value: object) -> int:
    return len(codec.encode(value, codec.JSON))


async def _ignore_outcome(_: object) -> None:
    """Ignore the outcome of a change that no client asked for."""


def clock() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)
