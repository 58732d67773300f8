"""The fleet as a fold of events: `apply(fleet, event, at)` for telemetry, leases, drains and booked windows.

There is no clock and no I/O: `at` is the time when NATS stored the message, in seconds since the epoch, and `advance`
moves time on. `apply` changes the fleet in place and returns it. The order of messages about different things does not
matter: a lease may come before its host's inventory, as it does when a planner starts.

Free memory of a device is total − reserved − granted to leases − foreign, where foreign memory is used, and attributed
to no lease (`occupancy.py`).
"""

from __future__ import annotations

from ...schemas.operations import Drains
from ...schemas.requests import Lease, LeaseEvent
from ...schemas.telemetry import DeviceEvent, Inventory, ProcessBatch, SampleBatch
from .apply import FOLDS, claim_again
from .blocking import drain_reason, reblock, rebook, recheck, refresh, why_blocked
from .events import (
    Booked,
    ClockSet,
    HostForgotten,
    HostLost,
    HostSeen,
    LeaseEnded,
    RunnerGone,
    RunnerSeen,
    RunnerUnready,
)
from .holdings import free, hold
from .host import Host
from .known import Fleet, Held

__all__ = [
    "Booked",
    "ClockSet",
    "Event",
    "Fleet",
    "Held",
    "Host",
    "HostForgotten",
    "HostLost",
    "HostSeen",
    "LeaseEnded",
    "RunnerGone",
    "RunnerSeen",
    "RunnerUnready",
    "advance",
    "apply",
    "drain_reason",
    "free",
    "hold",
    "reblock",
    "refresh",
    "why_blocked",
]


Event = (
    Inventory
    | SampleBatch
    | ProcessBatch
    | DeviceEvent
    | Lease
    | LeaseEvent
    | LeaseEnded
    | Drains
    | Booked
    | HostLost
    | HostSeen
    | RunnerSeen
    | RunnerUnready
    | RunnerGone
    | HostForgotten
    | ClockSet
)


def apply(fleet: Fleet, event: Event, at: float | None = None) -> Fleet:
    """Fold one event into the fleet.

    Args:
        fleet: changed in place.
        event: to fold in. One that is a repetition, or about an unknown host, changes nothing; but faults, drains and
            leases are kept until their host is known.
        at: time when NATS stored it, seconds since the epoch; None leaves time where it is.

    Returns:
        The same fleet.
    """
    if at is not None:
        advance(fleet, at)
    fleet.at = fleet.now if at is None else at
    fleet.stored_at = at
    fold = FOLDS.get(type(event))
    if fold is None:
        raise TypeError(f"the fleet knows no event of type {type(event).__name__}")
    fold(fleet, event)
    return fleet


def advance(fleet: Fleet, now: float) -> Fleet:
    """Advance time, never back: devices become stale, old warnings end, and booked windows begin and end."""
    if now > fleet.now:
        fleet.now = now
    if fleet.bookings.due <= fleet.now:
        rebook(fleet)
    name = fleet.due(fleet.now)
    while name is not None:
        host = fleet.hosts.get(name)
        if host is not None and host.timer <= fleet.now:
            recheck(fleet, host)
        if fleet.claims and name in fleet.claims:
            claim_again(fleet, name)
        name = fleet.due(fleet.now)
    return fleet
