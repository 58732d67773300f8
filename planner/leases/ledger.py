"""Durable changes of leases, in one term: write, then apply, then publish the event.

A lease has a lock, so that one change of it is in flight at a time. Devices are held from the decision on a grant
(see `grant_reservations`), and freed only when the end of a lease is durable. So a device can't be granted twice, in
whatever order writes succeed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from heapq import heapify, heappop, heappush
from typing import Final
from weakref import WeakValueDictionary

from msgspec.structs import replace

from ...bus.elapsed import elapsed_seconds
from ...bus.tasks import BackgroundTasks
from ...schemas import codec
from ...schemas.requests import Error, Lease, LeaseState, Preemption
from ..durable.store import Deposed, Store, Write, WriteFailed, lease_key
from ..fleet.fleet import Fleet
from ..fleet.holdings import extend, free, give_back
from . import lifecycle
from .events import LeaseEventPublisher
from .lifecycle import LeaseRecord, LeaseTable, Refused
from .resizing import changed_devices
from .service_time import ServiceTime
from .usage import size_of

log = logging.getLogger("corral.planner.ledger")

RETAIN_SECONDS: Final = 3600.0
"""Retention of an ended lease, and of the answer to its request."""
RETAIN_AT_LEAST_SECONDS: Final = 15.0
"""Retention where very many leases end. The event of an end is on the stream before that is over."""
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

_NULLABLE: Final = (
    *("ended_at", "distribution", "asked_at", "expected_seconds", "ends_at", "saved_at", "preemption", "idle"),
    *("elastic", "resize"),
)
"""Fields of a lease that are null where there is nothing. So is `since` of its grants."""

Step = Callable[[LeaseRecord | None], LeaseRecord | None]
"""Maps the present record to the next one; the same record, or None, changes nothing."""


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
        self.publisher = publisher
        self._fleet = fleet
        self._term = term
        self._planner = planner
        self._freed = freed
        self._deposed = deposed
        self._max_bytes = max_bytes
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks = BackgroundTasks()
        self._limits: list[tuple[float, str]] = []
        """Deadline (`lifecycle.deadline`) and id of leases that have one, soonest first; it may have moved since."""
        self.notices_checked = True
        """Whether leases end by notices for a claimant: those of an earlier term are looked through first."""
        self.on_end: Callable[[LeaseRecord], None] = lambda _: None
        """Called with the record of each lease that ends, before its devices are free."""
        self.on_notice: Callable[[Lease], None] = lambda _: None
        """Called with each active lease that gets the notice of a preemption, and when that is put off or withdrawn."""
        self.on_hold: Callable[[Lease], None] = lambda _: None
        """Called with an elastic lease, with the devices that it holds from now on."""
        self.on_resized: Callable[[LeaseRecord], None] = lambda _: None
        """Called with the record of an elastic lease whose devices have changed, once that is durable."""
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
        for record in table:
            if record.lease.state is LeaseState.ACTIVE:
                self.note_deadline(record.lease)

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

    def write_new(self, record: LeaseRecord) -> Write:
        """The write of a new lease, whose block must put it into the table and publish its event.

        Raises:
            Refused: the lease is too large, or has numbers that JSON lacks.
        """
        lease_id = record.lease.lease_id
        value = codec.encode(record, codec.JSON)
        if len(value) > self._max_bytes:
            raise Refused(
                "too_large",
                f"The assignment would take {len(value)} bytes, {self._max_bytes} fit in a message: "
                "give fewer work items, or give them as a count",
                "$.distribution",
            )
        # A number that JSON can't represent is encoded as null, and no planner could decode the record again.
        nulls = len(record.lease.grants) + sum(getattr(record.lease, name) is None for name in _NULLABLE)
        if record.lease.distribution is not None or value.count(b"null") > nulls:
            try:
                codec.decode(codec.encode(lifecycle.without_items(record), codec.JSON), LeaseRecord, codec.JSON)
            except codec.DecodeError as error:
                log.error("lease %s could not be decoded again, and is not granted: %s", lease_id, error)
                text = f"The assignment could not be encoded: {error}; give other weights, or another distribution"
                raise Refused("internal", text, "$.distribution") from error
        return self._store.write(
            lease_key(lease_id), value, self._term, message_id=lifecycle.change_id(lease_id, record.version)
        )

    async def change(self, lease_id: str, step: Step) -> Lease | None:
        """Apply a step to a lease, after the changes of it that are in flight.

        Returns:
            The lease as it is then; None if the step returned None.

        Raises:
            Refused: by the step.
            Deposed: another planner leads.
            WriteFailed: the bucket refused the change, and the lease stays as it was.
        """
        lock = self._locks.setdefault(lease_id, asyncio.Lock())
        async with lock:
            before = self.table.get(lease_id)
            after = step(before)
            if after is None or after is before:
                return None if after is None else after.lease
            return await self._write(before, after)

    def start_change(self, lease_id: str, step: Step) -> None:
        """Apply a step to a lease concurrently, for no client."""
        self._tasks.start(self._change_for_none(lease_id, step))

    async def _change_for_none(self, lease_id: str, step: Step) -> None:
        try:
            await self.change(lease_id, step)
        except (Refused, Deposed, WriteFailed) as error:
            log.debug("lease %s was not changed: %r", lease_id, error)

    async def close(self) -> None:
        """End the changes that are in flight. Call it once the store has abandoned their writes."""
        await self._tasks.cancel()

    def expire(self, now: datetime) -> None:
        """Publish warnings for, and end, the leases that are due in service time.

        Args:
            now: time of these changes.
        """
        self._end_limited(now)
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
                return lifecycle.end(current, LeaseState.EXPIRED, _over(current), now, self._planner, ended_at)

            self.start_change(record.lease.lease_id, step)

    async def preempt(self, lease_id: str, preemption: Preemption) -> Lease | None:
        """Give the holder of a lease the notice of a preemption, durably; with no grace, the lease ends at once.

        A lease that has ended meanwhile stays as it is, and so does one that has a notice.

        Args:
            lease_id: id of the lease.
            preemption: the notice. If it ends before the grace of the lease is over, it ends when that is.

        Returns:
            The lease after the change; None if there is none.

        Raises:
            Refused: the lease is not preemptible, or has not lasted for its `min_run_seconds` yet.
            Deposed: another planner leads.
            WriteFailed: the bucket refused the change.
        """

        def step(record: LeaseRecord | None) -> LeaseRecord | None:
            if record is None or record.lease.state is not LeaseState.ACTIVE:
                return record
            return lifecycle.notify(record, preemption, clock(), self._planner)

        return await self.change(lease_id, step)

    async def unpreempt(self, lease_id: str, claimant: str | None = None) -> Lease | None:
        """Withdraw the notice of a preemption, durably. A lease without one, or that has ended, stays as it is.

        Args:
            lease_id: id of the lease.
            claimant: withdraw only a notice for this request; None for any.

        Returns:
            The lease after the change; None if there is none.

        Raises:
            Deposed: another planner leads.
            WriteFailed: the bucket refused the change.
        """

        def step(record: LeaseRecord | None) -> LeaseRecord | None:
            if record is None or record.lease.state is not LeaseState.ACTIVE:
                return record
            return lifecycle.withdraw_notice(record, claimant, clock(), self._planner)

        return await self.change(lease_id, step)

    def note_deadline(self, lease: Lease) -> None:
        """Note the time at which an active lease ends even if it is renewed, if it has one."""
        if (found := lifecycle.deadline(lease)) is not None:
            heappush(self._limits, (found[0].timestamp(), lease.lease_id))

    def next_deadline(self) -> float | None:
        """Time when a lease has to end next, in seconds since the epoch; None if none has to. It may be early."""
        return self._limits[0][0] if self._limits else None

    def _end_limited(self, now: datetime) -> None:
        """End the leases whose deadline is reached: outages do not prolong it."""

        def step(current: LeaseRecord | None) -> LeaseRecord | None:
            found = None if current is None else _reached(current.lease, now)
            if current is None or found is None:
                return current
            at, state = found
            ended_at = _ended_at(at, now)
            if state is LeaseState.EVICTED:
                return lifecycle.preempted(current, current.lease, now, self._planner, ended_at)
            return lifecycle.end(current, state, _limited(current.lease, at), now, self._planner, ended_at)

        while self._limits and self._limits[0][0] <= now.timestamp():
            _, lease_id = heappop(self._limits)
            record = self.table.get(lease_id)
            if record is None or (reached := _reached(record.lease, now)) is None:
                continue
            notice = record.lease.preemption
            if self.notices_checked or reached[1] is not LeaseState.EVICTED or notice is None or not notice.claimant:
                self.start_change(lease_id, step)
            heappush(self._limits, (now.timestamp() + _RETRY_SECONDS, lease_id))  # the write may fail

    def end_lost(self, host: str, silent_seconds: float, lost_after_seconds: float, now: datetime) -> None:
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

            self.start_change(record.lease.lease_id, step)

    def warn_unrenewed(self, host: str, after_seconds: float, now: datetime) -> None:
        """Publish `expiring` events for the leases on a silent host that have not been renewed for a while.

        Holders renew when they receive it, which shows also for leases with a long time to live that they are there.
        """
        for record in self.table.on_host(host):

            def step(current: LeaseRecord | None) -> LeaseRecord | None:
                if current is None or current.lease.state is not LeaseState.ACTIVE or current.warned:
                    return current
                late = self._unrenewed_seconds(current) > after_seconds
                return lifecycle.warn(current, now, self._planner) if late else current

            self.start_change(record.lease.lease_id, step)

    def _unrenewed_seconds(self, record: LeaseRecord) -> float:
        return self.service_seconds() - (record.extended_service_seconds or 0.0)

    def evict_ended(self, now: float) -> None:
        """Forget leases whose retention is over."""
        while self._ended and self._ended[0][0] <= now:
            self.table.remove(heappop(self._ended)[1])

    async def _write(self, before: LeaseRecord | None, record: LeaseRecord) -> Lease:
        lease_id = record.lease.lease_id
        ends = record.lease.state is not LeaseState.ACTIVE
        ttl = self._retention(size_of(record.lease)) if ends else 0.0
        record, value = self._encode(record)
        change_id = lifecycle.change_id(lease_id, record.version)
        added, returned = changed_devices(before, record)
        if added:  # from the decision on, as for a grant
            self._hold(record.lease)
        write = self._store.write(lease_key(lease_id), value, self._term, message_id=change_id, ttl_seconds=ttl)
        try:
            async with write as revision:
                self.table.put(record)
                if returned:
                    give_back(self._fleet, lease_id, returned, record.changed_at.timestamp())
                    self.on_hold(record.lease)
                    self._freed()
                if added or returned:
                    self.on_resized(record)
                if before is None or record.lease.preemption != before.lease.preemption:
                    self.note_deadline(record.lease)
                    if not ends:
                        self.on_notice(record.lease)
                if ends:
                    self.on_end(record)
                    # Samples from before the release was requested are of the time when it was held.
                    free(self._fleet, lease_id, record.lease.state, record.changed_at.timestamp())
                    heappush(self._ended, (time.time() + ttl, lease_id))
                    self._freed()
                await self.publisher.publish(record, revision)
        except Deposed:
            self._deposed()
            raise
        except WriteFailed as error:
            if added and before is not None:
                give_back(self._fleet, lease_id, added, time.time())
                self.on_hold(before.lease)
            if before is not None and before.lease.state is LeaseState.ACTIVE:
                log.warning("lease %s stays as it was: %s", lease_id, error)
                self.table.reschedule(before, self.service_seconds() + _RETRY_SECONDS)
            raise
        return record.lease

    def fits(self, record: LeaseRecord) -> bool:
        """True if a record of a lease with more devices fits in a message, with room for what it gets later."""
        return 2 * len(codec.encode(replace(record, earlier=[]), codec.JSON)) <= self._max_bytes

    def _hold(self, lease: Lease) -> None:
        extend(self._fleet, lease.lease_id, lease.grants)
        self.on_hold(lease)

    def _encode(self, record: LeaseRecord) -> tuple[LeaseRecord, bytes]:
        """Encode a changed record, if need be without the oldest of its events that the stream may lack.

        The lease without them did fit when it was granted: renewals and its end must always be possible.
        """
        value = codec.encode(record, codec.JSON)
        max_bytes = self._max_bytes if self._store.has_room else 0
        if len(value) <= max_bytes or not record.earlier:
            return record, value
        fitting = lifecycle.fitting(record, max_bytes, _json_bytes)
        dropped = len(record.earlier) - len(fitting.earlier)
        log.warning("lease %s: %d unacknowledged events are kept in memory alone", record.lease.lease_id, dropped)
        return fitting, codec.encode(fitting, codec.JSON)

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
        return min(RETAIN_SECONDS, max(RETAIN_AT_LEAST_SECONDS, most / self._end_rate))


def _reached(lease: Lease, now: datetime) -> tuple[datetime, LeaseState] | None:
    """Deadline of an active lease, and its state then; None if it is not reached."""
    found = lifecycle.deadline(lease) if lease.state is LeaseState.ACTIVE else None
    return None if found is None or found[0] > now else found


def _ended_at(expires_at: datetime, now: datetime) -> datetime:
    """Time of the end of an expired lease: `expires_at` if that was just now, else now (extended, or the clock set)."""
    return expires_at if timedelta() <= now - expires_at < _AT_ITS_TIME else now


def _over(record: LeaseRecord) -> str:
    """Reason for which a lease expires."""
    lease = record.lease
    if lease.ends_at is not None and lease.expires_at >= lease.ends_at:
        return _limited(lease, lease.ends_at)
    return f"not renewed within {record.life_seconds:g} s"


def _limited(lease: Lease, ends_at: datetime) -> str:
    """Reason for which a lease expires at its limit."""
    if lease.window:
        return f"the booked window {lease.window} is over, or its max_seconds"
    return f"its limit of {(ends_at - lease.granted_at).total_seconds():g} s (max_seconds) is over"


def _json_bytes(value: object) -> int:
    return len(codec.encode(value, codec.JSON))


def write_refused(error: WriteFailed) -> Error:
    """Answer to a message whose change the bucket did not take."""
    return Error(
        code="unavailable",
        message=f"The planner's bucket does not take writes ({error}): nothing was changed, try again later",
    )


def clock() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)
