"""Queue of requests that wait for devices, with their clients.

The order, who may start, and what is kept for whom are `planner/queue/`'s; here are the clients: when each was heard,
and when it gives up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from msgspec import json

from ....bus.elapsed import steady_time
from ....schemas.operations import Queue, QueueEntry, QueueFilter
from ....schemas.request_events import Forecast
from ....schemas.requests import Rejection, WorkRequest
from ....schemas.values.durations import shape_of_request
from ...queue.durations import Estimate
from ...queue.forecast import Forecast as ComputedForecast
from ...queue.line import Entry, Held, Line
from .estimates import described

MAX_WAITING: Final = 10_000
EVERYBODY: Final = QueueFilter()
NEVER: Final = -1
_HOSTS_LISTED: Final = 10


class Kind(NamedTuple):
    """Kind of a request: those of one kind are expected to take equally long.

    Attributes:
        owner: of the request.
        name: of the workload.
        shape: what it asks for (`schemas/values/durations.py`).
        expected_seconds: its own estimate.
        max_seconds: its limit.
    """

    owner: str
    name: str
    shape: str
    expected_seconds: float | None
    max_seconds: float | None


def kind_of(request: WorkRequest) -> Kind:
    """Kind of a request."""
    shape = shape_of_request(request)
    return Kind(request.owner, request.name, shape, request.expected_seconds, request.max_seconds)


class Arrival(NamedTuple):
    """Arrival of a request that waited before.

    Attributes:
        asked_at: seconds since the epoch.
        number: of its arrival.
        until: time at which it is rejected, in seconds since the epoch.
        position: position in the queue at its arrival.
        age_from: time from which it counts as waiting in the order of the queue, in seconds since the epoch; None for
            `asked_at`.
    """

    asked_at: float
    number: int
    until: float
    position: int = 0
    age_from: float | None = None


class QueuedRequest:
    """A request in the queue.

    Attributes:
        request: with its id.
        arrival: when it came.
        rejection: reason why it waits.
        payload: opaque data of the caller, to answer it.
        entry: its entry in the line.
        since: begin of its wait, by the steady clock, which setting the clock does not change.
        deadline: time at which it is rejected, by the steady clock.
        heard_at: when its client was last heard, by the clock of `Presence`.
        heard_in: connection to NATS in which it was heard, as `Presence` counts them; `NEVER` after a restart.
        probed: true if its client was probed since without being found.
        asked_to_retry: true if its client was told to ask again since.
        forecast: of its start, that was made first; None before.
        last_forecast: that was made last.
        uncorrected: the first forecast, without the correction by past ones; None after a restart.
    """

    __slots__ = (
        "arrival",
        "asked_to_retry",
        "deadline",
        "entry",
        "forecast",
        "heard_at",
        "heard_in",
        "last_forecast",
        "payload",
        "probed",
        "rejection",
        "request",
        "since",
        "uncorrected",
    )

    def __init__(
        self, request: WorkRequest, arrival: Arrival, rejection: Rejection, payload: Any, entry: Entry
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.rejection = rejection
        self.payload = payload
        self.entry = entry
        self.since = self.deadline = 0.0
        self.heard_at = 0.0
        self.heard_in = NEVER
        self.probed = False
        self.asked_to_retry = False
        self.forecast: Forecast | None = None
        self.last_forecast: Forecast | None = None
        self.uncorrected: ComputedForecast | None = None


class WaitingQueue:
    """The queued requests, first in line first.

    Args:
        line: gives the order, and says who may start.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self._members: set[QueuedRequest] = set()
        self._named: dict[str, list[QueuedRequest]] = {}
        self._of = Counter[str]()
        self._alike: dict[Kind, dict[QueuedRequest, None]] = {}
        """Entries of each kind, in the order of their arrival."""
        self._expires_at = math.inf
        """No entry is past its deadline before, by the steady clock."""

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return (entry.payload for entry in self.line)

    def __contains__(self, queued: QueuedRequest) -> bool:
        return queued in self._members

    def add(
        self,
        request: WorkRequest,
        now: float,
        estimate: Estimate,
        rejection: Rejection,
        payload: Any,
        arrival: Arrival | None = None,
        steady: float | None = None,
        age_from: float | None = None,
    ) -> QueuedRequest:
        """Enqueue a request.

        One that is like others that wait gets their estimate, so that it starts after them.

        Args:
            request: with its id.
            now: time of its arrival, in seconds since the epoch.
            estimate: of its duration.
            rejection: reason why it waits.
            payload: opaque data of the caller.
            arrival: if it waited before: its place.
            steady: time of its arrival, by the steady clock; None for now.
            age_from: time from which it counts as waiting in the order, in seconds since the epoch; None for its
                arrival. Its wait, as listed and forecast, counts from its arrival.
        """
        asked_at, number = (now, None) if arrival is None else (arrival.asked_at, arrival.number)
        alike = self._alike.setdefault(kind_of(request), {})
        if alike:
            estimate = next(iter(alike)).entry.estimate
        age_from = age_from if arrival is None else arrival.age_from
        entry = self.line.arrive(request, estimate, asked_at if age_from is None else age_from, number=number)
        if arrival is None:
            arrival = Arrival(now, entry.number, now + request.wait_seconds, self.line.position(entry), age_from)
        queued = QueuedRequest(request, arrival, rejection, payload, entry)
        steady = steady_time() if steady is None else steady
        queued.since, queued.deadline = steady - (now - arrival.asked_at), steady + arrival.until - now
        self._expires_at = min(self._expires_at, queued.deadline)
        entry.payload = queued
        alike[queued] = None
        self._members.add(queued)
        self._named.setdefault(request.request_id or "", []).append(queued)
        self._of[request.owner] += 1
        return queued

    def remove(self, queued: QueuedRequest) -> None:
        """Remove an entry, from the line, too, if it has not started."""
        if queued.entry in self.line:
            self.line.withdraw(queued.entry)
        self._members.discard(queued)
        kind = kind_of(queued.request)
        del self._alike[kind][queued]
        if not self._alike[kind]:
            del self._alike[kind]
        named = self._named[queued.request.request_id or ""]
        named.remove(queued)
        if not named:
            del self._named[queued.request.request_id or ""]
        self._of[queued.request.owner] -= 1
        if not self._of[queued.request.owner]:
            del self._of[queued.request.owner]

    def kinds(self) -> list[tuple[Kind, WorkRequest]]:
        """Kinds of the queued requests, each with one of them."""
        return [(kind, next(iter(alike)).request) for kind, alike in self._alike.items()]

    def revise(self, estimates: Mapping[Kind, Estimate], now: float) -> None:
        """Change the estimates of the queued requests of some kinds, and renew the order if any differs.

        All of a kind change at once: one must not pass those before it because more is known by now.

        Args:
            estimates: by kind.
            now: seconds since the epoch.
        """
        changed = False
        for kind, estimate in estimates.items():
            for queued in self._alike.get(kind, ()):
                if queued.entry.estimate == estimate:
                    break
                self.line.revise(queued.entry, estimate)
                changed = True
        if changed:
            self.line.renew(now)

    def count_of(self, owner: str) -> int:
        """Number of queued requests of an owner."""
        return self._of[owner]

    def named(self, request_id: str) -> list[QueuedRequest]:
        """Entries with a request id, of any owner."""
        return self._named.get(request_id, [])

    def find(self, owner: str, request_id: str) -> QueuedRequest | None:
        """Entry of an owner with a request id; None if there is none."""
        return next((queued for queued in self.named(request_id) if queued.request.owner == owner), None)

    def position(self, queued: QueuedRequest) -> int:
        """Position of an entry in the queue, from 1."""
        return self.line.position(queued.entry)

    def entry_listing(self, queued: QueuedRequest, now: float, group: str) -> Queue:
        """Listing of one entry alone, with its position and the name of its owner's group."""
        held = next((held for held in self.line.held if held.entry is queued.entry), None)
        return Queue(entries=[_listed(queued, self.position(queued), now, 0.0, held, group)], total=1)

    def expired(self, now: float) -> list[QueuedRequest]:
        """Entries past their deadline, by the steady clock."""
        if now < self._expires_at:
            return []
        self._expires_at = min((queued.deadline for queued in self if queued.deadline > now), default=math.inf)
        found = [queued for queued in self if queued.deadline <= now]
        if found:
            self._expires_at = now  # until they are removed
        return found

    def set_ready(self, queued: QueuedRequest, ready: bool) -> None:
        """Allow an entry to start, or not: its client must be heard first."""
        if queued in self._members and queued.entry.ready is not ready:
            (self.line.resume if ready else self.line.pause)(queued.entry)

    def listing(
        self,
        now: float,
        only: QueueFilter = EVERYBODY,
        silence: Callable[[QueuedRequest], float] | None = None,
        max_bytes: int = 0,
        group_of: Callable[[str], str] = lambda _: "",
    ) -> Queue:
        """List entries with position, time in the queue, and the reason why they wait.

        Args:
            now: seconds, by the steady clock.
            only: filter and page.
            silence: returns the seconds since an entry's client was heard.
            max_bytes: size of all entries as JSON, at which the list is cut; at least one is listed. 0 for no limit.
            group_of: returns the name of an owner's group; empty without groups.
        """
        reserved = {held.entry: held for held in self.line.held}
        listed: list[QueueEntry] = []
        found = size = 0
        full = False
        if only.request_id is None:
            entries = enumerate(self, 1)
        else:
            entries = [(self.position(queued), queued) for queued in self.named(only.request_id)]
        for position, queued in entries:
            if only.owner is not None and queued.request.owner != only.owner:
                continue
            found += 1
            if full or found <= only.offset or (only.limit is not None and len(listed) >= only.limit):
                continue
            silent = 0.0 if silence is None else silence(queued)
            one = _listed(queued, position, now, silent, reserved.get(queued.entry), group_of(queued.request.owner))
            size += len(json.encode(one)) + 1 if max_bytes else 0
            full = size > max_bytes > 0 and bool(listed)
            if not full:
                listed.append(one)
        return Queue(entries=listed, total=found)


def _listed(
    queued: QueuedRequest, position: int, now: float, silence: float, held: Held | None, group: str
) -> QueueEntry:
    request = queued.request
    return QueueEntry(
        request_id=request.request_id or "",
        owner=request.owner,
        position=position,
        waiting_seconds=round(max(0.0, now - queued.since), 3),
        message=queued.rejection.message,
        gpus=request.gpus,
        name=request.name,
        heard_seconds=round(max(0.0, silence), 3),
        reserved_devices=0 if held is None else len(held.devices),
        reserved_hosts=[] if held is None else sorted(held.hosts)[:_HOSTS_LISTED],
        priority=request.priority,
        estimate=described(queued.entry.estimate),
        forecast=queued.last_forecast,
        group=group,
        gpus_max=request.gpus_max,
    )


def time_of(seconds: float) -> datetime:
    """Time of seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)


__all__ = ["MAX_WAITING", "NEVER", "Arrival", "QueuedRequest", "WaitingQueue", "time_of"]
