"""Columns of rollups beyond the aggregates of single metrics: known time, throttling, and idle minutes of a device.

A sample stands for the median time between two samples of its bucket. So a gap counts for nothing, and a change of the
interval does not affect what was before.

Samples of a throttled device are counted at each level, by NVML's clock event reasons. Each hour keeps bitmasks of its
idle minutes and of its known minutes. With these a lease that begins and ends anywhere is cut out of its hours exactly,
and idle stretches are found across hours, without reading the minutes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from msgspec import Struct

HEAT: Final = 0x20 | 0x40
"""Software and hardware thermal slowdown (nvml.h, `nvmlClocksEventReason…`)."""
POWER: Final = 0x04 | 0x80
"""The power cap, and the power brake."""
SLOWDOWN: Final = 0x08
"""Hardware slowdown: heat or power, as the board says."""
HELD_BACK: Final = HEAT | POWER | SLOWDOWN

IDLE_PERCENT: Final = 5
"""A minute is idle if the device's mean utilization in it is below this."""

ALL_MINUTES: Final = 2**60 - 1
"""The bits of an hour's minutes; bit 0 is the first."""

KNOWN: Final = "known_seconds"
MASK: Final = "throttle_reasons_bitmask"
REASONS: Final = {
    "throttled_samples": HELD_BACK,
    "throttled_thermal_samples": HEAT,
    "throttled_power_samples": POWER,
    "throttled_slowdown_samples": SLOWDOWN,
}
"""Columns that count throttled samples, with the reasons that each counts; the first counts all."""
_MEANINGS: Final = {
    "throttled_samples": "any of the reasons below",
    "throttled_thermal_samples": "reason 0x20 or 0x40: heat",
    "throttled_power_samples": "reason 0x04 or 0x80: the power limit or the power brake",
    "throttled_slowdown_samples": "reason 0x08: hardware slowdown",
}
CLOCKS: Final = ("sm_clock_megahertz", "sm_clock_max_megahertz")
_LOAD: Final = "gpu_utilization_percent"


class Derived(Struct, frozen=True):
    """A column of rollups that belongs to no single metric.

    Attributes:
        name: of the column.
        sql: its type.
        raw: its value over raw samples; empty where it is made from minutes only.
        merged: its value over the minutes of an hour.
        help: what it means.
    """

    name: str
    sql: str
    raw: str
    merged: str
    help: str


def known() -> list[Derived]:
    """Columns of minutes and hours with the time that their samples stand for."""
    times = "list_sort(list(epoch_us(time)))"
    # Zipped with itself from the second on. The last has no partner; the aggregate ignores its null.
    steps = f"list_transform(list_zip({times}, {times}[2:]), lambda p: p[2] - p[1])"
    usual = f"list_aggregate({steps}, 'quantile_disc', 0.5)"
    # A minute with three samples has a usable median: a gap is only between two of them. In an hour, other minutes
    # count with the mean time per sample of these; without any of these, with the median time between minutes.
    of_one = f"sum({KNOWN}) / sum(samples) FILTER ({KNOWN} IS NOT NULL)"
    return [
        Derived(
            KNOWN,
            "DOUBLE",
            f"CASE WHEN count(*) > 2 THEN count(*) * {usual} / 1e6 END",
            # DuckDB's `least` leaves nulls out: what is not known would be a whole hour.
            f"CASE WHEN {of_one} IS NOT NULL OR count(*) > 1 THEN least(coalesce(sum(samples) * {of_one}, "
            f"CASE WHEN count(*) > 1 THEN count(*) * {usual} / 1e6 END), 3600) END",
            "seconds that the samples stand for: their number times the usual time between two; null where they are "
            "too few to tell",
        )
    ]


def throttling(names: Collection[str]) -> list[Derived]:
    """Columns of every level for throttled samples, if these metrics are present."""
    if MASK not in names:
        return []
    found = [
        Derived(
            name,
            "UINTEGER",
            f"count(*) FILTER (({MASK} & {bits}) <> 0)::UINTEGER",
            f"sum({name})::UINTEGER",
            f"samples with {_MEANINGS[name]}",
        )
        for name, bits in REASONS.items()
    ]
    if all(name in names for name in CLOCKS):
        percent = f"100 * {CLOCKS[0]} / nullif({CLOCKS[1]}, 0)"
        held = f"FILTER (({MASK} & {HELD_BACK}) <> 0)"
        found += [
            Derived(
                "throttled_sm_clock_percent_sum",
                "DOUBLE",
                f"sum({percent}) {held}",
                "sum(throttled_sm_clock_percent_sum)",
                "of the clock of the samples held back, in percent of the highest clock",
            ),
            Derived(
                "throttled_sm_clock_percent_count",
                "UINTEGER",
                f"(count({percent}) {held})::UINTEGER",
                "sum(throttled_sm_clock_percent_count)::UINTEGER",
                "how many samples are in that sum",
            ),
        ]
    return found


def idleness(names: Collection[str]) -> list[Derived]:
    """Columns of hours for known and idle minutes, if these metrics are present."""
    if _LOAD not in names:
        return []
    bit = "(1::BIGINT << ((epoch_us(time) // 60000000) % 60)::INTEGER)"
    idle = f"{_LOAD}_sum / nullif({_LOAD}_count, 0) < {IDLE_PERCENT}"
    joules = [f"{name}" for metric, name in (
        ("energy_millijoules", "energy_millijoules_increase / 1e3"),
        ("power_watts", "60 * power_watts_sum / nullif(power_watts_count, 0)"),
    ) if metric in names]  # fmt: skip
    energy = f"sum(coalesce({', '.join(joules)})) FILTER ({idle})" if joules else "NULL::DOUBLE"
    return [
        Derived(
            "known_minutes_bitmask",
            "BIGINT",
            "",
            f"bit_or({bit}) FILTER ({_LOAD}_count > 0)",
            "bit m: the utilization in minute m of the hour is known",
        ),
        Derived(
            "idle_minutes_bitmask",
            "BIGINT",
            "",
            f"bit_or({bit}) FILTER ({idle})",
            f"bit m: the mean utilization in minute m of the hour was below {IDLE_PERCENT}%",
        ),
        Derived("idle_joules", "DOUBLE", "", energy, "energy of the idle minutes"),
    ]
