"""The usage report: what leases used in a period, and what that cost.

`Answers` of the history become a `UsageReport` by pure functions. Quantities and money are decimal and rounded once,
for each group, owner and model: rows and totals are sums of these, so that they agree whatever the rows are by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final

from msgspec import Struct

from .periods import Period, Slice
from .prices import Prices
from .usage_sql import By, Filters

WASTE: Final = 10
"""Leases of a report's list of waste."""
_HOUR_US: Final = 3_600_000_000
_KWH_MJ: Final = 3_600_000_000
_GIB: Final = 2**30
_NOTHING: Final = Decimal("0.000")

Cell = tuple[str, str, str]
"""Group, owner and model."""
Key = tuple[str, ...]
"""Values of what the rows are by; empty for the row over all."""


class Answers(Struct, frozen=True, kw_only=True):
    """Rows of the queries in `usage_sql`, as dictionaries."""

    usage: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    preemptions: list[dict[str, Any]]
    waste: list[dict[str, Any]]


class Scope(Struct, frozen=True, kw_only=True):
    """Scope of a report.

    Attributes:
        period: up to now at most.
        until: end of the period if that is not over yet, else None.
        by: what its rows are by.
        filters: restriction of all numbers.
        slices: of the period, for charts.
    """

    period: Period
    until: datetime | None
    by: list[By]
    filters: Filters
    slices: list[Slice]


class Row(Struct, frozen=True, kw_only=True):
    """Usage, cost and requests of a group, owner, model, or what else the rows are by.

    Attributes:
        group: name of the group; empty without one, null if the rows are not by group.
        owner: name of the owner; null if the rows are not by owner.
        model: product name of the devices; for requests without devices the patterns asked for, or `any`.
        leases: leases that held devices in the period.
        granted_gpu_hours: GPU-hours held, in whole boards.
        active_gpu_hours: of them, in minutes with a utilization of 5% or more.
        idle_gpu_hours: of them, in minutes below 5%.
        unknown_gpu_hours: of them, in minutes without samples.
        energy_kwh: energy of the devices, by the share held; null if nothing is known of it.
        gpu_cost: granted GPU-hours times their price; null if there is no price for any of them.
        energy_cost: energy times its price; null without one.
        cost: both together; null if there is no price.
        requests: requests that ended in the period: granted, rejected, timed out, or withdrawn.
        granted: number of granted ones.
        rejected: number of rejected ones.
        timed_out: number of those that waited in vain.
        withdrawn: number of those that their client withdrew or left.
        asked_gpu_hours: devices asked for times the expected duration, or the estimate, or the limit.
        open_ended: requests without any of these, which are not in `asked_gpu_hours`.
        wait_mean_seconds: mean wait of granted requests; null without any.
        wait_p50_seconds: median of the same.
        wait_p95_seconds: 95% quantile of the same.
        preemptions: preempted leases that ended in the period.
        lost_gpu_hours: GPU-hours of these since their work was last saved.
    """

    group: str | None = None
    owner: str | None = None
    model: str | None = None
    leases: int = 0
    granted_gpu_hours: Decimal = _NOTHING
    active_gpu_hours: Decimal = _NOTHING
    idle_gpu_hours: Decimal = _NOTHING
    unknown_gpu_hours: Decimal = _NOTHING
    energy_kwh: Decimal | None = None
    gpu_cost: Decimal | None = None
    energy_cost: Decimal | None = None
    cost: Decimal | None = None
    requests: int = 0
    granted: int = 0
    rejected: int = 0
    timed_out: int = 0
    withdrawn: int = 0
    asked_gpu_hours: Decimal = _NOTHING
    open_ended: int = 0
    wait_mean_seconds: Decimal | None = None
    wait_p50_seconds: Decimal | None = None
    wait_p95_seconds: Decimal | None = None
    preemptions: int = 0
    lost_gpu_hours: Decimal = _NOTHING


class Bar(Struct, frozen=True, kw_only=True):
    """GPU-hours of a slice of the period, for a chart; see `Row`."""

    name: str
    active_gpu_hours: Decimal
    idle_gpu_hours: Decimal
    unknown_gpu_hours: Decimal


class Waste(Struct, frozen=True, kw_only=True):
    """A lease with idle GPUs, and the request that would have done.

    Attributes:
        lease_id: id of the lease.
        group: group of the owner at the grant; empty without one.
        owner: its owner.
        name: name of the workload.
        models: product names of the devices.
        devices: devices that it held in the period.
        granted_gpu_hours: GPU-hours held in the period.
        idle_gpu_hours: of them, below 5%.
        idle_cost: cost of the idle GPU-hours, without energy; null if there is no price.
        enough_gpus: devices that had a minute that was not idle; null if it is not known of all of them.
        memory_granted_bytes: memory granted on a device; 0 if none was requested.
        enough_memory_bytes: the peak of a device in the period plus a tenth, rounded up to whole GiB; null if unknown.
    """

    lease_id: str
    group: str
    owner: str
    name: str
    models: list[str]
    devices: int
    granted_gpu_hours: Decimal
    idle_gpu_hours: Decimal
    idle_cost: Decimal | None
    enough_gpus: int | None
    memory_granted_bytes: int
    enough_memory_bytes: int | None


