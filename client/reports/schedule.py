"""Reports that are made regularly: their description in a file, and which of them are due. Pure functions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Meta, Struct

from ...schemas.values.units import parse_seconds
from .forms import Form
from .periods import days_of, midnight
from .usage_sql import By, Filters

MOST: Final = 1000
"""Most periods of one report that are made up for."""


_URL: Final = re.compile(r"https?://[^\s<>`\"]+")


class Every(StrEnum):
    """Interval of a report: it is made for each complete period of this length."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


class Planned(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A report that is made for each period.

    Attributes:
        name: begins the names of its files.
        every: length of its periods.
        formats: forms in which it is written.
        by: what its rows are by.
        owner: name of the owner; null for all.
        group: name of the group, with those within it; null for all.
        model: part of the model's name, or a pattern; null for all.
        since: first period, such as `2026-10`; null for the last complete one when it is made for the first time.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
    every: Every
    formats: Annotated[tuple[Form, ...], Meta(min_length=1)] = (Form.PDF,)
    by: Annotated[tuple[By, ...], Meta(min_length=1)] = tuple(By)
    owner: str | None = None
    group: str | None = None
    model: str | None = None
    since: str | None = None

    @property
    def filters(self) -> Filters:
        """Restriction of the report."""
        return Filters(owner=self.owner, group=self.group, model=self.model)


class Schedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reports that are made regularly.

    Attributes:
        folder: folder of their files.
        report: the reports.
        zone: time zone whose midnight ends a period.
        delay: time after the end of a period, such as `2h`: collectors that could not send may do so until then.
        prices: file with the price list; null for reports without costs.
        url: where the folder is on the web, for links in messages; null if it is not there.
    """

    folder: str
    report: Annotated[list[Planned], Meta(min_length=1)]
    zone: str = "UTC"
    delay: str = "2h"
    prices: str | None = None
    url: str | None = None


def parse_schedule(text: str, base: Path) -> Schedule:
    """Read a schedule from TOML.

    Args:
        text: the TOML.
        base: folder that relative paths are relative to.

    Raises:
        ValueError: it is no TOML, or a key is missing, unknown or wrong; the message says which.
    """
    try:
        found = msgspec.convert(tomllib.loads(text), Schedule)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ValueError(_in_words(str(error))) from None
    names = [one.name for one in found.report]
    if len(set(names)) < len(names):
        raise ValueError("two reports have the same name: their files would, too")
    try:
        ZoneInfo(found.zone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"there is no time zone {found.zone!r}: write one such as Europe/Berlin") from None
    try:
        parse_seconds(found.delay)
    except ValueError as error:
        raise ValueError(f"delay: {error}") from None
    if found.url is not None and not _URL.fullmatch(found.url):
        raise ValueError(f"url: {found.url!r} is none: write one such as https://files.example/reports")
    for one in found.report:
        if one.since is not None:
            _first_day(one, one.since)
    prices = None if found.prices is None else str(base / Path(found.prices).expanduser())
    return msgspec.structs.replace(found, folder=str(base / Path(found.folder).expanduser()), prices=prices)


def _in_words(error: str) -> str:
    """An error of msgspec with the key in place of a path, and what would be right."""
    words, _, place = error.partition(" - at ")
    key = re.sub(
        r"^report\[(\d+)\]\.?", lambda at: f"[[report]] {int(at[1]) + 1}, ", place.strip("`").removeprefix("$.")
    )
    if "regex" in words:
        words = "a name has letters, digits, - and _"
    for name, choices in (("every", Every), ("formats", Form), ("by", By)):
        if "enum" in words and f", {name}" in key:
            words = f"{words.removeprefix('Invalid enum value ')} is none of {', '.join(choices)}"
    return f"{key.removesuffix(', ')}: {words}" if key and key != "$" else words


def due(planned: Planned, schedule: Schedule, done: Collection[str], now: datetime) -> list[str]:
    """Names of the periods that a report is to be made for, oldest first.

    Without `since`, these are the complete periods since the oldest for which it was made, so that missed ones are made
    up for; if it was made for none, the last complete one.

    Args:
        planned: the report.
        schedule: where it stands.
        done: names of the periods for which it was made.
        now: the present.
    """
    rules = ZoneInfo(schedule.zone)
    moment = now - timedelta(seconds=parse_seconds(schedule.delay))
    last = _begin(planned.every, moment.astimezone(rules).date())
    while midnight(last, rules) > moment.astimezone(UTC):
        last = _previous(planned.every, last)
    last = _previous(planned.every, last)
    first = last
    if planned.since is not None:
        first = _first_day(planned, planned.since)
    elif known := [_first_day(planned, name) for name in done if _is_period(planned, name)]:
        first = min(known)
    found: list[str] = []
    day = last
    while day >= first and len(found) < MOST:
        if (name := _name(planned.every, day)) not in done:
            found.append(name)
        day = _previous(planned.every, day)
    return found[::-1]


_NAMES: Final[Mapping[Every, re.Pattern[str]]] = {
    Every.DAY: re.compile(r"\d{4}-\d\d-\d\d"),
    Every.WEEK: re.compile(r"\d{4}-W\d\d"),
    Every.MONTH: re.compile(r"\d{4}-\d\d"),
    Every.YEAR: re.compile(r"\d{4}"),
}
_EXAMPLES: Final = {Every.DAY: "2026-10-07", Every.WEEK: "2026-W41", Every.MONTH: "2026-10", Every.YEAR: "2026"}


def _is_period(planned: Planned, name: str) -> bool:
    return _NAMES[planned.every].fullmatch(name) is not None


def _first_day(planned: Planned, name: str) -> date:
    if not _is_period(planned, name):
        example = _EXAMPLES[planned.every]
        raise ValueError(f"[[report]] {planned.name}: since = {name!r} is no {planned.every}: write {example}")
    return days_of(name, date(2000, 1, 1))[0]


def _begin(every: Every, day: date) -> date:
    if every is Every.WEEK:
        return day - timedelta(days=day.weekday())
    if every is Every.DAY:
        return day
    return day.replace(day=1) if every is Every.MONTH else day.replace(month=1, day=1)


def _previous(every: Every, first: date) -> date:
    return _begin(every, first - timedelta(days=1))


def _name(every: Every, first: date) -> str:
    if every is Every.WEEK:
        year, week, _ = first.isocalendar()
        return f"{year}-W{week:02}"
    return {Every.DAY: f"{first}", Every.MONTH: f"{first:%Y-%m}"}.get(every, f"{first:%Y}")
