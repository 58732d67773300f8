"""Durable entries of the queue: a planner that takes over has every waiting request, in order, with its age.

The bucket has an entry for each waiting request under `queue.<uid>`. It is deleted once the history's stream has the
event of what became of the request. So an entry that is found at the start may be of a request that was granted or
rejected already: the lease or the cached rejection says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from ...bus.tasks import BackgroundTasks
from ...schemas import codec
from ...schemas.request_events import Forecast
from ...schemas.requests import WorkRequest
from ..durable.store import Deposed, Store, WriteFailed

log = logging.getLogger("corral.planner.queue")

QUEUE_PREFIX: Final = "queue."
_GONE_SECONDS: Final = 1.0
"""Time to live of the empty value that deletes an entry."""


class StoredCaller(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A client that waits for the answer to a request.

    Attributes:
        reply_to: reply subject.
        content_type: of the answer.
        client_name: see `Responder.client_name`.
        subject: to which the request was sent.
    """

    reply_to: str
    content_type: str = codec.JSON
    client_name: str = ""
    subject: str = ""


class StoredRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A waiting request.

    Attributes:
        uid: id of its event.
        request: with its id.
        asked_at: seconds since the epoch.
        number: of its arrival.
        until: time at which it is rejected, in seconds since the epoch.
        digest: of its body.
        has_client_id: true if the client gave the request id.
        position: position in the queue at its arrival.
        callers: that wait for the answer.
        forecast: of its start, that was made first.
        age_from: see `queue.Arrival`.
    """

    uid: str
    request: WorkRequest
    asked_at: float
    number: int
    until: float
    digest: str = ""
    has_client_id: bool = True
    position: int = 0
    callers: list[StoredCaller] = []
    forecast: Forecast | None = None
    age_from: float | None = None


class StoredQueue:
    """Writes the entries of one term.

    Args:
        store: the bucket.
        term: revision of the leader's key.
    """

    def __init__(self, store: Store, term: int) -> None:
        self._store = store
        self._term = term
        self._tasks = BackgroundTasks()
        self._warned = False

    def put(self, entry: StoredRequest) -> bool:
        """Start to write an entry; False if the bucket has no room for it."""
        value = codec.encode(entry, codec.JSON)
        if not self._store.has_room or len(value) > self._store.max_record_bytes:
            if not self._warned:
                log.warning("the bucket has no room for waiting requests: a new leader learns of them from retries")
            self._warned = True
            return False
        self._tasks.start(self._write(entry.uid, value))
        return True

    def delete(self, uid: str) -> None:
        """Start to delete an entry."""
        self._tasks.start(self._write(uid, b""))

    async def _write(self, uid: str, value: bytes) -> None:
        try:
            await self._store.put(
                f"{QUEUE_PREFIX}{uid}", value, self._term, ttl_seconds=0.0 if value else _GONE_SECONDS
            )
        except Deposed:  # the next leader has what was written
            return
        except WriteFailed as error:
            log.warning("waiting request %s is not stored: %s", uid, error)

    async def close(self) -> None:
        """End the writes that are in flight. Call it once the store has abandoned them."""
        await self._tasks.cancel()


def decode_stored(entries: Iterable[tuple[str, bytes]]) -> list[StoredRequest]:
    """Decode entries of the bucket, by arrival; one that can't be decoded is left out, with an error in the log."""
    found: list[StoredRequest] = []
    for key, value in entries:
        if not value:
            continue
        try:
            found.append(codec.decode(value, StoredRequest, codec.JSON))
        except codec.DecodeError as error:
            log.error("a waiting request (%s) can't be read and is left out: %s", key, error)
    return sorted(found, key=lambda one: one.number)
