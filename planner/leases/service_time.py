"""Service time: the seconds in which holders could renew. Leases end by it, and by no clock.

It stands still while nobody could renew: the bus or the planner was away, another planner was about to lead, this
process or its machine slept, or the clock on the wall moved by itself (as it does where a virtual machine was paused).
The bucket keeps it, so that it goes on in the next term, on whatever machine that runs.

An outage also counts for what it takes from a holder, who tries again each tenth of its lease's time to live, and each
10 s at least. Where it was longer than that, the lease has a whole time to live from its end on; where it was shorter,
the lease has what it had left before, so that a planner's restart does not double the life of one of a day.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

LONG_FRACTION: Final = 0.1
LONG_SECONDS: Final = 10.0
"""An outage of this part of a lease's time to live, or of so long, gives it a whole one: the pause between a holder's
tries is no longer (`client/lease.py`)."""
UNKNOWN_SECONDS: Final = 365 * 86400.0
"""Of an outage that may have been of any length."""
_LONGEST_LIFE_SECONDS: Final = 30 * 86400.0
_PAUSE_SECONDS: Final = 1.0
"""A planner that has not looked for so long has slept, or its loop was kept from running."""
_JUMP_SECONDS: Final = 1.0


class Outage(Struct, frozen=True):
    """A time in which nobody could renew.

    Attributes:
        at: when, in service time, which stood still in it.
        seconds: how long it was.
    """

    at: float
    seconds: float


class Service(Struct, frozen=True, kw_only=True):
    """Service time as the bucket holds it.

    Attributes:
        seconds: it was that when it was written down.
        outages: those that leases may have to be given time for, oldest first.
    """

    seconds: float = 0.0
    outages: list[Outage] = []


def ends_at(extended_at: float, life_seconds: float, outages: Sequence[Outage]) -> float:
    """When an active lease ends that is not renewed, in service time.

    Args:
        extended_at: when its time to live was last set, in service time.
        life_seconds: the time to live.
        outages: oldest first.
    """
    for outage in reversed(outages):
        if outage.at < extended_at:
            break
        if outage.seconds >= long_for(life_seconds):
            return outage.at + life_seconds
    return extended_at + life_seconds


def long_for(life_seconds: float) -> float:
    """Seconds from which on an outage gives a lease of some time to live a whole one."""
    return min(life_seconds * LONG_FRACTION, LONG_SECONDS)


def with_outage(outages: Sequence[Outage], outage: Outage) -> list[Outage]:
    """The outages and one more; without those that make no difference any more.

    A later one that was as long gives every lease as much. One that is so long ago that the leases it is long for have
    ended since gives nothing.
    """
    kept = [
        other
        for other in outages
        if other.seconds > outage.seconds and outage.seconds < LONG_SECONDS and other.at + _longest(other) > outage.at
    ]
    return [*kept, outage]


def _longest(outage: Outage) -> float:
    """The longest time to live of leases that an outage is long for, seconds."""
    return outage.seconds / LONG_FRACTION if outage.seconds < LONG_SECONDS else _LONGEST_LIFE_SECONDS


class ServiceTime:
    """Service time in one term.

    Args:
        seconds: it begins with that.
        outages: of before, oldest first.
        elapsed: see `bus/elapsed.py`.
        wall: seconds since the epoch.

    Attributes:
        outages: oldest first.
    """

    def __init__(self, seconds: float, outages: Sequence[Outage], *, elapsed: float, wall: float) -> None:
        self.outages = list(outages)
        self._seconds = seconds
        self._elapsed = elapsed
        self._wall = wall
        self._away = 0.0

    @property
    def kept(self) -> Service:
        """For the bucket."""
        return Service(seconds=round(self._seconds, 3), outages=self.outages)

    def now(self, elapsed: float) -> float:
        """Service time; what was granted or renewed at this moment lasts at least its time to live."""
        return self._seconds + min(max(0.0, elapsed - self._elapsed), _PAUSE_SECONDS)

    def tick(self, elapsed: float, wall: float, serves: bool) -> Outage | None:
        """Go on, some times a second.

        Args:
            elapsed: see `bus/elapsed.py`.
            wall: seconds since the epoch.
            serves: whether holders can renew now.

        Returns:
            The outage that is over with this.
        """
        gap = max(0.0, elapsed - self._elapsed)
        jump = wall - self._wall - gap
        self._elapsed, self._wall = elapsed, wall
        if not serves or gap > _PAUSE_SECONDS or jump > _JUMP_SECONDS:
            self._away += gap + (jump if jump > _JUMP_SECONDS else 0.0)
            if not serves:
                return None
        elif not self._away:
            self._seconds += gap
            return None
        outage = Outage(self._seconds, round(min(self._away, UNKNOWN_SECONDS), 3))
        self.outages = with_outage(self.outages, outage)
        self._away = 0.0
        return outage
