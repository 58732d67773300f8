"""A usage report as titled tables of text, which all its forms share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Final

from msgspec import Struct

from ...schemas.values.units import format_bytes, format_seconds
from ..notebook import short_model
from .usage import Row, UsageReport, Waste
from .usage_sql import By

NONE: Final = "–"
SHORT_LABEL: Final = 34
"""Characters that a label of a chart has at most."""


class Section(Struct, frozen=True, kw_only=True):
    """A table with its title.

    Attributes:
        title: above it.
        columns: their names.
        numbers: indexes of the columns that are aligned right.
        rows: texts of the cells.
        total: last row, over all others; empty without one.
        note: sentence below it; may be empty.
        nothing: sentence in place of a table without rows.
    """

    title: str
    columns: list[str]
    numbers: list[int]
    rows: list[list[str]]
    total: list[str] = []
    note: str = ""
    nothing: str = "None."


_Cell = tuple[str, Callable[[Row], str]]


def title(report: UsageReport) -> str:
    """Title of the report."""
    return f"GPU usage, {report.scope.period.name}"


def subtitle(report: UsageReport) -> str:
    """Times of the period, its zone, and what the report is restricted to."""
    period, filters = report.scope.period, report.scope.filters
    times = " to ".join(f"{at.astimezone(period.rules):%Y-%m-%d %H:%M}" for at in (period.start, period.end))
    narrowed = [
        f"{name} {value}"
        for name, value in (("group", filters.group), ("owner", filters.owner), ("model", filters.model))
        if value is not None
    ]
    running = ", the period is not over yet" if report.scope.until else ""
    return ", ".join([f"{times} ({period.zone}{running})", *narrowed])


def summary(report: UsageReport) -> list[tuple[str, str]]:
    """The total as names and values."""
    total, prices = report.total, report.prices
    known = total.active_gpu_hours + total.idle_gpu_hours
    waits = [NONE if wait is None else seconds(wait) for wait in (total.wait_p50_seconds, total.wait_p95_seconds)]
    found = [
        ("GPU-hours granted", hours(total.granted_gpu_hours)),
        ("Active", f"{hours(total.active_gpu_hours)} ({percent(total.active_gpu_hours, known)})"),
        ("Idle", f"{hours(total.idle_gpu_hours)} ({percent(total.idle_gpu_hours, known)})"),
        ("GPU-hours asked", hours(total.asked_gpu_hours)),
        ("Energy", NONE if total.energy_kwh is None else f"{hours(total.energy_kwh)} kWh"),
        ("Leases", f"{total.leases:,}"),
        ("Requests", f"{total.requests:,}, rejected {total.rejected:,}"),
        ("Wait, median and 95%", f"{waits[0]}, {waits[1]}"),
        ("Preemptions", f"{total.preemptions:,}"),
    ]
    return [("Cost", f"{money(total.cost)} {prices.currency}"), *found] if prices is not None else found


def sections(report: UsageReport) -> list[Section]:
    """The tables of a report: usage, requests, waste, price list."""
    found = [_usage(report), _requests(report), _waste(report)]
    return [*found, _prices(report)] if report.prices is not None else found


def notes(report: UsageReport) -> list[str]:
    """Notes on the numbers for the reader."""
    found = [
        "Leases are cut at the ends of the period. Idle is a minute below 5% utilization; minutes without samples "
        "are unknown, and in no percentage of idle time. GPU-hours are in whole boards."
    ]
    if report.prices is not None:
        found.append(
            "The cost is that of the granted GPU-hours"
            + (" and of the energy" if report.prices.energy_kwh is not None else "")
            + ", rounded once for each group, owner and model."
        )
    if report.unpriced:
        models = ", ".join(f"{one.model or '(unknown)'} ({hours(one.granted_gpu_hours)} h)" for one in report.unpriced)
        found.append(f"No price, and in no cost: {models}.")
    return found


def hours(amount: Decimal) -> str:
    """GPU-hours or kWh, with thousands separated."""
    return f"{amount:,}"


def money(amount: Decimal | None) -> str:
    """An amount of money, with thousands separated; a dash if there is no price."""
    return NONE if amount is None else f"{amount:,}"


def percent(part: Decimal, whole: Decimal) -> str:
    """A part as a percentage; a dash of nothing."""
    return f"{100 * part / whole:.0f}%" if whole else NONE


def seconds(amount: Decimal | None) -> str:
    """A duration; a dash if it is unknown."""
    return NONE if amount is None else format_seconds(float(amount))


def label(row: Row, by: Sequence[By]) -> list[str]:
    """Labels of a row: a text for each column that the rows are by."""
    return [getattr(row, one.value) or "(none)" for one in by]


def short_label(row: Row, by: Sequence[By]) -> str:
    """Label of a row for a chart: each part short enough that the others can be read, too."""
    parts = label(row, by)
    room = SHORT_LABEL - 3 * (len(parts) - 1)
    shown = [short_model(part) if one is By.MODEL else part for one, part in zip(by, parts, strict=True)]
    while sum(map(len, shown)) > room:
        at = max(range(len(shown)), key=lambda at: len(shown[at]))
        # Of groups within groups the last names say more than the first.
        shown[at] = f"…{shown[at][2:]}" if by[at] is By.GROUP else f"{shown[at][:-2]}…"
    return " · ".join(shown)


def _usage(report: UsageReport) -> Section:
    cells: list[_Cell] = [
        ("leases", lambda row: f"{row.leases:,}"),
        ("granted GPU-h", lambda row: hours(row.granted_gpu_hours)),
        ("active GPU-h", lambda row: hours(row.active_gpu_hours)),
        ("idle GPU-h", lambda row: hours(row.idle_gpu_hours)),
        ("unknown GPU-h", lambda row: hours(row.unknown_gpu_hours)),
        ("idle %", lambda row: percent(row.idle_gpu_hours, row.active_gpu_hours + row.idle_gpu_hours)),
        ("energy kWh", lambda row: NONE if row.energy_kwh is None else hours(row.energy_kwh)),
    ]
    if report.prices is not None:
        if report.prices.energy_kwh is not None:
            cells.append((f"GPUs {report.prices.currency}", lambda row: money(row.gpu_cost)))
            cells.append((f"energy {report.prices.currency}", lambda row: money(row.energy_cost)))
        cells.append((f"cost {report.prices.currency}", lambda row: money(row.cost)))
    return _by_row(
        "Usage", report, [row for row in report.rows if row.leases], cells, nothing="No leases in this period."
    )


def _requests(report: UsageReport) -> Section:
    cells: list[_Cell] = [
        ("requests", lambda row: f"{row.requests:,}"),
        ("granted", lambda row: f"{row.granted:,}"),
        ("rejected", lambda row: f"{row.rejected:,}"),
        ("timed out", lambda row: f"{row.timed_out:,}"),
        ("withdrawn", lambda row: f"{row.withdrawn:,}"),
        ("asked GPU-h", lambda row: hours(row.asked_gpu_hours)),
        ("open-ended", lambda row: f"{row.open_ended:,}"),
        ("mean wait", lambda row: seconds(row.wait_mean_seconds)),
        ("median wait", lambda row: seconds(row.wait_p50_seconds)),
        ("95% wait", lambda row: seconds(row.wait_p95_seconds)),
        ("preemptions", lambda row: f"{row.preemptions:,}"),
        ("lost GPU-h", lambda row: hours(row.lost_gpu_hours)),
    ]
    rows = [row for row in report.rows if row.requests or row.preemptions]
    rows.sort(key=lambda row: -row.requests)
    note = "Requests that ended in the period. Asked GPU-hours are those with an expected, estimated or longest time."
    return _by_row("Requests", report, rows, cells, note, nothing="No requests ended in this period.")


def _by_row(
    name: str, report: UsageReport, rows: Sequence[Row], cells: Sequence[_Cell], note: str = "", *, nothing: str
) -> Section:
    by = report.scope.by
    return Section(
        title=name,
        columns=[*(one.value for one in by), *(column for column, _ in cells)],
        numbers=list(range(len(by), len(by) + len(cells))),
        rows=[[*label(row, by), *(cell(row) for _, cell in cells)] for row in rows],
        total=["Total", *[""] * (len(by) - 1), *(cell(report.total) for _, cell in cells)],
        note=note,
        nothing=nothing,
    )


def _waste(report: UsageReport) -> Section:
    currency = [f"idle {report.prices.currency}"] if report.prices is not None else []
    columns = ["lease", "owner", "workload", "model", "granted GPU-h", "idle GPU-h", *currency, "had", "enough"]
    return Section(
        title="Most idle leases",
        columns=columns,
        numbers=list(range(4, 6 + len(currency))),
        rows=[
            [
                one.lease_id,
                one.owner,
                one.name or NONE,
                ", ".join(one.models),
                hours(one.granted_gpu_hours),
                hours(one.idle_gpu_hours),
                *([money(one.idle_cost)] if currency else []),
                _devices(one.devices, one.memory_granted_bytes or None),
                enough(one),
            ]
            for one in report.waste
        ],
        note="Enough is the request that would have done: GPUs with a minute that was not idle, and the peak of their "
        "memory plus a tenth.",
        nothing="No idle leases in this period.",
    )


def enough(one: Waste) -> str:
    """The request that would have done."""
    if one.enough_gpus is None:
        return NONE
    return _devices(one.enough_gpus, one.enough_memory_bytes) if one.enough_gpus else "no GPU"


def _devices(count: int, memory: int | None) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}" + (f" with {format_bytes(memory)}" if memory else "")


def _prices(report: UsageReport) -> Section:
    assert report.prices is not None
    prices = [*report.prices.gpu_hour.items()]
    energy = [["kWh", f"{report.prices.energy_kwh:,}"]] if report.prices.energy_kwh is not None else []
    return Section(
        title="Prices",
        columns=["GPU-hour of", report.prices.currency],
        numbers=[1],
        rows=[*([glob, f"{price:,}"] for glob, price in prices), *energy],
        note="Of several patterns that match a model the first counts.",
    )
