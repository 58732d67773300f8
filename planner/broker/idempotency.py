"""Idempotency: caches rejections by owner and request id, so that a retry gets the same answer.

Granted requests need no cache: their leases hold the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

from ...bus.tasks import BackgroundTasks
from ...schemas import codec
from ...schemas.requests import Distribution, Error, Rejection, WorkItem, WorkRequest
from ..durable.store import Deposed, Store, WriteFailed, answer_key
from .stored_rejections import StoredRejections

REJECTION_SECONDS: Final = 120.0
"""Retention of a rejection, if the client gave the request an id."""

_MAX_STORED: Final = 20_000
"""Limit on the rejections in the bucket, where the oldest go sooner if they take too many bytes (see `refusals`).
More are kept in memory alone."""
_GONE_SECONDS: Final = 1.0
_MAX_CACHED: Final = 100_000

_encode_canonical: Final = msgspec.json.Encoder(order="deterministic").encode


class CachedRejection(Struct, frozen=True, kw_only=True):
    """A cached rejection, as the bucket holds it.

    Attributes:
        digest: of the request's body; empty if it was withdrawn before it arrived.
        rejection: the answer.
        until: end of retention, seconds since the epoch.
        owner: of the request. If it was withdrawn before it arrived, any body of this owner under the id gets this
            answer. Empty in entries of earlier versions.
        request_id: of the request; empty in entries of earlier versions, which have it in the key.
    """

    digest: str
    rejection: Rejection
    until: float
    owner: str = ""
    request_id: str = ""

    def matches(self, request: WorkRequest, digest: str) -> bool:
        """True if it answers this request, by digest; by owner if the request was withdrawn before it arrived."""
        return self.digest == digest if self.digest else self.owner == request.owner


class RejectionCache:
    """Cache of a term's rejections, in memory and in the bucket.

    Args:
        store: the bucket.
        term: revision of the leader's key.
        known: as read from the bucket, by the part of the key after `answer.`.
        deposed: called when a write was refused since another planner leads.
    """

    def __init__(self, store: Store, term: int, known: dict[str, CachedRejection], deposed: Callable[[], None]) -> None:
        self._store = store
        self._term = term
        self._known = {(answer.owner, answer.request_id or key): answer for key, answer in known.items()}
        self._deposed = deposed
        self._tasks = BackgroundTasks()
        self._expiring = deque(sorted((answer.until, key) for key, answer in self._known.items()))
        self._written = StoredRejections(store.max_bytes)
        for key, answer in known.items():
            self._written.add(key, answer.owner, _size_of(answer.rejection))
        self._keys = {(answer.owner, answer.request_id or key): key for key, answer in known.items()}
        """Key in the bucket, by owner and request id."""
        self._plain = {key: answer.owner for key, answer in known.items() if answer.request_id in ("", key)}
        """Owner by key, for keys that are a request id alone, which earlier versions can read."""

    def get(self, owner: str, request_id: str, digest: str = "") -> CachedRejection | None:
        """Cached rejection by owner and request id; None if there is none (any more).

        Args:
            owner: of the request.
            request_id: of the request.
            digest: of the request's body, if known. An entry of an earlier version, which names no owner, answers that
                body alone.
        """
        answer = self._known.get((owner, request_id))
        if answer is None:
            answer = self._known.get(("", request_id))
            if answer is not None and (not digest or answer.digest != digest):
                return None
        return answer if answer is not None and answer.until > time.time() else None

    def _key(self, owner: str, request_id: str) -> str:
        """Key of a rejection in the bucket: the id, which earlier versions can read, unless another owner has it."""
        if self._plain.setdefault(request_id, owner) == owner:
            return request_id
        return f"{request_id}.{hashlib.blake2b(owner.encode(), digest_size=8).hexdigest()}"

    async def add(self, request_id: str, rejection: Rejection, *, digest: str = "", owner: str = "") -> None:
        """Cache a rejection, in the bucket, too, if that has room.

        Args:
            request_id: of the request.
            rejection: its answer.
            digest: of its body, if known.
            owner: of the request, who sent or withdrew it.

        Raises:
            Deposed: another planner leads.
        """
        until = time.time() + REJECTION_SECONDS
        answer = CachedRejection(digest=digest, rejection=rejection, until=until, owner=owner, request_id=request_id)
        if len(self._known) < _MAX_STORED and self._store.has_room:
            await self._write(owner, request_id, answer)
        self._known[owner, request_id] = answer
        self._expiring.append((answer.until, (owner, request_id)))
        self.evict_expired(time.time())

    async def _write(self, owner: str, request_id: str, answer: CachedRejection) -> None:
        key = self._keys.get((owner, request_id)) or self._key(owner, request_id)
        self._keys[owner, request_id] = key
        value = codec.encode(answer, codec.JSON)
        for oldest in self._written.add(key, owner, len(value)):
            self._tasks.start(self._delete(oldest))
        try:
            await self._store.put(answer_key(key), value, self._term, ttl_seconds=REJECTION_SECONDS)
        except Deposed:
            self._deposed()
            raise
        except WriteFailed:  # it promises nothing, so that it is the answer even where the bucket is full
            self._written.drop(key)

    async def _delete(self, key: str) -> None:
        with contextlib.suppress(Deposed, WriteFailed):  # it expires anyway
            await self._store.put(answer_key(key), b"", self._term, ttl_seconds=_GONE_SECONDS)

    async def close(self) -> None:
        """End the deletions that are in flight. Call it once the store has abandoned their writes."""
        await self._tasks.cancel()

    def note_purged(self) -> None:
        """Note that all rejections were deleted from the bucket."""
        self._written.clear()

    def evict_expired(self, now: float) -> None:
        """Evict entries whose retention is over, and the oldest of too many."""
        while self._expiring and (self._expiring[0][0] <= now or len(self._known) > _MAX_CACHED):
            until, key = self._expiring.popleft()
            answer = self._known.get(key)
            if answer is not None and answer.until <= until:
                del self._known[key]
                self._written.drop(self._keys.pop(key, ""))
                if self._plain.get(key[1]) == key[0]:
                    del self._plain[key[1]]


_DEFAULTS: Final = tuple(
    (field.name, field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default)
    for field in msgspec.structs.fields(WorkRequest)
)


_ITEM_COST: Final = WorkItem(id="item").cost


def digest_of(request: WorkRequest) -> str:
    """Digest of a request's body. Order of fields, defaults that are written out, and `holder` make no difference."""
    given = {name: value for name, default in _DEFAULTS if (value := getattr(request, name)) != default}
    given.pop("holder", None)  # a process that was started again may ask again
    if request.distribution is not None:
        given["distribution"] = _without_default_costs(request.distribution)
    return hashlib.blake2b(_encode_canonical(given), digest_size=12).hexdigest()


def _without_default_costs(distribution: Distribution) -> Distribution:
    """A distribution whose encoding has no default cost of an item.

    msgspec leaves a field out only if it is the very object of the default, and a number that was decoded never is.
    """
    if isinstance(distribution.items, int):
        return distribution
    items = [
        WorkItem(id=item.id, memory_bytes=item.memory_bytes)
        if isinstance(item, WorkItem) and item.cost == _ITEM_COST
        else item
        for item in distribution.items
    ]
    return msgspec.structs.replace(distribution, items=items)


def _size_of(rejection: Rejection) -> int:
    """Approximate bytes of a rejection in the bucket."""
    return 400 + len(rejection.message) + sum(60 + len(reason.detail) for reason in rejection.reasons)


def conflict(request_id: str) -> Error:
    """Error for a request whose id was used with another body."""
    return Error(
        code="conflict",
        message=f"Request id {request_id!r} was used for another request: give each request an id of its own",
        field="$.request_id",
    )
