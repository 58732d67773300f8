"""Times of a booked window: its occurrences, and all windows as the fleet takes them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ...schemas.work.windows import MAX_OCCURRENCES, Repeat, Window
from ..fleet.bookings import Booking, Bookings, Party, no_groups

_STEP_DAYS: Final = {Repeat.DAILY: 1, Repeat.WEEKLY: 7}


class InvalidWindow(ValueError):
    """A window that can't be booked.

    Attributes:
        field: path of the field at fault, such as `$.book.ends_at`.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = f"$.book.{field}"


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def occurrences(window: Window) -> list[Booking]:
    """The occurrences of a window, in order: at the same time of day by the clocks of its zone, each as long.

    Raises:
        InvalidWindow: times contradict each other, there are too many, or the zone is unknown.
    """
    lasts = window.ends_at - window.starts_at
    if lasts <= timedelta():
        raise InvalidWindow("A window ends after it has begun", "ends_at")
    if window.repeat is Repeat.NONE:
        return [_booking(window, window.starts_at, lasts)]
    if window.repeat_until is None:
        raise InvalidWindow("Say until when the window repeats", "repeat_until")
    step = timedelta(days=_STEP_DAYS[window.repeat])
    if lasts > step:
        raise InvalidWindow(f"A window that repeats {window.repeat.value} can't last longer than that", "ends_at")
    try:
        local = window.starts_at.astimezone(_zone(window.zone))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidWindow(f"The planner's host knows no time zone {window.zone!r}", "zone") from None
    found: list[Booking] = []
    for number in range(MAX_OCCURRENCES + 1):
        start = (local + number * step).astimezone(UTC)  # by the clock on the wall, whatever the offset is then
        if start > window.repeat_until:
            break
        found.append(_booking(window, start, lasts))
    if not found:
        raise InvalidWindow("No occurrence begins before repeat_until", "repeat_until")
    if len(found) > MAX_OCCURRENCES:
        raise InvalidWindow(f"More than {MAX_OCCURRENCES} occurrences: let it end sooner", "repeat_until")
    return found


def _booking(window: Window, start: datetime, lasts: timedelta) -> Booking:
    # Whole microseconds, as times of leases are: one that ends with its window would else end after it, by rounding.
    closes_at = start - timedelta(seconds=window.lead_seconds)
    ends_at = start + lasts
    return Booking(closes_at.timestamp(), start.timestamp(), ends_at.timestamp(), window.window_id or "")


def party_of(window: Window) -> Party:
    """Owners that a window is for."""
    if window.maintenance:
        return Party(frozenset(), reason=window.reason)
    return Party(frozenset(window.owners), window.group or "", window.reason)


def targets_of(window: Window) -> list[str]:
    """Targets of a window: `device:UUID`, `host:NAME`, `label:K=V`."""
    found = [f"device:{uuid}" for uuid in window.devices]
    if window.maintenance:
        found += [f"host:{name}" for name in window.hosts]
        found += [f"label:{key}={value}" for key, value in window.host_labels.items()]
    return found


def bookings_of(
    windows: Iterable[Window],
    times: Mapping[str, Sequence[Booking]],
    now: float,
    group_of: Callable[[str], str] = no_groups,
) -> Bookings:
    """All windows as the fleet takes them in, without what is over.

    Args:
        windows: each with an id.
        times: occurrences of each, by id.
        now: seconds since the epoch.
        group_of: returns the group of an owner.
    """
    windows = list(windows)
    targets: dict[str, tuple[Booking, ...]] = {}
    for window in windows:
        left = tuple(booking for booking in times[window.window_id or ""] if booking.ends_at > now)
        for target in targets_of(window) if left else ():
            before = targets.get(target)
            targets[target] = left if before is None else tuple(sorted((*before, *left)))
    return Bookings(targets, {window.window_id or "": party_of(window) for window in windows}, group_of)
