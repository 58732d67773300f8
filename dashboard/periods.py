"""Periods and filters of questions about the history, as SQL. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import date, datetime, timedelta, tzinfo
from typing import Final

from msgspec import Struct

from ..client.reports.periods import days_of, midnight
from ..schemas.values.units import parse_seconds

CHOICES: Final = (
    ("", "All"),
    ("1h", "1 h"),
    ("24h", "24 h"),
    ("7d", "7 d"),
    ("30d", "30 d"),
    ("365d", "1 y"),
    ("month", "This month"),
    ("last-month", "Last month"),
)
"""Periods that are offered; a URL may also have those of `corral report`, another length, and `since-2026-10-15`."""
FILTERS: Final = ("owner", "group", "model", "host")
_LONGEST: Final = timedelta(days=10 * 366)
_TIMES: Final = ("hour", "time", "notified_at", "submitted_at", "started_at")


class Period(Struct, frozen=True, kw_only=True):
    """A part of the history.

    Attributes:
        start: its start.
        end: its end, which is not part of it.
    """

    start: datetime
    end: datetime

    @property
    def before(self) -> Period:
        """The period of the same length that ends where this one begins."""
        return Period(start=self.start - (self.end - self.start), end=self.start)


def period_of(name: str, now: datetime, zone: tzinfo) -> Period | None:
    """The period of a name in a URL; None for the whole history, and for a name that is none.

    Args:
        name: one of `CHOICES`, another length such as `12h`, a first day as `since-2026-10-15`, or a calendar period as
            in `corral report`: `2026-10`, `2026-W41`.
        now: the present.
        zone: whose midnight begins a day or a month.
    """
    try:
        start, end = _ends(name, now, zone)
    except (ValueError, OverflowError):
        return None
    return Period(start=start, end=min(end, now)) if start < now and now - start <= _LONGEST else None


def _ends(name: str, now: datetime, zone: tzinfo) -> tuple[datetime, datetime]:
    if name.startswith("since-"):
        return midnight(date.fromisoformat(name.removeprefix("since-")), zone), now
    try:
        first, following = days_of("this-month" if name == "month" else name, now.astimezone(zone).date())
    except ValueError:
        return now - timedelta(seconds=parse_seconds(name)), now
    return midnight(first, zone), midnight(following, zone)


class Narrowed(Struct, frozen=True, kw_only=True):
    """Conditions of a question.

    Attributes:
        where: condition in SQL; empty if there is none.
        counted: what is counted with regard to the period, as a sentence; empty without a period.
        ignored: names of filters that the question has no columns for.
    """

    where: str
    counted: str
    ignored: list[str]


def narrowed(columns: Collection[str], period: Period | None, filters: Mapping[str, str]) -> Narrowed:
    """Conditions on a view for a period and filters.

    Args:
        columns: columns of the view.
        period: the period; None for the whole history.
        filters: texts by the names in `FILTERS`; owners and groups by name, models and hosts by a part of the name.
    """
    found: list[str] = []
    ignored: list[str] = []
    counted = ""
    if period is not None:
        start, end = (_literal(at) for at in (period.start, period.end))
        time = next((name for name in _TIMES if name in columns), None)
        if {"started", "ended"} <= set(columns):
            found.append(f"started < {end} AND ended > {start}")
            counted = "Leases that reach into the period, each counted as a whole."
        elif time is not None:
            found.append(f'"{time}" >= {start} AND "{time}" < {end}')
            counted = f"Rows whose {time} is within the period."
        else:
            counted = "This question has no time: the period does not apply."
    for name, text in filters.items():
        if text:
            condition = _condition(name, text, columns)
            (found if condition else ignored).append(condition or name)
    return Narrowed(where=" AND ".join(found), counted=counted, ignored=ignored)


def _condition(name: str, text: str, columns: Collection[str]) -> str:
    """Condition of one filter: on a column of its own, else by the lease or the device; empty if there is none."""
    column = {"group": "group_name"}.get(name, name)
    test = f"= {_text(text)}" if name in ("owner", "group") else f"ILIKE {_text(f'%{_escaped(text)}%')} ESCAPE '\\'"
    if column in columns:
        return f"{column} {test}"
    if name == "model" and "device" in columns:
        return f"device IN (SELECT device FROM devices WHERE name {test})"
    if "lease_id" not in columns:
        return ""
    if name == "model":
        return (
            "lease_id IN (SELECT lease_id FROM lease_spans "
            f"WHERE device IN (SELECT device FROM devices WHERE name {test}))"
        )
    return f"lease_id IN (SELECT lease_id FROM {'lease_spans' if name == 'host' else 'leases'} WHERE {column} {test})"


def _literal(at: datetime) -> str:
    return f"to_timestamp({at.timestamp():.3f})"


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _escaped(text: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", text)
