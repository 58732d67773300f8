"""Times as people write and read them, in a named time zone."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ..schemas.values.units import parse_seconds
from .exits import USAGE, CommandError

FORMS: Final = "now, +2h, 08:00, tomorrow 08:00, mon 08:00, or 2026-12-01 08:00 (also with an offset, or Z)"
_DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_CLOCK: Final = re.compile(r"(?:(?P<day>[a-z]+)\s+)?(?P<hour>\d{1,2}):(?P<minute>\d{2})")
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
_LOCALTIME: Final = Path("/etc/localtime")


class Zone(NamedTuple):
    """A time zone.

    Attributes:
        name: such as `Europe/Berlin`.
        rules: of the zone.
    """

    name: str
    rules: ZoneInfo

    def words(self, at: datetime) -> str:
        """A time by the clocks of the zone, with its abbreviation."""
        local = at.astimezone(self.rules)
        return local.strftime("%a %Y-%m-%d %H:%M:%S %Z" if local.second else "%a %Y-%m-%d %H:%M %Z")


def zone_of(name: str | None) -> Zone:
    """The time zone of a name; that of this host for None."""
    name = name or os.environ.get("TZ", "").lstrip(":") or _local_name()
    name = "UTC" if name == "Etc/UTC" else name
    try:
        return Zone(name, ZoneInfo(name))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise CommandError(f"there is no time zone {name!r} here: --zone Europe/Berlin, for example", USAGE) from None


def _local_name() -> str:
    """Name of this host's zone, which `/etc/localtime` links to; UTC if it is not known."""
    _, found, name = str(_LOCALTIME.resolve()).partition("/zoneinfo/")
    return name if found else "UTC"


def parse_time(text: str, zone: Zone, now: datetime, option: str) -> datetime:
    """Convert a text to a time, in UTC; without a date it is the next such time.

    Args:
        text: see `FORMS`.
        zone: whose clocks count, unless the text has an offset.
        now: in UTC.
        option: for which it is, for errors.

    Raises:
        CommandError: no such form, a time that the clocks skip or have twice, or one that is past.
    """
    words = " ".join(text.lower().split())
    if words == "now":
        return now
    if words.startswith("+"):
        try:
            return now + timedelta(seconds=parse_seconds(words[1:]))
        except ValueError as error:
            raise CommandError(f"{option}: {error}", USAGE) from None
    clock = _CLOCK.fullmatch(words)
    at = _next(clock, zone, now, option) if clock else _dated(text.strip(), zone, option)
    if at < now:
        raise CommandError(f"{option} {text!r} is past: {zone.words(at)}, and it is {zone.words(now)} now", USAGE)
    return at


def parse_last_day(text: str, zone: Zone, now: datetime, option: str) -> datetime:
    """Convert a text to the time until which a window repeats: a date alone counts to its end."""
    if not _DATE.fullmatch(text.strip()):
        return parse_time(text, zone, now, option)
    try:
        day = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise CommandError(f"{option} {text!r}: {error}", USAGE) from None
    return (day.replace(tzinfo=zone.rules) + timedelta(days=1)).astimezone(UTC) - timedelta(seconds=1)


def _next(clock: re.Match[str], zone: Zone, now: datetime, option: str) -> datetime:
    """The next time of day that a text names, on its day of the week if it names one."""
    local = now.astimezone(zone.rules)
    day, hour, minute = clock["day"], int(clock["hour"]), int(clock["minute"])
    if hour > 23 or minute > 59:
        raise CommandError(f"{option}: there is no {hour}:{minute:02} o'clock", USAGE)
    ahead = {None: 0, "today": 0, "tomorrow": 1}.get(day)
    if ahead is None:
        numbers = [number for number, name in enumerate(_DAYS) if len(day) >= 3 and name.startswith(day)]
        if not numbers:
            raise _no_time(option, clock[0])
        ahead = (numbers[0] - local.weekday()) % 7
    at = _local(datetime.combine(local.date() + timedelta(days=ahead), time(hour, minute)), zone, option)
    if at < now and day not in ("today", "tomorrow"):
        days = ahead + (1 if day is None else 7)
        at = _local(datetime.combine(local.date() + timedelta(days=days), time(hour, minute)), zone, option)
    return at


def _dated(text: str, zone: Zone, option: str) -> datetime:
    if _DATE.fullmatch(text):
        raise CommandError(f"{option} {text!r} needs a time of day: {text} 08:00, for example", USAGE)
    try:
        at = datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    except ValueError:
        raise _no_time(option, text) from None
    return _local(at, zone, option) if at.tzinfo is None else at.astimezone(UTC)


def _local(at: datetime, zone: Zone, option: str) -> datetime:
    """A time by the clocks of a zone, in UTC.

    Raises:
        CommandError: clocks are put forward over it, or back to it, so that it is never or twice.
    """
    first, second = (at.replace(tzinfo=zone.rules, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first == second:
        return first
    if first.astimezone(zone.rules).replace(tzinfo=None) != at:
        raise CommandError(f"{option}: clocks in {zone.name} skip {at:%Y-%m-%d %H:%M}", USAGE)
    raise CommandError(
        f"{option}: clocks in {zone.name} show {at:%Y-%m-%d %H:%M} twice: say {at:%Y-%m-%dT%H:%M}+02:00, for example",
        USAGE,
    )


def _no_time(option: str, text: str) -> CommandError:
    return CommandError(f"{option} {text!r} is no time: write {FORMS}", USAGE)
