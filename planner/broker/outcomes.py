"""Events of a work request for the history: that it waits, and what became of it."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from ...schemas.request_events import RequestEvent, RequestOutcome, WaitingRequest, asked
from ...schemas.requests import Assignment, Error, Rejection, RejectionCode
from .pending import PendingRequest
from .waiting.estimates import described
from .waiting.queue import QueuedRequest, time_of

_REJECTED: Final = {
    RejectionCode.TIMED_OUT: RequestOutcome.TIMED_OUT,
    RejectionCode.WITHDRAWN: RequestOutcome.WITHDRAWN,
}
SILENT: Final = "silent"
"""Code of a request that left the queue because its client was not heard."""
_MAX_MESSAGE: Final = 1000


def outcome_of(pending: PendingRequest, reply: Struct, now: float, group: str) -> RequestEvent:
    """Event of a request that was answered finally.

    Args:
        pending: the request.
        reply: its answer.
        now: seconds since the epoch.
        group: name of the owner's group; empty without groups.
    """
    outcome, code, message, lease_id = RequestOutcome.REFUSED, "", "", ""
    if isinstance(reply, Assignment):
        outcome, lease_id = RequestOutcome.GRANTED, reply.lease.lease_id
    elif isinstance(reply, Rejection):
        outcome = _REJECTED.get(reply.code, RequestOutcome.REJECTED)
        code, message = reply.code.value, reply.message
    elif isinstance(reply, Error):
        code, message = reply.code, reply.message
        queued = pending.entry
        if code == "unavailable" and queued is not None and queued.asked_to_retry:
            outcome, code = RequestOutcome.GONE, SILENT
    queued = pending.entry
    return RequestEvent(
        uid=pending.uid,
        request=asked(pending.request),
        asked_at=time_of(pending.asked_at),
        ended_at=time_of(max(now, pending.asked_at)),
        outcome=outcome,
        code=code,
        message=message[:_MAX_MESSAGE],
        queued=queued is not None,
        position=0 if queued is None else queued.arrival.position,
        lease_id=lease_id,
        estimate=None if pending.estimate is None else described(pending.estimate),
        forecast=None if queued is None else queued.forecast,
        last_forecast=None if queued is None or queued.last_forecast is queued.forecast else queued.last_forecast,
        group=group,
    )


def waiting_of(queued: QueuedRequest, group: str) -> WaitingRequest:
    """Event of a request that waits in the queue.

    Args:
        queued: the request.
        group: name of the owner's group; empty without groups.
    """
    pending: PendingRequest = queued.payload
    return WaitingRequest(
        uid=pending.uid,
        request=asked(pending.request),
        asked_at=time_of(pending.asked_at),
        until=time_of(queued.arrival.until),
        position=queued.arrival.position,
        estimate=None if pending.estimate is None else described(pending.estimate),
        group=group,
    )