class Unpriced(Struct, frozen=True, kw_only=True):
    """A model that has no price, with its GPU-hours, which are in no cost."""

    model: str
    granted_gpu_hours: Decimal


class UsageReport(Struct, frozen=True, kw_only=True):
    """Usage of a period.

    Attributes:
        scope: what it is about.
        prices: price list; None without one.
        rows: by what the scope says, the highest cost first, then the most GPU-hours.
        total: over all rows.
        bars: GPU-hours by slice of the period.
        waste: leases with the most idle GPU-hours.
        unpriced: models in use without a price; empty without a price list.
    """

    scope: Scope
    prices: Prices | None
    rows: list[Row]
    total: Row
    bars: list[Bar]
    waste: list[Waste]
    unpriced: list[Unpriced]


class _Used(Struct):
    """Sum of amounts that are rounded."""

    granted: Decimal = _NOTHING
    active: Decimal = _NOTHING
    idle: Decimal = _NOTHING
    unknown: Decimal = _NOTHING
    energy: Decimal | None = None
    gpu_cost: Decimal | None = None
    energy_cost: Decimal | None = None

    def add(self, other: _Used) -> None:
        self.granted += other.granted
        self.active += other.active
        self.idle += other.idle
        self.unknown += other.unknown
        self.energy = plus(self.energy, other.energy)
        self.gpu_cost = plus(self.gpu_cost, other.gpu_cost)
        self.energy_cost = plus(self.energy_cost, other.energy_cost)


def plus(one: Decimal | None, other: Decimal | None) -> Decimal | None:
    """Sum of two amounts of which any may be unknown; None if both are."""
    return other if one is None else one if other is None else one + other


def usage_report(scope: Scope, prices: Prices | None, answers: Answers) -> UsageReport:
    """Build the report from the history's answers."""
    cells = {cell: _used(cell[2], rows, prices) for cell, rows in _by_cell(answers.usage).items()}
    sums: dict[Key, _Used] = defaultdict(_Used)
    for cell, used in cells.items():
        sums[_key(cell, scope.by)].add(used)
        sums[()].add(used)
    others = {
        name: {_key_of(row, scope.by): row for row in rows}
        for name, rows in (
            ("leases", answers.leases), ("requests", answers.requests), ("preemptions", answers.preemptions)
        )
    }  # fmt: skip
    keys = sorted({*sums, *(key for rows in others.values() for key in rows)} - {()})
    rows = [_row(scope.by, key, sums[key], others) for key in keys]
    rows.sort(key=lambda row: (-(row.cost or 0), -row.granted_gpu_hours))
    unpriced: dict[str, Decimal] = defaultdict(Decimal)
    for (_, _, model), used in cells.items():
        if prices is not None and used.gpu_cost is None:
            unpriced[model] += used.granted
    return UsageReport(
        scope=scope,
        prices=prices,
        rows=rows,
        total=_row((), (), sums[()], others),
        bars=_bars(scope.slices, answers.usage),
        waste=_waste(answers.waste, prices),
        unpriced=[Unpriced(model=model, granted_gpu_hours=hours) for model, hours in sorted(unpriced.items())],
    )


def _by_cell(rows: Iterable[Mapping[str, Any]]) -> dict[Cell, list[Mapping[str, Any]]]:
    found: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["group_name"], row["owner"], row["model"]].append(row)
    return found


def _used(model: str, rows: Sequence[Mapping[str, Any]], prices: Prices | None) -> _Used:
    """Rounded amounts of one group, owner and model; the cost is that of the rounded amounts."""
    granted, known, idle = (gpu_hours(_sum(rows, name)) for name in ("granted_us", "known_us", "idle_us"))
    energies = [row["energy_mj"] for row in rows if row["energy_mj"] is not None]
    energy = _thousandths(sum(energies), _KWH_MJ) if energies else None
    used = _Used(granted=granted, active=known - idle, idle=idle, unknown=granted - known, energy=energy)
    if prices is not None and (price := prices.price(model)) is not None:
        used.gpu_cost = prices.rounded(granted * price)
    if prices is not None and prices.energy_kwh is not None and energy is not None:
        used.energy_cost = prices.rounded(energy * prices.energy_kwh)
    return used


def _sum(rows: Iterable[Mapping[str, Any]], name: str) -> int:
    return sum(row[name] or 0 for row in rows)


