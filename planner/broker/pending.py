"""A pending request: decided but not yet answered, or queued, with the callers that wait for its answer."""

from __future__ import annotations

from typing import Final, Protocol

from msgspec import Struct

from ...bus.permissions import ACROSS
from ...schemas.requests import WorkRequest
from ..queue.durations import Estimate
from .large_requests import EncodedItems
from .waiting.queue import QueuedRequest
from .waiting.stored_queue import StoredCaller

_MAX_CALLERS: Final = 64
"""Limit on the callers of a request: one that retries has usually given up on its earlier attempt."""
_MAX_CALLERS_ACROSS: Final = 4
"""The same for callers from other accounts, whose reply subject is another one at each retry."""


class Responder(Protocol):
    """Sender of a message, which waits for one answer."""

    @property
    def reply_to(self) -> str:
        """Reply subject."""
        ...

    @property
    def client_name(self) -> str:
        """Name of a client that asks again under a request id while it is queued; empty if it gives none."""
        ...

    @property
    def stored(self) -> StoredCaller | None:
        """Address by which a later leader can answer; None if it can't."""
        ...

    async def answer(self, reply: Struct) -> None:
        """Send the answer."""
        ...

    def forward(self, body: Struct) -> None:
        """Forward to the leader, since this planner no longer is it."""
        ...


class PendingRequest:
    """A pending request with its callers.

    Args:
        digest: of its body.
        request: with its id.
        caller: the first to send it.
        has_client_id: true if the caller gave the id, and may retry under it.
        encoded_items: access to its work items, if they are expensive to distribute.
        uid: id of the event that says what became of it.
        asked_at: when it came, in seconds since the epoch.
        age_from: time from which it counts as waiting in the order of the queue; None for `asked_at`.

    Attributes:
        callers: those that wait for the answer.
        entry: its entry in the queue; None if it was never queued.
        estimate: of its duration; None if it was not needed.
        is_stored: true if the bucket has an entry of it, which a later leader finds.
        withdrawn_early: true if it is being withdrawn before it has arrived: then `request` has its owner and id alone.
        unattended: true if no client waits: it is of a task of a job, whose record a later leader restores it from.
    """

    __slots__ = (
        "age_from",
        "asked_at",
        "callers",
        "digest",
        "encoded_items",
        "entry",
        "estimate",
        "has_client_id",
        "is_stored",
        "request",
        "uid",
        "unattended",
        "withdrawn_early",
    )

    def __init__(
        self,
        digest: str,
        request: WorkRequest,
        caller: Responder,
        has_client_id: bool,
        encoded_items: EncodedItems | None = None,
        uid: str = "",
        asked_at: float = 0.0,
        age_from: float | None = None,
    ) -> None:
        self.age_from = age_from
        self.uid = uid
        self.asked_at = asked_at
        self.estimate: Estimate | None = None
        self.is_stored = False
        self.digest = digest
        self.request = request
        self.callers = [caller]
        self.has_client_id = has_client_id
        self.encoded_items = encoded_items
        self.entry: QueuedRequest | None = None
        self.withdrawn_early = False
        self.unattended = False

    @property
    def key(self) -> tuple[str, str]:
        """Owner and request id: ids are unique for one owner."""
        return self.request.owner, self.request.request_id or ""

    def join(self, caller: Responder) -> list[Responder]:
        """Add a caller. Each reply subject gets the answer once; of too many callers the oldest are dropped.

        Returns:
            Callers that are earlier attempts of the same client, and were removed. They need an answer, too: across
            accounts each attempt has another reply subject, which the server keeps until it is answered.
        """
        others = [other for other in self.callers if other.reply_to != caller.reply_to]
        before = [other for other in others if caller.client_name and other.client_name == caller.client_name]
        most = _MAX_CALLERS_ACROSS if caller.reply_to.startswith(ACROSS) else _MAX_CALLERS
        self.callers = [other for other in others if other not in before][1 - most :]
        self.callers.append(caller)
        return before

    def take_senders(self) -> list[Responder]:
        """Remove and return the callers that sent the request, for an interim answer; onlookers stay."""
        waiting = [caller for caller in self.callers if not isinstance(caller, RelayResponder)]
        self.callers = [caller for caller in self.callers if isinstance(caller, RelayResponder)]
        return waiting


class RelayResponder:
    """A caller that waits for the answer to a request with another body, which is what `forward` sends."""

    def __init__(self, body: Struct, caller: Responder) -> None:
        self._body = body
        self._caller = caller

    @property
    def reply_to(self) -> str:
        """Reply subject."""
        return self._caller.reply_to

    @property
    def client_name(self) -> str:
        """Empty: an onlooker is not a queued client."""
        return ""

    @property
    def stored(self) -> StoredCaller | None:
        """None: it asks again."""
        return None

    async def answer(self, reply: Struct) -> None:
        """Send the answer."""
        await self._caller.answer(reply)

    def forward(self, body: Struct) -> None:
        """Forward to the leader the message that this caller sent."""
        self._caller.forward(self._body)
