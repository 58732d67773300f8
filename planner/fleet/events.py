"""What the fleet is told beside what collectors publish and leases say."""

from __future__ import annotations

from msgspec import Struct


class HostLost(Struct, frozen=True):
    """No agent speaks for the host any more."""

    host: str


class HostSeen(Struct, frozen=True):
    """An agent speaks for the host (again)."""

    host: str


class HostForgotten(Struct, frozen=True):
    """The host is gone for good: it leaves the fleet. Leases on it stay until they are ended."""

    host: str


class ClockSet(Struct, frozen=True):
    """The clock that says when messages came was set: whatever is known by it moves along.

    Attributes:
        seconds: by how much, forwards or back.
        now: seconds since the epoch, by the clock as it is.
    """

    seconds: float
    now: float


class LeaseEnded(Struct, frozen=True):
    """A lease holds nothing any more."""

    lease_id: str
