"""Lease events on the bus, each once: published after the change is durable, and again until the stream has it.

An event's message id stands for the lease and the version of its record, so that the stream stores it once within its
window for duplicates. The stream knows ids whoever sent them, and collectors publish there too: ids are made with a key
that the bucket keeps, so that nobody can use one first. For longer gaps the bucket keeps a watermark (`told`): every
change up to that revision has its event on the stream. A planner that takes over looks at the few changes behind it,
asks the stream for each, and publishes what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from ...schemas import bus, codec
from ...schemas.requests import LeaseEvent
from .leases import Announcement, LeaseRecord, change_id
from .store import TOLD, Deposed, Store, WriteFailed

log = logging.getLogger("corral.planner.announce")

_RESEND_SECONDS: Final = 2.0
_CERTAIN_SECONDS: Final = 60.0
"""Sent again within it, the stream's window for duplicates still knows the event; later the stream is asked first."""
_AT_ONCE: Final = 64
_MARK_SECONDS: Final = 0.5
EVENT_KEY_BYTES: Final = 32


def event_id(key: bytes, lease_id: str, version: int) -> str:
    """Message id of an event: the same from every planner that has the key, and from nobody else."""
    return hashlib.blake2b(change_id(lease_id, version).encode(), key=key, digest_size=16).hexdigest()


class _Sent:
    __slots__ = ("announcement", "first_at", "lease_id", "revision", "sent_at")

    def __init__(self, lease_id: str, announcement: Announcement, revision: int, now: float) -> None:
        self.lease_id = lease_id
        self.announcement = announcement
        self.revision = revision
        self.first_at = self.sent_at = now


class Announcer:
    """Publishes the events of one term.

    Args:
        nc: connection.
        store: for the watermark.
        term: revision of the leader's key.
        key: makes the message ids of events.
        told: called with lease and version once the stream has the event.
        counts: of changes that were announced, by kind.
    """

    def __init__(
        self,
        nc: Client,
        store: Store,
        term: int,
        key: bytes,
        told: Callable[[str, int], None],
        counts: Counter[str] | None = None,
    ) -> None:
        self.counts = Counter[str]() if counts is None else counts
        self._nc = nc
        self._js = nc.jetstream()
        self._store = store
        self._term = term
        self._key = key
        self._told = told
        self._inbox = nc.new_inbox()
        self._cut = len(self._inbox) + 1
        self._pending: dict[int, _Sent] = {}
        self._count = 0
        self._marked = 0
        self._subscription: Subscription | None = None
        self._loop = asyncio.get_running_loop()
        self._settled = asyncio.Event()
        self._settled.set()

    @property
    def waiting(self) -> int:
        """Events that the stream has not acknowledged yet."""
        return len(self._pending)

    async def start(self) -> None:
        """Listen for acknowledgements."""
        self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_ack)

    async def settle(self) -> None:
        """Send at once what the stream has not acknowledged, and wait until it has every event."""
        await self._resend(0.0)
        await self._settled.wait()

    async def stop(self) -> None:
        """Stop listening; what is not acknowledged is healed by the next term."""
        if self._subscription is not None and not self._nc.is_closed:
            await self._subscription.unsubscribe()

    async def announce(self, record: LeaseRecord, revision: int) -> None:
        """Publish the event of a record's last change, durable at a revision."""
        announcement = Announcement(version=record.version, event=record.event())
        self.counts[announcement.event.kind.value] += 1
        await self._publish(record.lease.lease_id, announcement, revision)

    async def heal(self, records: Iterable[tuple[LeaseRecord, int]], watermark: int) -> int:
        """Publish events that an earlier term did not get to the stream.

        Args:
            records: all of the bucket, each with its revision.
            watermark: up to which all is well.

        Returns:
            How many were missing.
        """
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(record: LeaseRecord, revision: int) -> int:
            missing = 0
            async with gate:
                for announcement in record.announcements():
                    if await self._is_stored(announcement):
                        self._told(record.lease.lease_id, announcement.version)
                    else:
                        missing += 1
                        await self._publish(record.lease.lease_id, announcement, revision)
            return missing

        suspects = [(record, revision) for record, revision in records if revision > watermark]
        self._marked = watermark
        return sum(await asyncio.gather(*(one(record, revision) for record, revision in suspects)))

    async def tend(self) -> float:
        """Move the watermark and resend what has waited too long; returns the seconds until the next time."""
        await self.mark()
        if self._pending and self._nc.is_connected:
            await self._resend(_RESEND_SECONDS)
        return _MARK_SECONDS

    async def mark(self) -> None:
        """Write the watermark if it has moved."""
        # A write whose outcome is not known yet may have landed below those that are: nothing is marked past it.
        mark = min(self._store.floor, min((sent.revision - 1 for sent in self._pending.values()), default=2**63))
        if mark > self._marked:
            try:
                await self._store.put(TOLD, str(mark).encode(), self._term)
                self._marked = mark
            except (Deposed, WriteFailed) as error:
                log.debug("watermark not written: %s", error)

    async def _resend(self, older_than_seconds: float) -> None:
        now = self._loop.time()
        for number, sent in list(self._pending.items()):
            if now - sent.sent_at < older_than_seconds or number not in self._pending:
                continue
            if now - sent.first_at > _CERTAIN_SECONDS and await self._is_stored(sent.announcement):
                self._confirm(number)
                continue
            sent.sent_at = now
            await self._send(number, sent)

    async def _publish(self, lease_id: str, announcement: Announcement, revision: int) -> None:
        self._count += 1
        self._settled.clear()
        sent = self._pending[self._count] = _Sent(lease_id, announcement, revision, self._loop.time())
        await self._send(self._count, sent)

    async def _send(self, number: int, sent: _Sent) -> None:
        event = sent.announcement.event
        try:
            await self._nc.publish(
                bus.lease_subject(event.kind.value, sent.lease_id),
                codec.encode(event, codec.JSON),
                reply=f"{self._inbox}.{number}",
                headers={"Nats-Msg-Id": event_id(self._key, sent.lease_id, sent.announcement.version)},
            )
        except NatsError as error:  # the buffer is full while the server is away: `tend` sends it again
            log.debug("event of %s waits: %s", sent.lease_id, error)

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
            self._told(sent.lease_id, sent.announcement.version)

    async def _is_stored(self, announcement: Announcement) -> bool:
        event = announcement.event
        subject = bus.lease_subject(event.kind.value, event.lease.lease_id)
        try:
            found = await self._js.get_last_msg(bus.FACTS_STREAM, subject, direct=False)
        except NotFoundError:
            return False
        try:
            stored = codec.decode(found.data or b"", LeaseEvent, codec.JSON)
        except (codec.DecodeError, msgspec.MsgspecError):
            return False
        return stored.time >= event.time
