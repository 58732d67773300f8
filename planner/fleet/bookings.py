"""Booked windows as decisions see them: for each device, when it is booked and for whom.

Before a window, a device takes only leases that have surely ended when it closes, some time ahead of the begin. During
it the device takes only leases of those whom the window is for, and these end with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Final, NamedTuple

from ...schemas.requests import WorkRequest
from ...schemas.values.units import format_limit
from ...schemas.work.groups import DEFAULT_GROUP
from .state import AskKey

MARGIN_SECONDS: Final = 1.0
"""Time for the end of a preempted lease to become durable."""


class Booking(NamedTuple):
    """One time for which a device, or a host, is booked. All times are in seconds since the epoch.

    Attributes:
        closes_at: leases of before have ended by then.
        starts_at: begin of the window.
        ends_at: end of the window.
        window: its id.
    """

    closes_at: float
    starts_at: float
    ends_at: float
    window: str


class Party(NamedTuple):
    """Owners that a window is for.

    Attributes:
        owners: their names.
        group: name of a group; empty for none.
        reason: why it is booked.
    """

    owners: frozenset[str]
    group: str = ""
    reason: str = ""

    @property
    def nobody(self) -> bool:
        """True for maintenance, which is for no one."""
        return not self.owners and not self.group

    @property
    def words(self) -> str:
        """Text that names them."""
        if self.nobody:
            return f"maintenance ({self.reason})" if self.reason else "maintenance"
        return ", ".join([*([self.group] if self.group else []), *sorted(self.owners)])

    def same(self, other: Party) -> bool:
        """True if both are for the same people."""
        return not self.nobody and (self.owners, self.group) == (other.owners, other.group)


def no_groups(_: str) -> str:
    """Group of an owner in a fleet without groups."""
    return DEFAULT_GROUP


class Bookings:
    """All booked windows.

    Args:
        targets: times by `device:UUID`, `host:NAME` or `label:K=V`, each sorted.
        parties: whom a window is for, by its id.
        group_of: returns the group of an owner.

    Attributes:
        due: time of the next begin, close or end of a window; infinite if there is none.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[Booking, ...]],
        parties: Mapping[str, Party],
        group_of: Callable[[str], str] = no_groups,
    ) -> None:
        self.targets = dict(targets)
        self.parties = dict(parties)
        self._group_of = group_of
        distinct = {id(times): times for times in self.targets.values()}  # those of a window's devices are one object
        self._all = sorted({booking for times in distinct.values() for booking in times})
        self._closings = sorted({booking.closes_at for booking in self._all})
        self._changes = sorted({time for booking in self._all for time in booking[:3]})
        self._running: tuple[Booking, ...] = ()
        self._admitted: dict[str, frozenset[str]] = {}
        self._labels = {target.removeprefix("label:") for target in self.targets if target.startswith("label:")}
        self.due = math.inf

    def __bool__(self) -> bool:
        return bool(self._all)

    def advance(self, now: float) -> None:
        """Move to a time: which windows are now, and when that changes."""
        self._running = tuple(booking for booking in self._all if booking.starts_at <= now < booking.ends_at)
        at = bisect_left(self._changes, math.nextafter(now, math.inf))
        self.due = self._changes[at] if at < len(self._changes) else math.inf

    def on_host(self, name: str, labels: Mapping[str, str], now: float) -> tuple[Booking, ...]:
        """Maintenance of a host, now and later, soonest first."""
        found = set(self.targets.get(f"host:{name}", ()))
        if self._labels:
            for label, value in labels.items():
                found.update(self.targets.get(f"label:{label}={value}", ()))
        return tuple(sorted(booking for booking in found if booking.ends_at > now))

    def on_device(self, uuid: str, board: str | None, of_host: tuple[Booking, ...], now: float) -> tuple[Booking, ...]:
        """Times for which a device is booked, now and later, soonest first.

        Args:
            uuid: of the device.
            board: uuid of the board that it is an instance of, which is booked with it.
            of_host: times of its host.
            now: seconds.
        """
        own = self.targets.get(f"device:{uuid}") or (self.targets.get(f"device:{board}") if board else None)
        if not own:
            return of_host
        return tuple(sorted({*of_host, *(booking for booking in own if booking.ends_at > now)}))

    def standing(self, bookings: Sequence[Booking], now: float) -> tuple[str, float]:
        """The window that has a device now, and the time by which leases of others must have ended.

        Returns:
            Id of the window and minus infinity; or empty text and the time, infinite if the device is not booked.
        """
        holder, closes = "", math.inf
        for booking in bookings:
            if booking.ends_at <= now:
                continue
            running = booking.starts_at <= now
            maintenance = booking.closes_at <= now and self.parties[booking.window].nobody
            if (running and not holder) or (holder and maintenance):
                holder = booking.window
            elif not running:
                closes = min(closes, booking.closes_at)
        return (holder, -math.inf) if holder else ("", closes)

    def admitted(self, owner: str) -> frozenset[str]:
        """Ids of the windows that are for an owner."""
        found = self._admitted.get(owner)
        if found is None:
            group = self._group_of(owner)
            found = frozenset(
                window
                for window, party in self.parties.items()
                if owner in party.owners or (party.group and (group == party.group or _within(group, party.group)))
            )
            self._admitted[owner] = found
        return found

    def inside(self, owner: str) -> tuple[str, ...]:
        """Ids of the windows that are now and for an owner."""
        if not self._running:
            return ()
        admitted = self.admitted(owner)
        return tuple(sorted({booking.window for booking in self._running if booking.window in admitted}))

    def ends_at(self, windows: Collection[str]) -> float:
        """Time at which the last of some windows ends that are now; minus infinity if none is."""
        return max((booking.ends_at for booking in self._running if booking.window in windows), default=-math.inf)

    def classify(self, key: AskKey, request: WorkRequest, now: float) -> AskKey:
        """A request with what it may use of booked devices, which is the same for many requests and for some time."""
        at = bisect_left(self._closings, now + lasts_of(request))
        ends_by = self._closings[at] if at < len(self._closings) else math.inf
        windows = self.inside(request.owner)
        lasts = request.max_seconds if request.expected_seconds is None else request.expected_seconds
        outlasts = bool(windows) and lasts is not None and now + lasts > self.ends_at(windows)
        if ends_by == key.ends_by and windows == key.windows and outlasts == key.outlasts:
            return key
        return key._replace(ends_by=ends_by, windows=windows, outlasts=outlasts)

    def words(self, windows: Iterable[str]) -> str:
        """Text that names those whom windows are for, each once."""
        return ", ".join(dict.fromkeys(self.parties[window].words for window in windows))

    def closing(self, at: float) -> list[Booking]:
        """Times for which devices close then."""
        return [booking for booking in self._all[bisect_left(self._all, (at,)) :] if booking.closes_at == at]

    @property
    def running(self) -> Sequence[Booking]:
        """Times that are now."""
        return self._running


