"""Answers to requests that were not granted, remembered for a while, so that who asks again is answered alike.

Granted ones need no memory of their own: their leases are it.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from msgspec import Struct

from ...schemas import codec
from ...schemas.requests import Error, Rejection, WorkRequest
from ..durable.store import Deposed, Outcome, Store, WriteFailed, answer_key
from .refusals import Written

REJECTION_SECONDS: Final = 120.0
"""The answer to a request that was not granted is remembered for so long, where the client gave it an id."""

_MOST_KEPT: Final = 20_000
"""More at a time are remembered in memory alone; so are the oldest once they take too many bytes (see `refusals`)."""
_GONE_SECONDS: Final = 1.0
_MOST: Final = 100_000

_encode_canonical: Final = msgspec.json.Encoder(order="deterministic").encode


class Answer(Struct, frozen=True, kw_only=True):
    """A remembered answer, as the bucket holds it.

    Attributes:
        digest: of the request's body; empty where it was withdrawn before it came.
        rejection: the answer.
        until: it is forgotten then, seconds since the epoch.
        owner: who asked, or withdrew it before it came: whatever this owner asks under the id is answered so then.
            Empty in what earlier versions kept.
        request_id: of the request; empty in what earlier versions kept, which have it in the key.
    """

    digest: str
    rejection: Rejection
    until: float
    owner: str = ""
    request_id: str = ""

    def answers(self, request: WorkRequest, digest: str) -> bool:
        """Whether it is the answer to a request with this digest."""
        return self.digest == digest if self.digest else self.owner == request.owner


class Answers:
    """All of a term's.

    Args:
        store: the bucket.
        term: revision of the leader's key.
        known: as read from the bucket, by what follows `answer.` in their keys.
        deposed: called when a write was refused since another planner leads.
    """

    def __init__(self, store: Store, term: int, known: dict[str, Answer], deposed: Callable[[], None]) -> None:
        self._store = store
        self._term = term
        self._known = {(answer.owner, answer.request_id or key): answer for key, answer in known.items()}
        self._deposed = deposed
        self._forgetting = deque(sorted((answer.until, key) for key, answer in self._known.items()))
        self._written = Written(store.most_bytes)
        for key, answer in known.items():
            self._written.add(key, answer.owner, _size_of(answer.rejection))
        self._keys = {(answer.owner, answer.request_id or key): key for key, answer in known.items()}
        """Under which key the bucket has each."""
        self._plain = {key: answer.owner for key, answer in known.items() if answer.request_id in ("", key)}
        """Whose answer has a key that is the request's id alone, as earlier versions read it."""

    def get(self, owner: str, request_id: str, digest: str = "") -> Answer | None:
        """The answer under an owner's id; None if there is none (any more).

        Args:
            owner: who asks.
            request_id: under which id.
            digest: of what is asked. What an earlier version kept without an owner answers that very body alone.
        """
        answer = self._known.get((owner, request_id))
        if answer is None:
            answer = self._known.get(("", request_id))
            if answer is not None and (not digest or answer.digest != digest):
                return None
        return answer if answer is not None and answer.until > time.time() else None

    def _key(self, owner: str, request_id: str) -> str:
        """Names an answer in the bucket: the id, for planners of earlier versions, unless another owner's has it."""
        if self._plain.setdefault(request_id, owner) == owner:
            return request_id
        return f"{request_id}.{hashlib.blake2b(owner.encode(), digest_size=8).hexdigest()}"

    async def keep(
        self,
        request_id: str,
        rejection: Rejection,
        *,
        digest: str = "",
        owner: str = "",
        then: Callable[[], Awaitable[None]],
        deposed: Callable[[], None],
    ) -> None:
        """Remember a rejection, then go on.

        Args:
            request_id: of the request.
            rejection: its answer.
            digest: of its body, where that is known.
            owner: who asked or withdrew it.
            then: called once it is remembered.
            deposed: called instead where another planner leads.
        """
        until = time.time() + REJECTION_SECONDS
        answer = Answer(digest=digest, rejection=rejection, until=until, owner=owner, request_id=request_id)

        async def remember() -> None:
            self._known[owner, request_id] = answer
            self._forgetting.append((answer.until, (owner, request_id)))
            self.forget(time.time())
            await then()

        if len(self._known) >= _MOST_KEPT or not self._store.roomy:
            await remember()
            return

        async def landed(outcome: Outcome) -> None:
            if isinstance(outcome, Deposed):
                self._deposed()
                deposed()
                return
            if isinstance(outcome, WriteFailed):
                self._written.drop(key)
            # A rejection promises nothing, so that it is answered even where the bucket is full.
            await remember()

        key = self._keys.get((owner, request_id)) or self._key(owner, request_id)
        self._keys[owner, request_id] = key
        value = codec.encode(answer, codec.JSON)
        for oldest in self._written.add(key, owner, len(value)):
            await self._store.write(answer_key(oldest), b"", self._term, _nothing, ttl_seconds=_GONE_SECONDS)
        await self._store.write(answer_key(key), value, self._term, landed, ttl_seconds=REJECTION_SECONDS)

    def purged(self) -> None:
        """The bucket holds none of them any more."""
        self._written.clear()

    def forget(self, now: float) -> None:
        """Let go of those whose time is over, and of the oldest of too many."""
        while self._forgetting and (self._forgetting[0][0] <= now or len(self._known) > _MOST):
            until, key = self._forgetting.popleft()
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


def digest_of(request: WorkRequest) -> str:
    """Tells bodies apart: the same fields in another order, or defaults written out, are the same body."""
    given = {name: value for name, default in _DEFAULTS if (value := getattr(request, name)) != default}
    given.pop("holder", None)  # a process that was started again may ask again
    return hashlib.blake2b(_encode_canonical(given), digest_size=12).hexdigest()


def _size_of(rejection: Rejection) -> int:
    """Bytes of an answer in the bucket, about."""
    return 400 + len(rejection.message) + sum(60 + len(reason.detail) for reason in rejection.reasons)


async def _nothing(_: Outcome) -> None:
    """It was to be gone anyway."""


def conflict(request_id: str) -> Error:
    """The answer to a request whose id is taken."""
    return Error(
        code="conflict",
        message=f"Request id {request_id!r} was used for another request: give each request an id of its own",
        field="$.request_id",
    )
