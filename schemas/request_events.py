"""History of work requests: what was asked, how long it waited, and what became of it.

The planner publishes an event for each request that it has answered finally, and before for one that waits in the
queue, in batches, as JSON. Drains are in the same messages.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, cast

from msgspec import Meta, Struct
from msgspec.structs import replace

from .requests import Time, WorkRequest
from .values.durations import DurationEstimate
from .work.drains import DrainSpan

MAX_EVENTS: Final = 256
"""Limit on the events of one message, and on each of its other lists."""


class Forecast(Struct, frozen=True, kw_only=True):
    """Expected start of a request that waits in the queue, with an interval that holds 80 % of such starts.

    Attributes:
        expected_start: median; null if nothing can be said, such as with no device that could ever take it.
        earliest_start: 10 % quantile.
        latest_start: 90 % quantile; null if it can't be bounded.
        made_at: time of the forecast.
    """

    expected_start: Time | None = None
    earliest_start: Time | None = None
    latest_start: Time | None = None
    made_at: Time | None = None


class RequestOutcome(StrEnum):
    """Outcome of a work request."""

    GRANTED = "granted"
    REJECTED = "rejected"
    """It could not be granted, and did not wait."""
    TIMED_OUT = "timed_out"
    """It waited for its `wait_seconds`."""
    WITHDRAWN = "withdrawn"
    """Its client withdrew it."""
    GONE = "gone"
    """It left the queue, since its client was not heard."""
    REFUSED = "refused"
    """It was invalid, above a limit of its owner, or could not be carried out."""


class AskedRequest(WorkRequest, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=False):
    """A work request in an event. Fields of a later version are ignored."""


class RequestEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A work request with its outcome.

    Attributes:
        uid: id of this event; one that comes again is the same event.
        request: as asked, with its id. Work items are given by their number.
        asked_at: when the planner received it.
        ended_at: when it was answered finally, or left the queue.
        outcome: what became of it.
        code: code of the rejection or the error.
        message: reasons of the rejection or the error, in one sentence.
        queued: true if it waited in the queue.
        position: position in the queue at its arrival, from 1; 0 if it did not wait.
        lease_id: the lease, if it was granted.
        estimate: estimate of its duration when it was decided.
        forecast: forecast of its start that was made first.
        last_forecast: forecast of its start that was made last, where that is another.
        group: group of the owner when it was answered; empty without groups.
    """

    uid: str
    request: AskedRequest
    asked_at: Time
    ended_at: Time
    outcome: RequestOutcome
    code: str = ""
    message: str = ""
    queued: bool = False
    position: int = 0
    lease_id: str = ""
    estimate: DurationEstimate | None = None
    forecast: Forecast | None = None
    last_forecast: Forecast | None = None
    group: str = ""


def asked(request: WorkRequest) -> AskedRequest:
    """A work request as an event has it: of work items only their number stays. To encode, not to look at its type."""
    work = request.distribution
    if work is not None:
        items = work.items if isinstance(work.items, int) else len(work.items)
        request = replace(request, distribution=replace(work, items=items, weights=None))
    return cast(AskedRequest, request)  # converting each would cost more than encoding it


class WaitingRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A work request that waits in the queue. One that waits for less than about a second has no such event.

    Attributes:
        uid: id of the event that will say what became of it.
        request: as asked, with its id.
        asked_at: when the planner received it.
        until: when it is rejected at the latest.
        position: position in the queue at its arrival, from 1.
        estimate: estimate of its duration.
        group: group of the owner; empty without groups.
    """

    uid: str
    request: AskedRequest
    asked_at: Time
    until: Time
    position: int = 0
    estimate: DurationEstimate | None = None
    group: str = ""


class RequestEvents(Struct, frozen=True, kw_only=True, tag="request_events", tag_field="type"):
    """Events of work requests and of drains, of one planner. Those of a term's begin come first, then waits, then
    ends.

    Attributes:
        planner: id of the planner.
        events: requests that it has answered, in the order of their ends.
        new_term: true in the first message of a leader: no request waits but those that it names from here on.
        waiting: requests that have begun to wait, or that waited already when the leader's term began.
        drains: drains that have begun or ended.
    """

    planner: str
    events: Annotated[list[RequestEvent], Meta(max_length=MAX_EVENTS)]
    new_term: bool = False
    waiting: Annotated[list[WaitingRequest], Meta(max_length=MAX_EVENTS)] = []
    drains: Annotated[list[DrainSpan], Meta(max_length=MAX_EVENTS)] = []
