"""Events of the fleet that come from the planner: not telemetry, leases or drains."""

from __future__ import annotations

from msgspec import Struct

from .bookings import Bookings


class HostLost(Struct, frozen=True):
    """The host is lost: nothing was heard from it for too long."""

    host: str


class HostSeen(Struct, frozen=True):
    """The host is heard again."""

    host: str


class RunnerSeen(Struct, frozen=True):
    """The host has a runner, which starts jobs there: it carries the label that says so."""

    host: str


class RunnerUnready(Struct, frozen=True):
    """The runner of a host can't start jobs for now: the host carries no label, as if it had none."""

    host: str
    reason: str


class RunnerGone(Struct, frozen=True):
    """The host has no runner any more."""

    host: str


class HostForgotten(Struct, frozen=True):
    """The host is removed from the fleet for good. Leases on it stay until they end."""

    host: str


class ClockSet(Struct, frozen=True):
    """The clock that stamps messages was set: all times that were taken by it are shifted.

    Attributes:
        seconds: by how much, positive for forwards.
        now: seconds since the epoch, by the clock after that.
    """

    seconds: float
    now: float


class Booked(Struct, frozen=True):
    """The booked windows have changed: these are all."""

    bookings: Bookings


class LeaseEnded(Struct, frozen=True):
    """A lease has ended and holds nothing any more."""

    lease_id: str
