"""Quiet times: when news wait, and until when. Pure.

A quiet time is written as `22:00-07:00`, with days before it and a time zone behind it if need be:
`Mon-Fri 22:00-07:00 Europe/Berlin`. Days are those on which it begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from msgspec import Struct

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORM: Final = re.compile(
    r"(?:(?P<days>[a-z][a-z,\s-]*?)\s+)?(?P<start>\d{1,2}:\d{2})\s*-\s*(?P<end>\d{1,2}:\d{2})(?:\s+(?P<zone>\S+))?",
    re.IGNORECASE,
)
_WRITE: Final = "write it like 22:00-07:00, Mon-Fri 22:00-07:00 or Sat-Sun 00:00-24:00 Europe/Berlin"
_MINUTES: Final = 24 * 60
_MOST_IN_A_ROW: Final = 8
"""Quiet times that follow each other without a break. News wait no longer, even where it is always quiet."""


class QuietTime(Struct, frozen=True):
    """A quiet time that comes each week or each day.

    Attributes:
        days: on which it begins, 0 for Monday.
        start: minutes after midnight.
        end: likewise, up to 1440; on the next day if it is not after `start`.
        zone: name of the time zone.
    """

    days: tuple[int, ...]
    start: int
    end: int
    zone: str


def zone_of(name: str) -> ZoneInfo:
    """Rules of a time zone.

    Raises:
        ValueError: there is none of this name; the message says what to write.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone {name!r}: write a name such as Europe/Berlin or UTC") from None


def parse_quiet(text: str, zone: str) -> QuietTime:
    """Parse a quiet time.

    Args:
        text: see above.
        zone: time zone of a text without one.

    Raises:
        ValueError: it is none; the message says what to write.
    """
    found = _FORM.fullmatch(" ".join(text.split()))
    if found is None:
        raise ValueError(f"{text!r} is no quiet time: {_WRITE}")
    start, end = _minutes(found["start"], text), _minutes(found["end"], text)
    if start in (end, _MINUTES):
        raise ValueError(f"{text!r} has no length: {_WRITE}")
    name = found["zone"] or zone
    zone_of(name)
    return QuietTime(_days(found["days"] or "mon-sun", text), start, end, name)


def named_zone(text: str) -> str:
    """The time zone that a quiet time names; empty if it names none, or is no quiet time."""
    found = _FORM.fullmatch(" ".join(text.split()))
    return found["zone"] or "" if found is not None else ""


def _minutes(text: str, whole: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if minutes > 59 or hours * 60 + minutes > _MINUTES:
        raise ValueError(f"{whole!r}: there is no {text} o'clock: {_WRITE}")
    return hours * 60 + minutes


def _days(text: str, whole: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in filter(None, re.split(r"[,\s]+", re.sub(r"\s*-\s*", "-", text.strip().lower()))):
        numbers = [_DAYS.index(day[:3]) if day[:3] in _DAYS else -1 for day in part.split("-")]
        if -1 in numbers or len(numbers) > 2:
            raise ValueError(f"{whole!r}: {part!r} is no day: use Mon, Tue, Wed, Thu, Fri, Sat and Sun")
        first, last = numbers[0], numbers[-1]
        found.update((first + ahead) % 7 for ahead in range((last - first) % 7 + 1))
    return tuple(sorted(found))


def quiet_until(times: Iterable[QuietTime], now: datetime) -> datetime | None:
    """End of the quiet hours, in UTC; None if it is not quiet now. Times that follow each other count as one.

    Args:
        times: of a rule.
        now: with a time zone.
    """
    every = list(times)
    until: datetime | None = None
    for _ in range(_MOST_IN_A_ROW):
        at = until or now
        ends = [end for each in every if (end := _end(each, at)) is not None]
        if not ends:
            break
        until = max(ends)
    return until


def _end(quiet: QuietTime, at: datetime) -> datetime | None:
    """End of the quiet time that a time is within; None if it is in none."""
    zone = zone_of(quiet.zone)
    today = at.astimezone(zone).date()
    found: datetime | None = None
    for begin in (today - timedelta(days=1), today):
        if begin.weekday() in quiet.days:
            last = begin if quiet.end > quiet.start else begin + timedelta(days=1)
            start, end = _at(begin, quiet.start, zone), _at(last, quiet.end, zone)
            if start <= at < end:
                found = end
    return found


def _at(day: date, minutes: int, zone: ZoneInfo) -> datetime:
    """A time of day in UTC. Where clocks skip it, it is as much later as they skip."""
    if minutes == _MINUTES:
        day, minutes = day + timedelta(days=1), 0
    return datetime.combine(day, time(minutes // 60, minutes % 60), zone).astimezone(UTC)
