"""Service time: the seconds in which holders could renew. Leases end by it, not by wall-clock time.

It stands still while holders could not renew: NATS or the planner was away, another planner was about to lead, this
process or its machine was suspended, or the wall clock jumped (as after a virtual machine was paused). The bucket keeps
it, so that it continues in the next term, on any machine.

A holder retries each tenth of its lease's time to live, and at least each 10 s. If an outage was longer than that, the
lease gets a whole time to live from the outage's end on. If it was shorter, the lease keeps what it had left before, so
that a planner's restart does not double the life of a lease of a day.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from ...schemas.limits import MAX_TTL_SECONDS

LONG_FRACTION: Final = 0.1
LONG_SECONDS: Final = 10.0
"""An outage of `LONG_FRACTION` of a lease's time to live, or of `LONG_SECONDS`, gives it a whole one: a holder's
retries are no further apart (`client/leases/lease.py`)."""
UNKNOWN_SECONDS: Final = 365 * 86400.0
"""Length of an outage that may have been of any length."""
_PAUSE_SECONDS: Final = 1.0
"""If two ticks are further apart, this process was suspended, or its event loop was blocked."""
_JUMP_SECONDS: Final = 1.0


class Outage(Struct, frozen=True):
    """An outage, in which no holder could renew.

    Attributes:
        at: service time of the outage, during which it stood still.
        seconds: length.
    """

    at: float
    seconds: float


class Service(Struct, frozen=True, kw_only=True):
    """Service time as the bucket holds it.

    Attributes:
        seconds: service time when it was stored.
        outages: those that may still extend leases, oldest first.
    """

    seconds: float = 0.0
    outages: list[Outage] = []


def ends_at(extended_at: float, life_seconds: float, outages: Sequence[Outage]) -> float:
    """End in service time of an active lease that is not renewed.

    Args:
        extended_at: service time when its time to live was last set.
        life_seconds: time to live.
        outages: oldest first.
    """
    for outage in reversed(outages):
        if outage.at < extended_at:
            break
        if outage.seconds >= long_for(life_seconds):
            return outage.at + life_seconds
    return extended_at + life_seconds


def long_for(life_seconds: float) -> float:
    """Length in seconds from which on an outage gives a lease of this time to live a whole one."""
    return min(life_seconds * LONG_FRACTION, LONG_SECONDS)


def with_outage(outages: Sequence[Outage], outage: Outage) -> list[Outage]:
    """Add an outage, and drop those that make no difference any more.

    An outage makes none if the new one is as long, or of `LONG_SECONDS`: that extends the same leases, and more. Nor
    does one that is so long ago that all leases which it could extend have ended since.
    """
    kept = [
        other
        for other in outages
        if other.seconds > outage.seconds and outage.seconds < LONG_SECONDS and other.at + _longest(other) > outage.at
    ]
    return [*kept, outage]


def _longest(outage: Outage) -> float:
    """Longest time to live in seconds of leases that an outage extends."""
    return outage.seconds / LONG_FRACTION if outage.seconds < LONG_SECONDS else MAX_TTL_SECONDS


class ServiceTime:
    """Service time in one term.

    Args:
        seconds: service time at the start of the term.
        outages: earlier ones, oldest first.
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
        """Service time to store in the bucket."""
        return Service(seconds=round(self._seconds, 3), outages=self.outages)

    def now(self, elapsed: float) -> float:
        """Service time now; a lease that is granted or renewed at this moment lasts at least its time to live."""
        return self._seconds + min(max(0.0, elapsed - self._elapsed), _PAUSE_SECONDS)

    def tick(self, elapsed: float, wall: float, serves: bool) -> Outage | None:
        """Advance service time; call it some times a second.

        Args:
            elapsed: see `bus/elapsed.py`.
            wall: seconds since the epoch.
            serves: true if holders can renew now.

        Returns:
            The outage that has just ended, from the begin of the takeover on if that has just ended; None if none has.
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
        if self.outages and self.outages[-1].at == self._seconds:  # it goes on: no time was served since
            self._away += self.outages[-1].seconds
            self.outages = self.outages[:-1]
        outage = Outage(self._seconds, round(min(self._away, UNKNOWN_SECONDS), 3))
        self.outages = with_outage(self.outages, outage)
        self._away = 0.0
        return outage
