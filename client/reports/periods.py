"""Periods of reports: calendar years, months, weeks and days in a time zone, and any other time. Pure functions."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo

from msgspec import Struct

FORMS: Final = "2026, 2026-10, 2026-W41, 2026-10-07, today, yesterday, this-week, last-week, this-month or last-month"
_YEAR: Final = re.compile(r"\d{4}")
_MONTH: Final = re.compile(r"(\d{4})-(\d\d)")
_WEEK: Final = re.compile(r"(\d{4})-[wW](\d\d)")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d")
_HOURLY: Final = timedelta(hours=50)
_DAILY: Final = timedelta(days=63)
_WEEKLY: Final = timedelta(days=63 * 7)
_LONGEST: Final = timedelta(days=10 * 366)


class Period(Struct, frozen=True, kw_only=True):
    """A part of the history.

    Attributes:
        name: such as `2026-10`.
        start: its start, in UTC.
        end: its end, in UTC, which is not part of it.
        zone: time zone in which its days begin, such as `Europe/Berlin`.
    """

    name: str
    start: datetime
    end: datetime
    zone: str

    @property
    def rules(self) -> ZoneInfo:
        """Rules of the zone."""
        return ZoneInfo(self.zone)


class Slice(Struct, frozen=True, kw_only=True):
    """An hour, day, week or month of a period, for charts.

    Attributes:
        name: of its start: `07:00`, `2026-10-07` or `2026-10`.
        start: its start, in UTC, no earlier than that of the period.
        end: its end, in UTC, no later than that of the period.
    """

    name: str
    start: datetime
    end: datetime


def period_of(text: str, zone: str, now: datetime) -> Period:
    """The period that a text names.

    Args:
        text: one of `FORMS`.
        zone: whose midnight begins a day; weeks begin on Monday.
        now: the present, for relative names.

    Raises:
        ValueError: no such form, or no such day.
    """
    words = text.strip()
    rules = ZoneInfo(zone)
    first, last = days_of(words, now.astimezone(rules).date())
    return Period(name=_named(words, first), start=midnight(first, rules), end=midnight(last, rules), zone=zone)


def between(first: str, last: str | None, zone: str, now: datetime) -> Period:
    """The period from one time to another.

    Args:
        first: a date, whose midnight counts, or a time, which may have an offset.
        last: a date, which is included, or a time; None for now.
        zone: of times without an offset.
        now: the present.

    Raises:
        ValueError: no such time, or the period is empty or longer than ten years.
    """
    start = _time(first, zone)
    if last is None:
        end = now.replace(microsecond=0)
    elif _DAY.fullmatch(last.strip()):
        end = midnight(date.fromisoformat(last.strip()) + timedelta(days=1), ZoneInfo(zone))
    else:
        end = _time(last, zone)
    if end <= start:
        raise ValueError(f"the period from {first} to {last or 'now'} is empty")
    if end - start > _LONGEST:
        raise ValueError("a report may span ten years at most")
    return Period(name=f"{first.strip()} to {last.strip() if last else 'now'}", start=start, end=end, zone=zone)


def slices(period: Period) -> list[Slice]:
    """Split a period into hours, days, weeks or months, at most about sixty unless it is longer than five years."""
    zone, length = period.rules, period.end - period.start
    found: list[Slice] = []
    start = period.start
    while start < period.end:
        local = start.astimezone(zone)
        if length <= _HOURLY:
            name, end = f"{local:%H:%M}", (local.astimezone(UTC) + timedelta(hours=1))
        else:
            name, following = _part(local.date(), length)
            end = midnight(following, zone)
        found.append(Slice(name=name, start=start, end=min(end, period.end)))
        start = end
    return found


def _part(day: date, length: timedelta) -> tuple[str, date]:
    if length <= _DAILY:
        return f"{day}", day + timedelta(days=1)
    if length <= _WEEKLY:
        return f"{day}", day + timedelta(days=7 - day.weekday())
    return f"{day:%Y-%m}", _next_month(day)


def days_of(text: str, today: date) -> tuple[date, date]:
    """First day of a calendar period, and the first day after it.

    Args:
        text: one of `FORMS`.
        today: the present day, for relative names.

    Raises:
        ValueError: no such form, or no such day.
    """
    monday, month = today - timedelta(days=today.weekday()), today.replace(day=1)
    named = {
        "today": (today, today + timedelta(days=1)),
        "yesterday": (today - timedelta(days=1), today),
        "this-week": (monday, monday + timedelta(days=7)),
        "last-week": (monday - timedelta(days=7), monday),
        "this-month": (month, _next_month(month)),
        "last-month": ((month - timedelta(days=1)).replace(day=1), month),
    }
    if text in named:
        return named[text]
    try:
        if _YEAR.fullmatch(text):
            return date(int(text), 1, 1), date(int(text) + 1, 1, 1)
        if found := _MONTH.fullmatch(text):
            first = date(int(found[1]), int(found[2]), 1)
            return first, _next_month(first)
        if found := _WEEK.fullmatch(text):
            first = date.fromisocalendar(int(found[1]), int(found[2]), 1)
            return first, first + timedelta(days=7)
        if _DAY.fullmatch(text):
            return date.fromisoformat(text), date.fromisoformat(text) + timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r}: {error}") from None
    raise ValueError(f"{text!r} is no period: write {FORMS}")


def _named(text: str, first: date) -> str:
    if text.endswith("-month"):
        return f"{first:%Y-%m}"
    if text.endswith("-week") or _WEEK.fullmatch(text):
        year, week, _ = first.isocalendar()
        return f"{year}-W{week:02}"
    return f"{first}" if text in ("today", "yesterday") else text


def _next_month(day: date) -> date:
    return (day.replace(day=1) + timedelta(days=31)).replace(day=1)


def _time(text: str, zone: str) -> datetime:
    try:
        at = datetime.fromisoformat(text.strip().upper().replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{text!r} is no time: write 2026-10-07, or 2026-10-07 08:00 (also with an offset)") from None
    return (at.replace(tzinfo=ZoneInfo(zone)) if at.tzinfo is None else at).astimezone(UTC)


def midnight(day: date, zone: tzinfo) -> datetime:
    """The begin of a day; where clocks skip midnight, the moment at which they do."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
