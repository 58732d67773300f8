"""Queries and charts for the views on the analytics page. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Final

from msgspec import Struct

SHOWN: Final = 1000
"""Maximum number of rows that a page shows; an export has all rows."""
BARS: Final = 20
_LINES: Final = 5


class Drawing(Struct, frozen=True, kw_only=True):
    """Specification of a chart for a result.

    Attributes:
        kind: `bar` or `line`.
        label: columns that label a bar, or the time column of a line chart.
        values: columns to draw.
        unit: unit of the values; empty for plain numbers.
    """

    kind: str
    label: tuple[str, ...]
    values: tuple[str, ...]
    unit: str = ""


class Question(Struct, frozen=True, kw_only=True):
    """Query and chart settings for a view.

    Attributes:
        order: SQL for ORDER BY; empty keeps the view's order.
        drawing: chart; None chooses one by the columns.
    """

    order: str = ""
    drawing: Drawing | None = None


def _bars(label: str, *values: str, unit: str = "") -> Drawing:
    return Drawing(kind="bar", label=tuple(label.split()), values=values, unit=unit)


KNOWN: Final[dict[str, Question]] = {
    "fleet_by_hour": Question(
        order="hour DESC",
        drawing=Drawing(
            kind="line", label=("hour",), values=("gpu_utilization_percent", "memory_used_percent"), unit="percent"
        ),
    ),
    "usage_by_owner": Question(order="gpu_hours DESC", drawing=_bars("owner", "gpu_hours", "idle_gpu_hours")),
    "group_usage": Question(
        order="hour DESC, gpu_seconds DESC",
        drawing=_bars("hour group_name model", "gpu_seconds", "preemptible_gpu_seconds"),
    ),
    "preemptions": Question(order="notified_at DESC", drawing=_bars("owner name lease_id", "lost_gpu_seconds")),
    "idle_while_leased": Question(order="idle_gpu_hours DESC", drawing=_bars("owner name device", "idle_gpu_hours")),
    "lease_usage": Question(
        order="started DESC", drawing=_bars("owner name lease_id", "gpu_utilization_percent_mean", unit="percent")
    ),
    "lease_device_usage": Question(
        order="started DESC", drawing=_bars("owner host device", "gpu_utilization_percent_mean", unit="percent")
    ),
    "memory_right_sizing": Question(
        order="over_asked_bytes DESC",
        drawing=_bars("name", "memory_granted_bytes", "memory_used_bytes_p99", "suggested_bytes", unit="bytes"),
    ),
    "throttling": Question(
        order="throttled_percent DESC", drawing=_bars("host device", "throttled_percent", unit="percent")
    ),
    "device_health": Question(
        order="concern = '', unhealthy NULLS LAST, xid_events DESC", drawing=_bars("host device", "xid_events")
    ),
    "stranded_capacity": Question(order="stranded_share DESC", drawing=_bars("host reason device", "stranded_share")),
    "devices_now": Question(
        order="host, index", drawing=_bars("host index", "gpu_utilization_percent", unit="percent")
    ),
    "lease_spans": Question(order="started DESC"),
    "lease_minutes": Question(order="time DESC"),
    "lease_buckets": Question(order="time DESC"),
}

FIRST: Final = ("fleet_by_hour", "usage_by_owner", "idle_while_leased", "memory_right_sizing", "lease_usage",
                "devices_now", "device_health", "throttling", "stranded_capacity")  # fmt: skip
"""Views that are listed first; all others follow in the order of the history."""


def ordered(names: Sequence[str]) -> list[str]:
    """Sort views into the order of the list."""
    return [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]


def sql(view: str, where: str = "") -> str:
    """SQL that queries a view; `where` are conditions in SQL."""
    order = KNOWN.get(view, Question()).order
    return f"FROM {view}{f' WHERE {where}' if where else ''}{f' ORDER BY {order}' if order else ''}"


def with_times(types: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows with times as such; answers have them as text where pyarrow is not installed."""
    timed = [type if type.startswith("TIMESTAMP") else "" for type in types]
    return [[_time(value, type) if type else value for value, type in zip(row, timed, strict=True)] for row in rows]


def _time(value: Any, type: str) -> Any:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:  # infinity, or a year beyond 9999
        return value
    # As text, a time without a zone looks as if it were UTC.
    return found if "ZONE" in type or not isinstance(found, datetime) else found.replace(tzinfo=None)


class Column(Struct, frozen=True, kw_only=True):
    """A column of a table.

    Attributes:
        name: name of the column.
        numeric: true for numbers, which are aligned to the right.
        help: description; empty if there is none.
    """

    name: str
    numeric: bool
    help: str = ""


def cell(value: Any, zone: tzinfo = UTC) -> Any:
    """Convert a value for a table: numbers stay numbers, None and non-finite numbers become None, others text.

    Times with a zone are shown in `zone`, without its name, which `zones_of` has.
    """
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, bool) else str(value).lower()
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    # JavaScript numbers hold integers of up to 53 bits.
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime):
        return _in_zone(value, zone).replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")
    if isinstance(value, date | timedelta):
        return str(value)
    return str(value)