def gpu_hours(microseconds: int) -> Decimal:
    """GPU-hours of GPU-microseconds, rounded to thousandths."""
    return _thousandths(microseconds, _HOUR_US)


def _thousandths(amount: int, unit: int) -> Decimal:
    return Decimal((2000 * amount + unit) // (2 * unit)).scaleb(-3)


def _key(cell: Cell, by: Sequence[By]) -> Key:
    values = dict(zip((By.GROUP, By.OWNER, By.MODEL), cell, strict=True))
    return tuple(values[one] for one in by)


def _key_of(row: Mapping[str, Any], by: Sequence[By]) -> Key:
    names = {By.GROUP: "group_name", By.OWNER: "owner", By.MODEL: "model"}
    return () if row["total"] else tuple(row[names[one]] or "" for one in by)


def _row(by: Sequence[By], key: Key, used: _Used, others: Mapping[str, Mapping[Key, Mapping[str, Any]]]) -> Row:
    asked = others["requests"].get(key, {})
    ended = others["preemptions"].get(key, {})
    granted: int = asked.get("granted", 0)
    return Row(
        **{one.value: value for one, value in zip(by, key, strict=True)},
        leases=others["leases"].get(key, {}).get("leases", 0),
        granted_gpu_hours=used.granted,
        active_gpu_hours=used.active,
        idle_gpu_hours=used.idle,
        unknown_gpu_hours=used.unknown,
        energy_kwh=used.energy,
        gpu_cost=used.gpu_cost,
        energy_cost=used.energy_cost,
        cost=plus(used.gpu_cost, used.energy_cost),
        requests=asked.get("requests", 0),
        granted=granted,
        rejected=asked.get("rejected", 0),
        timed_out=asked.get("timed_out", 0),
        withdrawn=asked.get("withdrawn", 0),
        asked_gpu_hours=gpu_hours(asked.get("asked_us") or 0),
        open_ended=asked.get("open_ended", 0),
        wait_mean_seconds=_seconds(asked["waits_us"], granted) if granted else None,
        wait_p50_seconds=_seconds(asked["wait_p50_us"], 1) if granted else None,
        wait_p95_seconds=_seconds(asked["wait_p95_us"], 1) if granted else None,
        preemptions=ended.get("preemptions", 0),
        lost_gpu_hours=gpu_hours(ended.get("lost_us") or 0),
    )


def _seconds(microseconds: int, count: int) -> Decimal:
    return (Decimal(microseconds) / (count * 10**6)).quantize(Decimal("0.1"), ROUND_HALF_UP)


def _bars(slices: Sequence[Slice], rows: Iterable[Mapping[str, Any]]) -> list[Bar]:
    by_slice: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_slice[row["slice"]].append(row)
    found: list[Bar] = []
    for at, one in enumerate(slices):
        granted, known, idle = (
            gpu_hours(_sum(by_slice[at], name)) for name in ("granted_us", "known_us", "idle_us")
        )  # fmt: skip
        found.append(
            Bar(
                name=one.name,
                active_gpu_hours=known - idle,
                idle_gpu_hours=idle,
                unknown_gpu_hours=granted - known,
            )
        )
    return found


def _waste(rows: Iterable[Mapping[str, Any]], prices: Prices | None) -> list[Waste]:
    by_lease: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_lease[row["lease_id"]].append(row)
    found = [_wasted(lease_id, rows, prices) for lease_id, rows in by_lease.items()]
    return sorted(found, key=lambda one: (-one.idle_gpu_hours, one.lease_id))


def _wasted(lease_id: str, rows: Sequence[Mapping[str, Any]], prices: Prices | None) -> Waste:
    devices = _sum(rows, "devices")
    cost: Decimal | None = None
    for row in rows:
        if prices is not None and (price := prices.price(row["model"])) is not None:
            cost = plus(cost, prices.rounded(gpu_hours(row["idle_us"]) * price))
    all_known = _sum(rows, "known") == devices
    peaks = [row["memory"] for row in rows]
    peak = max(peaks) if all_known and None not in peaks else None
    return Waste(
        lease_id=lease_id,
        group=rows[0]["group_name"],
        owner=rows[0]["owner"],
        name=rows[0]["name"] or "",
        models=[row["model"] for row in rows],
        devices=devices,
        granted_gpu_hours=gpu_hours(_sum(rows, "granted_us")),
        idle_gpu_hours=gpu_hours(_sum(rows, "idle_us")),
        idle_cost=cost,
        enough_gpus=_sum(rows, "busy") if all_known else None,
        memory_granted_bytes=max(row["memory_granted"] or 0 for row in rows),
        enough_memory_bytes=None if peak is None else -(-11 * round(peak) // (10 * _GIB)) * _GIB,
    )
