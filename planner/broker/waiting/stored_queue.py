"""Durable entries of the queue: a planner that takes over has every waiting request, in order, with its age.

The bucket has an entry for each waiting request under `queue.<uid>`. It is deleted once the history's stream has the
event of what became of the request. So an entry that is found at the start may be of a request that was granted or
rejected already: the lease or the cached rejection says so.

A large request, which this process does not decode, is stored as it came, in parts under `queue_body.<uid>.<number>`,
since with the headers of a write its message may exceed what the bus carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from msgspec import Struct, structs
from nats.errors import Error as NatsError

from ....bus.permissions import NotAllowed
from ....bus.tasks import BackgroundTasks
from ....schemas import codec
from ....schemas.requests import WorkRequest
from ...durable.store import Deposed, Store, WriteFailed

log = logging.getLogger("corral.planner.queue")

QUEUE_PREFIX: Final = "queue."
BODY_PREFIX: Final = "queue_body."
MAX_PART: Final = 1 / 4
"""Part of the bucket that waiting requests may take, so that leases have the rest."""
_BODY_PART_BYTES: Final = 256 * 1024
_PURGE_AGAIN_SECONDS: Final = 1.0
_GONE_SECONDS: Final = 1.0
"""Time to live of the empty value that deletes an entry, where the server does not permit its deletion."""


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
        age_from: see `queue.Arrival`.
        body_parts: number of parts of its message in the bucket; 0 if `request` is all of it.
        body_type: content type of the message.
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
    age_from: float | None = None
    body_parts: int = 0
    body_type: str = codec.JSON


class StoredQueue:
    """Writes and deletes the entries of one term.

    Args:
        store: the bucket.
        term: revision of the leader's key.
    """

    def __init__(self, store: Store, term: int) -> None:
        self._store = store
        self._term = term
        self._tasks = BackgroundTasks()
        self._bytes: dict[str, int] = {}
        """Size of each entry with its body, by uid."""
        self._with_body: set[str] = set()
        """Uids of entries with a body."""
        self._used = 0
        self._written: dict[str, asyncio.Event] = {}
        """Entries that are being written."""

    def has_room(self, body_bytes: int) -> bool:
        """True if the bucket has room for another entry, with a body of this size."""
        store = self._store
        return store.has_room and (store.max_bytes <= 0 or self._used + body_bytes < store.max_bytes * MAX_PART)

    def put(self, entry: StoredRequest, body: bytes = b"") -> None:
        """Start to write an entry.

        Args:
            entry: without the number of parts of its body.
            body: message of the request, if `entry.request` is not all of it.
        """
        parts = [body[at : at + _BODY_PART_BYTES] for at in range(0, len(body), _BODY_PART_BYTES)]
        value = codec.encode(structs.replace(entry, body_parts=len(parts)), codec.JSON)
        self.note(entry.uid, len(value), len(body))
        written = self._written[entry.uid] = asyncio.Event()
        self._tasks.start(self._write(entry.uid, value, parts, written))

    def note(self, uid: str, entry_bytes: int, body_bytes: int) -> None:
        """Note an entry that the bucket has, or is to have."""
        self._bytes[uid] = entry_bytes + body_bytes
        self._used += entry_bytes + body_bytes
        if body_bytes:
            self._with_body.add(uid)

    def delete(self, uid: str) -> None:
        """Start to delete an entry."""
        self._used -= self._bytes.pop(uid, 0)
        self._tasks.start(self._delete(uid))

    async def _write(self, uid: str, value: bytes, parts: list[bytes], written: asyncio.Event) -> None:
        """Write an entry after its body: an entry that is found has a whole one."""
        try:
            for number, part in enumerate(parts):
                key = f"{BODY_PREFIX}{uid}.{number}"
                await self._store.put(key, part, self._term, message_id=key)
            # With an id, since a value that is stored twice, as it was sent again, would come back (`Store.purge`).
            key = f"{QUEUE_PREFIX}{uid}"
            await self._store.put(key, value, self._term, message_id=key)
        except Deposed:  # the next leader has what was written
            return
        except WriteFailed as error:
            log.warning("waiting request %s is not stored: %s", uid, error)
        finally:
            written.set()
            self._written.pop(uid, None)

    async def _delete(self, uid: str) -> None:
        written = self._written.get(uid)
        if written is not None:  # what is sent again after the deletion would stay
            await written.wait()
        while True:
            try:
                await self._store.purge(f"{QUEUE_PREFIX}{uid}")
                if uid in self._with_body:
                    await self._store.purge(f"{BODY_PREFIX}{uid}.*")
                self._with_body.discard(uid)
                return
            except NotAllowed:
                await self._expire(uid)
                return
            except (NatsError, OSError, TimeoutError) as error:
                log.debug("waiting request %s is not deleted yet: %r", uid, error)
                await asyncio.sleep(_PURGE_AGAIN_SECONDS)

    async def _expire(self, uid: str) -> None:
        """Replace an entry by an empty value that expires."""
        with contextlib.suppress(Deposed, WriteFailed):
            await self._store.put(f"{QUEUE_PREFIX}{uid}", b"", self._term, ttl_seconds=_GONE_SECONDS)

    async def settled(self) -> None:
        """Wait until all is written and deleted."""
        await self._tasks.settled()

    async def close(self) -> None:
        """End the writes that are in flight. Call it once the store has abandoned them."""
        await self._tasks.cancel()


class Restored(NamedTuple):
    """An entry that was read from the bucket.

    Attributes:
        stored: the entry.
        size: of the entry in bytes.
        body: message of the request; empty if the entry has all of it.
    """

    stored: StoredRequest
    size: int
    body: bytes


def decode_stored(entries: Iterable[tuple[str, bytes]], parts: Mapping[str, bytes]) -> list[Restored]:
    """Decode entries of the bucket, by arrival; one that can't be decoded is left out, with an error in the log.

    Args:
        entries: by key, as they were written.
        parts: of bodies, by key.
    """
    found: list[Restored] = []
    for key, value in entries:
        if not value:
            continue
        try:
            stored = codec.decode(value, StoredRequest, codec.JSON)
            numbers = range(stored.body_parts)
            body = b"".join(parts[f"{BODY_PREFIX}{stored.uid}.{number}"] for number in numbers)
            found.append(Restored(stored, len(value), body))
        except (codec.DecodeError, KeyError) as error:
            log.error("a waiting request (%s) can't be read and is left out: %s", key, error)
    found.reverse()  # of two of a request with its place the later counts
    return sorted(found, key=lambda one: one.stored.number)