def _in_zone(value: datetime, zone: tzinfo) -> datetime:
    """A time in a zone; one without a zone, or near the ends of the calendar, as it is."""
    try:
        return value if value.tzinfo is None else value.astimezone(zone)
    except OverflowError:
        return value


def zones_of(rows: Sequence[Sequence[Any]], zone: tzinfo) -> str:
    """Names of a zone at the times in rows, such as `CET` or `CET and CEST`; empty without such times."""
    found = {
        _in_zone(value, zone).tzname()
        for row in rows
        for value in row
        if isinstance(value, datetime) and value.tzinfo is not None
    }
    return " and ".join(sorted(name for name in found if name))


def numeric(values: Sequence[Any]) -> bool:
    """True if a column has values, and all of them are numbers."""
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in known
    )


class Drawn(Struct, frozen=True, kw_only=True):
    """A chart with its data.

    Attributes:
        kind: `bar` or `line`.
        labels: labels of the bars, or epoch milliseconds of a line chart.
        series: series, each with `name` and `values`.
        unit: unit of the values.
    """

    kind: str
    labels: list[Any]
    series: list[dict[str, Any]]
    unit: str


def draw(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], drawing: Drawing | None, zone: tzinfo = UTC
) -> Drawn | None:
    """Chart of a result, with times in labels in a zone; None if there is nothing to draw."""
    if not rows:
        return None
    at = {name: number for number, name in enumerate(columns)}
    if drawing is None or not {*drawing.label, *drawing.values} <= set(at):
        drawing = guess(columns, rows)
    if drawing is None:
        return None
    if drawing.kind == "line":
        place = at[drawing.label[0]]
        timed = sorted(
            (row for row in rows if isinstance(row[place], datetime)), key=lambda row: _epoch_seconds(row[place])
        )
        labels: list[Any] = [_epoch_seconds(row[place]) * 1000 for row in timed]
        used: Sequence[Sequence[Any]] = timed
    else:
        # Rows in which all values are zero or unknown are left out.
        used = [row for row in rows if any(row[at[name]] for name in drawing.values)][:BARS]
        labels = [_label([row[at[name]] for name in drawing.label], zone) for row in used]
    if not used:
        return None
    series = [{"name": spoken(name), "values": [_number(row[at[name]]) for row in used]} for name in drawing.values]
    return Drawn(kind=drawing.kind, labels=labels, series=series, unit=drawing.unit)


_UNITS: Final = re.compile(r"_(bytes|percent|celsius|watts)(?=_|$)")


def spoken(name: str) -> str:
    """A column's name as people read it, without its unit, which the axis shows."""
    words = _UNITS.sub("", name).replace("_", " ").strip()
    words = re.sub(r"\bgpu\b", "GPU", words)
    return words[:1].upper() + words[1:]


def guess(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Drawing | None:
    """Choose a chart for any result: lines over its first time column, else bars by its first text column."""
    values = {name: [row[number] for row in rows[:200]] for number, name in enumerate(columns)}
    numbers = [name for name in columns if numeric(values[name]) and not _names_something(name)]
    if not numbers:
        return None
    times = [name for name in columns if any(isinstance(value, datetime) for value in values[name])]
    several = bool(times) and len({row[list(columns).index(times[0])] for row in rows[:200]}) == len(rows[:200])
    unit = _unit(numbers[0])
    if times and several and len(rows) > 1:
        alike = tuple(name for name in numbers if _unit(name) == unit)[:_LINES]
        return Drawing(kind="line", label=(times[0],), values=alike, unit=unit)
    texts = [name for name in columns if all(isinstance(value, str) for value in values[name] if value is not None)]
    if texts and len(rows) > 1:
        return Drawing(kind="bar", label=(texts[0],), values=(numbers[0],), unit=unit)
    return None


def _names_something(name: str) -> bool:
    """True if the numbers of a column are names, such as process ids, whose size says nothing."""
    return name in ("pid", "gpu", "index", "rank", "attempt", "exit_code", "last_xid") or name.endswith("_id")


def _unit(name: str) -> str:
    for suffix, unit in (("bytes", "bytes"), ("percent", "percent"), ("celsius", "celsius"), ("watts", "watts")):
        if suffix in name:
            return unit
    return ""


def _epoch_seconds(time: datetime) -> float:
    """Epoch seconds of a time; one without a zone is in UTC, as the history's are."""
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _label(values: Sequence[Any], zone: tzinfo) -> str:
    texts = [str(cell(value, zone)) for value in values if value not in (None, "")]
    # The beginning of a UUID is enough to distinguish devices.
    return " · ".join(text[:12] + "…" if text.startswith("GPU-") and len(text) > 16 else text for text in texts) or "–"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else None
