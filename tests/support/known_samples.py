"""Samples whose answers are known by arithmetic."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
from corral.processors.storage.embedded.database import Database
from corral.schemas.metrics import METRICS

GIB = 2**30


HOUR = timedelta(hours=1)


NOW = datetime.now(UTC).replace(microsecond=0)


BASE = NOW.replace(minute=0, second=0) - 3 * HOUR
"""An hour at which the leases begin; samples begin a quarter before."""


def g0(at: timedelta) -> dict[str, float | None]:
    """No energy counter. Busy at 80% and 300 W for half an hour, then idle at 60 W; hot from 0:10 to 0:20."""
    busy = timedelta() <= at < HOUR / 2
    hot = timedelta(minutes=10) <= at < timedelta(minutes=20)
    return {
        "gpu_utilization_percent": 80 if busy else 0,
        "memory_used_bytes": 20 * GIB if busy else 1 * GIB,
        "memory_total_bytes": 80 * GIB,
        "power_watts": 300 if busy else 60,
        "temperature_celsius": 90 if hot else 60,
        "throttle_reasons_bitmask": 0x40 if hot else 0x4 if busy else 0x1,
        "sm_clock_megahertz": 1000 if busy else 2000,
        "sm_clock_max_megahertz": 2000,
        "remapped_rows_corrected_count": 0,
        "remapped_rows_uncorrected_count": 3 if at >= HOUR else 0,
        "ecc_uncorrected_count": 5 if at >= HOUR else 4,
    }


def g1(at: timedelta) -> dict[str, float | None]:
    """With an energy counter at a steady 100 W; idle all the time, and nothing is known between 1:00 and 1:10."""
    unknown = HOUR <= at < HOUR + timedelta(minutes=10)
    return {
        "gpu_utilization_percent": None if unknown else 0,
        "memory_used_bytes": 70 * GIB,
        "memory_total_bytes": 80 * GIB,
        "power_watts": 1,
        "energy_millijoules": 10_000_000 + int(at.total_seconds()) * 100_000,
        "temperature_celsius": 40,
        "throttle_reasons_bitmask": 0,
    }


def samples(database: Database) -> pa.Table:
    times, series = [], []
    columns: dict[str, list[Any]] = {name: [] for name in METRICS}
    for device, values in (("g0", g0), ("g1", g1)):
        number = database.series.number("h1", device)
        for second in range(-900, 7200, 10):
            row = values(timedelta(seconds=second))
            times.append(BASE + timedelta(seconds=second))
            series.append(number)
            for name, column in columns.items():
                column.append(row.get(name))
    types = {"FLOAT": pa.float32(), "BIGINT": pa.int64(), "INTEGER": pa.int32()}
    return pa.table(
        {
            "time": pa.array(times, pa.timestamp("us", "UTC")),
            "series": pa.array(series, pa.int32()),
            **{name: pa.array(column, types[METRICS[name].row.unit.sql]) for name, column in columns.items()},
        }
    )