NOTHING_BOOKED: Final = Bookings({}, {})


def time_words(seconds: float) -> str:
    """A time as text, to the second, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def booked_words(bookings: Sequence[Booking], all_bookings: Bookings, now: float) -> str:
    """Text on a booked device: for whom it is booked and when, and by when leases of others must have ended."""
    found = next((booking for booking in bookings if booking.ends_at > now), None)
    if found is None:
        return "booked"
    who = all_bookings.words([found.window])
    if found.starts_at <= now:
        return f"booked for {who} until {time_words(found.ends_at)}"
    left = math.floor(found.closes_at - now)
    text = f"booked for {who} from {time_words(found.starts_at)}"
    if left < 1:
        return text
    limit = f"a time limit of at most {format_limit(left)}"
    return f"{text}: before that, leases must end by {time_words(found.closes_at)} ({limit})"


def _within(group: str, around: str) -> bool:
    return group.startswith(f"{around}/")


def lasts_of(request: WorkRequest) -> float:
    """Time after its grant by which the lease of a request can have ended, in seconds; infinite for one without limit.

    One that is preemptible gets its notice in time, and its holder may put the end off by the grace again.
    """
    longest = math.inf if request.max_seconds is None else request.max_seconds
    if not request.preemptible:
        return longest
    return min(longest, request.min_run_seconds + 2 * request.grace_seconds + MARGIN_SECONDS)


def limit(bookings: Sequence[Booking], now: float, admitted: AbstractSet[str]) -> tuple[float, str]:
    """Time by which a lease that is granted now must end, and the window that it is in.

    Windows in a row that are for the same owner count as one.

    Args:
        bookings: of the device, soonest first.
        now: seconds.
        admitted: ids of the windows that are for the owner of the lease.

    Returns:
        The time, infinite if there is no limit; and the id of the window, empty if it is in none.
    """
    until, window = now, ""
    latest = math.inf
    for booking in sorted(bookings, key=lambda booking: booking.starts_at):
        if booking.window in admitted and booking.starts_at <= until:
            if booking.ends_at > until:
                until, window = booking.ends_at, window or booking.window
        elif booking.ends_at > now:
            latest = min(latest, booking.closes_at)
    return min(until if window else math.inf, latest), window


def free_from(bookings: Sequence[Booking], at: float, lasts: float, admitted: AbstractSet[str]) -> float:
    """Time from which a booked device could take a lease.

    Args:
        bookings: of the device, soonest first.
        at: time from which it has no lease.
        lasts: longest duration of the lease in seconds; infinite if it has no limit.
        admitted: ids of the windows that are for the owner of the lease.
    """
    for booking in bookings:
        if booking.ends_at <= at:
            continue
        if at + lasts <= booking.closes_at:
            break
        if booking.window in admitted:
            return max(at, booking.starts_at)
        at = booking.ends_at
    return at
