"""Events of work requests and drains, published in batches for the history.

They are about each request that waits, each that was answered finally, and each drain that begins or ends.

An event is kept here until the stream has acknowledged it. One that is published again has the same uid, by which the
history stores it once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from ...bus.permissions import NotAllowed, request
from ...schemas import codec, subjects
from ...schemas.request_events import MAX_EVENTS, RequestEvent, RequestEvents, WaitingRequest
from ...schemas.work.drains import DrainSpan

log = logging.getLogger("corral.planner.requests")

LINGER_SECONDS: Final = 0.02
"""Time for which an event waits for others: it is lost if the planner is killed meanwhile."""
MAX_WAITING_EVENTS: Final = 20_000
"""Events that are kept while the stream takes none; the oldest are dropped then."""
KEEP_SECONDS: Final = 10.0
"""Time for which the durable entry of an answered request is kept while the stream takes no event of it.

Kept longer, it would outlive the lease or the rejection that says what became of the request, and a later leader would
take it for one that waits."""
_ACK_SECONDS: Final = 5.0
_ENVELOPE_BYTES: Final = 4096
_REFUSED_SECONDS: Final = 60.0
"""Time for which nothing is published once the server did not permit it."""

Stored = Callable[[], None]
Event = RequestEvent | WaitingRequest | DrainSpan


class _Waiting:
    """An event that the stream has not acknowledged, with what is to be done then, and when it was added."""

    __slots__ = ("added_at", "event", "stored")

    def __init__(self, event: Event, stored: Stored) -> None:
        self.event = event
        self.stored = stored
        self.added_at = time.monotonic()


def _ignore() -> None:
    """Do nothing once an event is stored."""


class StreamRefused(NatsError):
    """The stream did not take the events."""


class RequestLog:
    """Publishes the events of work requests and drains of one term, of which the first message says that it began.

    Args:
        nc: connection of the planner.
        planner: id of this planner.
        max_bytes: size limit of a message.

    Attributes:
        dropped: number of events that were dropped since the stream took none.
    """

    def __init__(self, nc: Client, planner: str, max_bytes: int) -> None:
        self.dropped = 0
        self._nc = nc
        self._planner = planner
        self._max_bytes = max_bytes - _ENVELOPE_BYTES
        self._waiting: deque[_Waiting] = deque()
        self._begun = False
        self._added = asyncio.Event()
        self._added.set()
        self._refused_at = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, event: Event, stored: Stored = _ignore) -> None:
        """Publish an event with the next batch.

        Args:
            event: the event.
            stored: called once the stream has it, it was dropped, or the stream has not taken it for `KEEP_SECONDS`.
        """
        if time.monotonic() - self._refused_at < _REFUSED_SECONDS:
            self.dropped += 1
            stored()
            return
        if len(self._waiting) >= MAX_WAITING_EVENTS:
            if not self.dropped:
                log.warning("the stream %s takes no events: the oldest are dropped", subjects.REQUESTS_STREAM)
            self.dropped += 1
            self._waiting.popleft().stored()
        self._waiting.append(_Waiting(event, stored))
        self._added.set()

    async def publish_added(self) -> float:
        """Wait for events and publish them; returns the seconds until the next time.

        Raises:
            NatsError, TimeoutError: see `flush`.
        """
        if not self._waiting and self._begun:
            self._added.clear()
            await self._added.wait()
            await asyncio.sleep(LINGER_SECONDS)
        await self.flush()
        return 0.0

    async def flush(self) -> None:
        """Publish all events.

        Raises:
            StreamRefused, NatsError, TimeoutError: the stream did not acknowledge; the events stay for the next time.
        """
        while self._waiting or not self._begun:
            batch, data = self._batch()
            try:
                await self._publish(data)
            except NotAllowed as refused:
                self._give_up(refused)
                return
            except (NatsError, TimeoutError):
                self._release_old()
                raise
            self._begun = True
            for one in batch:
                # An event that was dropped meanwhile is no longer the first.
                if self._waiting and self._waiting[0] is one:
                    self._waiting.popleft().stored()

    async def _publish(self, data: bytes) -> None:
        ack = await request(
            self._nc,
            subjects.request_events_subject(self._planner),
            data,
            timeout=_ACK_SECONDS,
            headers={codec.CONTENT_TYPE_HEADER: codec.JSON},
        )
        if b'"error"' in ack.data:
            raise StreamRefused(ack.data.decode(errors="replace"))

    def _release_old(self) -> None:
        """Let go of the durable entries of old events, which stay in memory alone."""
        before = time.monotonic() - KEEP_SECONDS
        for one in self._waiting:
            if one.added_at > before:
                return
            one.stored()
            one.stored = _ignore

    def _give_up(self, refused: NotAllowed) -> None:
        """Drop all events: the server's configuration is of an earlier version and does not permit them."""
        if not self.dropped:
            log.warning("%s: requests are not in the history until `corral auth apply`", refused)
        self._refused_at = time.monotonic()
        self._begun = True
        self.dropped += len(self._waiting)
        while self._waiting:
            self._waiting.popleft().stored()

    def _batch(self) -> tuple[list[_Waiting], bytes]:
        count = min(MAX_EVENTS, len(self._waiting))
        while True:
            batch = [self._waiting[at] for at in range(count)]
            data = codec.encode(self._message([one.event for one in batch]), codec.JSON)
            if len(data) <= self._max_bytes or count <= 1:
                return batch, data
            count //= 2

    def _message(self, events: list[Event]) -> RequestEvents:
        return RequestEvents(
            planner=self._planner,
            events=[event for event in events if isinstance(event, RequestEvent)],
            new_term=not self._begun,
            waiting=[event for event in events if isinstance(event, WaitingRequest)],
            drains=[event for event in events if isinstance(event, DrainSpan)],
        )
