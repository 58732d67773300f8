"""Lease events, delivered exactly once: published after the change is durable, and resent until acknowledged.

An event's message id is made from the lease and the version of its record, so that the stream stores it once within its
deduplication window. Other clients, such as collectors, publish to that stream, too, and could use an id first; so ids
are made with a secret key, which the bucket keeps. For longer gaps the bucket has a watermark: every change up to that
revision has its event on the stream. A new leader checks the few changes after it, looks for the event of each on the
stream, and publishes what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.errors import NotFoundError

from ...schemas import codec, subjects
from ...schemas.requests import LeaseEvent, LeaseEventKind
from ..durable.store import WATERMARK, Deposed, Store, WriteFailed
from .event_rate import EventBudget, EventCounts, Pace
from .lifecycle import Announcement, LeaseRecord, change_id

log = logging.getLogger("corral.planner.announce")

_RESEND_SECONDS: Final = 2.0
_DEDUPLICATED_SECONDS: Final = 60.0
"""Within this time the deduplication window covers a resend; later the stream is searched for the event first."""
_AT_ONCE: Final = 64
_WATERMARK_SECONDS: Final = 0.5
_WITHHELD_SECONDS: Final = 5.0
_HEADERS_BYTES: Final = 200
"""Overhead of an event on the stream: subject, message id and what the server adds."""
EVENT_KEY_BYTES: Final = 32


def event_id(key: bytes, lease_id: str, version: int) -> str:
    """Message id of an event: the same for every planner that has the key, and not predictable for other clients."""
    return hashlib.blake2b(change_id(lease_id, version).encode(), key=key, digest_size=16).hexdigest()


class _Withheld:
    """A renewal whose event is withheld, until a later change replaces it or it must be published."""

    __slots__ = ("record", "revision", "since")

    def __init__(self, record: LeaseRecord, revision: int, since: float) -> None:
        self.record = record
        self.revision = revision
        self.since = since


class _Sent:
    __slots__ = ("announcement", "data", "first_at", "lease_id", "revision", "sent_at")

    def __init__(self, lease_id: str, announcement: Announcement, data: bytes, revision: int, now: float) -> None:
        self.lease_id = lease_id
        self.data = data
        self.announcement = announcement
        self.revision = revision
        self.first_at = self.sent_at = now


class LeaseEventPublisher:
    """Publishes the events of one term.

    Args:
        nc: connection.
        store: for the watermark.
        term: revision of the leader's key.
        key: secret that makes the message ids of events.
        on_published: called with lease id and version once the stream has the event, or a later one will replace it.
        counts: number of changes, by kind.
        budget: usage of the stream by owner.
        event_counts: counts of published events.
    """

    def __init__(
        self,
        nc: Client,
        store: Store,
        term: int,
        key: bytes,
        on_published: Callable[[str, int], None],
        counts: Counter[str] | None = None,
        budget: EventBudget | None = None,
        event_counts: EventCounts | None = None,
    ) -> None:
        self._event_counts = event_counts or EventCounts()
        self._budget = budget or EventBudget()
        self._pace = Pace()
        self._withheld: dict[str, _Withheld] = {}
        self.counts = Counter[str]() if counts is None else counts
        self._nc = nc
        self._js = nc.jetstream()
        self._store = store
        self._term = term
        self._key = key
        self._on_published = on_published
        self._inbox = nc.new_inbox()
        self._cut = len(self._inbox) + 1
        self._pending: dict[int, _Sent] = {}
        self._count = 0
        self._watermark = 0
        self._subscription: Subscription | None = None
        self._loop = asyncio.get_running_loop()
        self._settled = asyncio.Event()
        self._settled.set()

    @property
    def waiting(self) -> int:
        """Number of events that the stream has not acknowledged yet."""
        return len(self._pending)

    async def start(self) -> None:
        """Subscribe to acknowledgements."""
        self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_ack)

    async def flush(self) -> None:
        """Publish withheld events, resend unacknowledged ones, and wait until the stream has all."""
        for withheld in list(self._withheld.values()):
            await self._publish_now(withheld.record, withheld.revision)
        await self._resend(0.0)
        await self._settled.wait()

    async def stop(self) -> None:
        """Unsubscribe; the next leader publishes the events that were not acknowledged."""
        if self._subscription is not None and not self._nc.is_closed:
            await self._subscription.unsubscribe()

    async def publish(self, record: LeaseRecord, revision: int) -> None:
        """Publish the event of a record's last change, durable at a revision; that of a renewal may be withheld."""
        self.counts[record.event_kind.value] += 1
        lease = record.lease
        before = self._withheld.pop(lease.lease_id, None)
        self._event_counts.merged += before is not None
        now = self._loop.time()
        if record.event_kind is LeaseEventKind.RENEWED and self._pace.may_withhold(
            lease.lease_id, self._budget.over_share(lease.owner, now), record.changed_at, now
        ):
            since = now if before is None else before.since
            self._withheld[lease.lease_id] = _Withheld(record, revision, since)
            self._on_published(lease.lease_id, record.version)
        else:
            await self._publish_now(record, revision)

    async def _publish_now(self, record: LeaseRecord, revision: int) -> None:
        self._withheld.pop(record.lease.lease_id, None)
        await self._publish_event(
            record.lease.lease_id, Announcement(version=record.version, event=record.event()), revision
        )

    async def _publish_due(self) -> None:
        """Publish the events of withheld renewals that are due."""
        now, clock = self._loop.time(), datetime.now(UTC)
        for withheld in list(self._withheld.values()):
            lease = withheld.record.lease
            if self._withheld.get(lease.lease_id) is not withheld:
                continue
            if not self._pace.may_withhold(lease.lease_id, self._budget.over_share(lease.owner, now), clock, now):
                await self._publish_now(withheld.record, withheld.revision)

    async def republish_missing(self, records: Iterable[tuple[LeaseRecord, int]], watermark: int) -> int:
        """Publish events that an earlier term did not get to the stream.

        Args:
            records: all of the bucket, each with its revision.
            watermark: revision up to which no event is missing.

        Returns:
            Number of missing events.
        """
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(record: LeaseRecord, revision: int) -> int:
            missing = 0
            async with gate:
                for announcement in record.announcements():
                    if await self._is_stored(announcement):
                        self._on_published(record.lease.lease_id, announcement.version)
                    else:
                        missing += 1
                        await self._publish_event(record.lease.lease_id, announcement, revision)
            return missing

        suspects = [(record, revision) for record, revision in records if revision > watermark]
        self._watermark = watermark
        return sum(await asyncio.gather(*(one(record, revision) for record, revision in suspects)))

    async def maintain(self) -> float:
        """Publish withheld events that are due, move the watermark, resend; returns the seconds until the next time."""
        await self._publish_due()
        await self.save_watermark()
        if self._pending and self._nc.is_connected:
            await self._resend(_RESEND_SECONDS)
        return _WATERMARK_SECONDS

    async def save_watermark(self) -> None:
        """Write the watermark if it has moved."""
        # A write without an outcome may be stored below those that have one: the watermark stays before it. It also
        # stays before a renewal that was withheld just now; older ones are of owners who take much of the stream.
        now = self._loop.time()
        late = [w.revision - 1 for w in self._withheld.values() if now - w.since < _WITHHELD_SECONDS]
        watermark = min(
            self._store.known_revision,
            min((sent.revision - 1 for sent in self._pending.values()), default=2**63),
            *late,
        )
        if watermark > self._watermark:
            try:
                await self._store.put(WATERMARK, str(watermark).encode(), self._term)
                self._watermark = watermark
            except (Deposed, WriteFailed) as error:
                log.debug("watermark not written: %s", error)

    async def _resend(self, older_than_seconds: float) -> None:
        now = self._loop.time()
        for number, sent in list(self._pending.items()):
            if now - sent.sent_at < older_than_seconds or number not in self._pending:
                continue
            if now - sent.first_at > _DEDUPLICATED_SECONDS and await self._is_stored(sent.announcement):
                self._confirm(number)
                continue
            sent.sent_at = now
            await self._send(number, sent)

    async def _publish_event(self, lease_id: str, announcement: Announcement, revision: int) -> None:
        event = announcement.event
        now = self._loop.time()
        data = codec.encode(event, codec.JSON)
        size = len(data) + _HEADERS_BYTES
        self._event_counts.sent_bytes += size
        self._budget.spend(event.lease.owner, size, now)
        self._pace.note_published(event.lease, event.kind, event.time, now)
        self._count += 1
        self._settled.clear()
        sent = self._pending[self._count] = _Sent(lease_id, announcement, data, revision, now)
        await self._send(self._count, sent)

    async def _send(self, number: int, sent: _Sent) -> None:
        event = sent.announcement.event
        try:
            await self._nc.publish(
                subjects.lease_subject(event.kind.value, sent.lease_id),
                sent.data,
                reply=f"{self._inbox}.{number}",
                headers={
                    "Nats-Msg-Id": event_id(self._key, sent.lease_id, sent.announcement.version),
                    codec.CONTENT_TYPE_HEADER: codec.JSON,
                },
            )
        except Exception as error:  # the buffer is full while the server is away, say: `maintain` sends it again
            log.debug("event of %s waits: %r", sent.lease_id, error)

    async def _on_ack(self, message: Msg) -> None:
        if not message.data or b'"error"' in message.data:
            if message.data:
                log.warning("an event was refused and will be sent again: %s", message.data.decode(errors="replace"))
            return
        self._confirm(int(message.subject[self._cut :]))

    def _confirm(self, number: int) -> None:
        sent = self._pending.pop(number, None)
        if not self._pending:
            self._settled.set()
        if sent is not None:
            self._on_published(sent.lease_id, sent.announcement.version)

    async def _is_stored(self, announcement: Announcement) -> bool:
        event = announcement.event
        subject = subjects.lease_subject(event.kind.value, event.lease.lease_id)
        try:
            found = await self._js.get_last_msg(subjects.FACTS_STREAM, subject, direct=False)
        except NotFoundError:
            return False
        try:
            stored = codec.decode(found.data or b"", LeaseEvent, codec.JSON)
        except (codec.DecodeError, msgspec.MsgspecError):
            return False
        return stored.time >= event.time
