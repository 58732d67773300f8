"""Places in the queue of requests that left it because their clients were silent.

A client that asks again soon gets its place back. Places are in the bucket, too, so that a planner that takes over has
them. The time for which a place is kept begins anew then, since nobody could ask meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Final

from msgspec import Struct
from nats.errors import Error as NatsError

from ....bus.permissions import NotAllowed
from ....bus.tasks import BackgroundTasks
from ....schemas import codec
from ....schemas.requests import WorkRequest
from ...durable.store import Deposed, Store, WriteFailed, decode_or_none
from ...fleet.lru import LRUCache
from .queue import MAX_WAITING, Arrival, QueuedRequest

PLACE_PREFIX: Final = "place."
PLACE_SECONDS: Final = 600.0
"""Time for which a place is kept."""
_STORED_SECONDS: Final = 2 * PLACE_SECONDS
"""Time to live in the bucket: however often planners take over, a place is not kept for longer."""


class StoredPlace(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A place as the bucket has it, under `place.<uid>`.

    Attributes:
        owner: of the request.
        request_id: of the request.
        digest: of its body.
        asked_at: see `queue.Arrival`, as the four that follow.
        number: of its arrival.
        until: time at which it is rejected.
        position: position in the queue at its arrival.
        age_from: time from which it counts as waiting in the order.
    """

    owner: str
    request_id: str
    digest: str
    asked_at: float
    number: int
    until: float
    position: int = 0
    age_from: float | None = None


class Places:
    """Places of one term.

    Args:
        store: the bucket.
        term: revision of the leader's key.
        known: as read from the bucket, by key, in the order of writing.
        now: time of the takeover, in seconds since the epoch.
    """

    def __init__(self, store: Store, term: int, known: Iterable[tuple[str, bytes]], now: float) -> None:
        self._store = store
        self._term = term
        self._tasks = BackgroundTasks()
        self._kept: LRUCache[tuple[str, str], tuple[str, StoredPlace, float]] = LRUCache(MAX_WAITING)
        """Key in the bucket, place, and end of the time for which it is kept; by owner and request id."""
        for key, value in known:
            place = decode_or_none(key, value, StoredPlace)
            if place is not None:
                self._kept.put((place.owner, place.request_id), (key, place, now + PLACE_SECONDS))

    async def keep(self, uid: str, queued: QueuedRequest, digest: str, now: float) -> None:
        """Keep the place of a request that has left the queue; not of one without a digest, which can't be sent again.

        Args:
            uid: id of the event of the request.
            queued: the request.
            digest: of its body.
            now: seconds since the epoch.
        """
        if not digest:
            return
        arrival = queued.arrival
        place = StoredPlace(
            owner=queued.request.owner,
            request_id=queued.request.request_id or "",
            digest=digest,
            asked_at=arrival.asked_at,
            number=arrival.number,
            until=arrival.until,
            position=arrival.position,
            age_from=arrival.age_from,
        )
        key = f"{PLACE_PREFIX}{uid}"
        self._kept.put((place.owner, place.request_id), (key, place, now + PLACE_SECONDS))
        if self._store.has_room:
            with contextlib.suppress(Deposed, WriteFailed):  # it is kept in memory alone
                value = codec.encode(place, codec.JSON)
                await self._store.put(key, value, self._term, ttl_seconds=_STORED_SECONDS)

    def take(self, request: WorkRequest, digest: str, now: float) -> Arrival | None:
        """Take the place of a request that was sent again; None if there is none.

        Args:
            request: with its id.
            digest: of its body; empty if it can't have been sent before.
            now: seconds since the epoch.
        """
        found = self._kept.get((request.owner, request.request_id or "")) if digest else None
        if found is None:
            return None
        key, place, until = found
        if place.digest != digest or now >= min(until, place.until):
            return None
        self._kept.remove((request.owner, request.request_id or ""))
        self._tasks.start(self._delete(key))
        return Arrival(place.asked_at, place.number, place.until, place.position, place.age_from)

    async def _delete(self, key: str) -> None:
        with contextlib.suppress(NotAllowed, NatsError, OSError, TimeoutError):  # it expires anyway
            await self._store.purge(key)

    async def close(self) -> None:
        """End the deletions that are in flight. Call it once the store has abandoned their writes."""
        await self._tasks.cancel()
