"""Choice of the devices of a booked window, so that it is never late.

A device can be chosen if it is not booked at any of the window's times for others, and is free when the first of them
closes: it has no lease, or all of its leases have ended by then, or can be preempted. The devices are on as few hosts
as can be, with as few preemptions. Those that are booked at other times already are taken first, since leases without a
limit can't use them anyway.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from ..fleet.bookings import Booking, Party

MOST_STARTS: Final = 256
"""Limit on the later begins that are tried where there are not enough devices for a window."""


class Candidate(NamedTuple):
    """A device of a window's models and hosts.

    Attributes:
        uuid: of the device.
        host: name of its host.
        place: its index on the host.
        free_at: time by which all leases on it have surely ended, or can be preempted; infinite if one may last longer.
        bookings: times for which it is booked already, soonest first.
        preempts: true if a lease on it would have to be preempted.
    """

    uuid: str
    host: str
    place: int
    free_at: float = -math.inf
    bookings: tuple[Booking, ...] = ()
    preempts: bool = False


class Wish(NamedTuple):
    """A window that needs devices.

    Attributes:
        gpus: number of devices.
        times: its occurrences, in order.
        party: those whom it is for.
    """

    gpus: int
    times: Sequence[Booking]
    party: Party

    def later(self, seconds: float) -> Wish:
        """The same window so many seconds later."""
        moved = [
            Booking(time.closes_at + seconds, time.starts_at + seconds, time.ends_at + seconds, time.window)
            for time in self.times
        ]
        return self._replace(times=moved)


def choose(candidates: Sequence[Candidate], wish: Wish, parties: Mapping[str, Party]) -> list[Candidate] | None:
    """Choose the devices of a window; None if there are not enough.

    Args:
        candidates: devices that the window may have.
        wish: the window.
        parties: whom the windows are for that are booked already, by their ids.
    """
    by_host: dict[str, list[Candidate]] = {}
    for candidate in able(candidates, wish, parties):
        by_host.setdefault(candidate.host, []).append(candidate)
    hosts = list(by_host.values())
    for found in hosts:
        found.sort(key=_last)
    chosen: list[Candidate] = []
    left = wish.gpus
    while left:
        if not hosts:
            return None
        enough = [found for found in hosts if len(found) >= left]
        # The smallest host that is enough, so that larger ones stay whole; or else the largest.
        best = (
            min(enough, key=partial(_size, left))
            if enough
            else max(hosts, key=lambda found: (len(found), found[0].host))
        )
        hosts.remove(best)
        chosen += best[:left]
        left = max(0, left - len(best))
    return chosen


def able(candidates: Sequence[Candidate], wish: Wish, parties: Mapping[str, Party]) -> list[Candidate]:
    """The devices that are surely free when a window closes, and not booked for others at any of its times."""
    closes = wish.times[0].closes_at
    return [
        candidate for candidate in candidates if candidate.free_at <= closes and not _taken(candidate, wish, parties)
    ]


def _last(candidate: Candidate) -> tuple[bool, bool, bool, int]:
    return candidate.preempts, not candidate.bookings, candidate.free_at > -math.inf, candidate.place


def _size(wanted: int, found: list[Candidate]) -> tuple[int, int, int, str]:
    preempted = sum(candidate.preempts for candidate in found[:wanted])
    return preempted, len(found), -sum(bool(candidate.bookings) for candidate in found), found[0].host


def _taken(candidate: Candidate, wish: Wish, parties: Mapping[str, Party]) -> bool:
    """True if a device is booked at one of a window's times.

    The time ahead of a window in which the device closes counts, unless both are for the same people.
    """
    booked = candidate.bookings
    if not booked:
        return False
    ends = [time.ends_at for time in wish.times]
    for other in booked:
        same = wish.party.same(parties[other.window])
        at = bisect_right(ends, other.starts_at if same else other.closes_at)
        if at < len(ends):
            time = wish.times[at]
            if (time.starts_at if same else time.closes_at) < other.ends_at:
                return True
    return False


def soonest(candidates: Sequence[Candidate], wish: Wish, parties: Mapping[str, Party]) -> float | None:
    """The soonest later begin of a window for which there are enough devices, as leases and windows are known now.

    Args:
        candidates: devices that the window may have.
        wish: the window, for which there are not enough.
        parties: whom the windows are for that are booked already, by their ids.

    Returns:
        Begin of its first occurrence; None if there is none, or it was not found among the first `MOST_STARTS`.
    """
    first = wish.times[0]
    lead = first.starts_at - first.closes_at
    starts = {candidate.free_at + lead for candidate in candidates if candidate.free_at < math.inf}
    for candidate in candidates:
        for booking in candidate.bookings:
            starts |= {booking.ends_at, booking.ends_at + lead}
    later = sorted({math.ceil(start) for start in starts if start > first.starts_at})
    for start in later[:MOST_STARTS]:
        if choose(candidates, wish.later(start - first.starts_at), parties) is not None:
            return start
    return None
