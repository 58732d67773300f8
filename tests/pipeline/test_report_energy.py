"""Energy in usage reports, against a computation of its own over the raw samples of a month."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
from corral.client.reports.asking import queries, scope_of
from corral.client.reports.periods import period_of
from corral.client.reports.usage_sql import By, Filters
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import Batch
from corral.processors.storage.embedded import rollups
from support.empty_history import new_database

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
EPOCH: Final = int(START.timestamp())
DAYS: Final = 31
EVERY: Final = 10
"""Seconds between two samples."""
MOST_MILLIJOULES: Final = 5_000_000
"""The most that a board's counter grows by in a second."""


def growth(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Increase at each reading since the one before, as `docs/counters.md` defines it for counters without glitches."""
    steps = np.diff(values)
    seconds = 60 * (np.diff(times // 60) + 1)
    small = values[1:] <= values[:-1] * np.where(seconds > 120, 0.99, 0.5)
    fell = np.where(small & (values[1:] <= MOST_MILLIJOULES * seconds), values[1:], 0)
    rose = np.where(steps <= MOST_MILLIJOULES * seconds, steps, 0)
    return np.concatenate([[0], np.where(steps >= 0, rose, fell)])


def by_minute(times: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """Sums of the minutes of the month."""
    return np.bincount((times - EPOCH) // 60, amounts.astype(float), DAYS * 1440)


def device(random: np.random.Generator, *, counts: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Samples of a device over the month, with silences, reboots and a load that changes; and its energy by minute.

    Args:
        random: source of all of it.
        counts: whether it has a counter of energy, or power alone.
    """
    times = np.arange(EPOCH, EPOCH + DAYS * 86400, EVERY)
    watts = np.repeat(random.integers(50, 700, times.size // 90 + 1), 90)[: times.size].astype(float)
    counter = 10**10 + np.concatenate([[0], np.cumsum(watts[:-1] * EVERY * 1000)])
    heard = np.ones(times.size, bool)
    for _ in range(40):  # silences of half a minute to ten hours; the driver is loaded anew in every second one
        begin, length = int(random.integers(100, times.size - 5000)), int(random.integers(3, 3600))
        heard[begin : begin + length] = False
        if random.random() < 0.5:
            counter[begin + length // 2 :] -= counter[begin + length // 2]
    # Without three samples in any of its minutes, an hour does not tell how long one of its samples stands for.
    in_minutes = np.bincount((times - EPOCH) // 60, heard, DAYS * 1440)
    heard &= (in_minutes.reshape(-1, 60).max(axis=1) >= 3)[(times - EPOCH) // 3600]
    times, watts, counter = times[heard], watts[heard], counter[heard].astype(np.int64)
    samples = {"time": times, "power_watts": watts.astype(np.float32)}
    if counts:
        return samples | {"energy_millijoules": counter}, by_minute(times, growth(times, counter))
    # Power alone: the mean of a minute's samples over the seconds that they cover.
    return samples, by_minute(times, watts * EVERY * 1000)


@pytest.mark.long
def test_energy_of_leases_is_that_of_the_raw_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    database = new_database(tmp_path)
    cursor = database.cursor()
    expected: dict[str, float] = {}
    for number, counts in enumerate((True, True, False, False)):
        name = f"g{number}"
        samples, energy = device(random, counts=counts)
        series = np.full(samples["time"].size, database.series.number("h1", name), np.int32)
        columns: dict[str, Any] = {"series": series, **samples, "time": samples["time"] * 10**6}
        table = pa.table({field.name: pa.nulls(series.size, field.type) for field in SCHEMA}, schema=SCHEMA)
        for column, values in columns.items():
            at = SCHEMA.get_field_index(column)
            field = SCHEMA.field(at)
            table = table.set_column(at, field, pa.array(values).cast(field.type))
        database.commit(Batch(stream="S", sequence=number + 1, samples=table))
        begin = int(random.integers(60, 3000))  # seconds
        for lease in range(30):
            end = begin + int(random.integers(300, 20 * 3600))
            share = float(random.choice([1.0, 0.5, 0.25]))
            owner = f"o{number}-{lease % 5}"
            first, last = (START + timedelta(seconds=at) for at in (begin, end))
            cursor.execute(
                "INSERT INTO leases BY NAME SELECT ? AS lease_id, ? AS owner, 'w' AS name, 'released' AS state, "
                "? AS granted_at, ? AS ended_at, ? AS expires_at",
                [f"{name}-{lease}", owner, first, last, last],
            )
            cursor.execute(
                "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, 'h1' AS host, ? AS device, 'H100' AS model, "
                "? AS share",
                [f"{name}-{lease}", name, share],
            )
            minutes = np.arange(begin // 60, (end - 1) // 60 + 1)
            held = np.minimum(end, (minutes + 1) * 60) - np.maximum(begin, minutes * 60)
            expected[owner] = expected.get(owner, 0.0) + share * float((energy[minutes] * held / 60).sum())
            begin = end + int(random.integers(0, 3000))
    cursor.execute("INSERT INTO hosts BY NAME SELECT 'h1' AS host, ? AS interval_seconds", [float(EVERY)])
    for level in rollups.LEVELS:
        rollups.refresh(database.cursor(), level, sorted(database.days))
    now = datetime(2026, 3, 1, tzinfo=UTC)
    about = scope_of(period_of("2026-01", "UTC", now), [By.OWNER], Filters(), now)
    cursor.execute(queries(about)["usage"])
    names = [column[0] for column in cursor.description]
    rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    found = {owner: sum(float(row["energy_mj"] or 0) for row in rows if row["owner"] == owner) for owner in expected}
    assert found == pytest.approx(expected, rel=1e-6)
    database.close()


def test_an_hour_of_two_samples_stands_for_no_more_than_their_minute(tmp_path: Path) -> None:
    database = new_database(tmp_path)
    series = database.series.number("h1", "g0")
    columns: dict[str, Any] = {
        "time": [START + timedelta(hours=1, seconds=at) for at in (3, 13)],
        "series": [series] * 2,
        "power_watts": [154.0] * 2,
    }
    table = pa.table([columns.get(field.name, [None] * 2) for field in SCHEMA], schema=SCHEMA)
    database.commit(Batch(stream="S", sequence=1, samples=table))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    assert cursor.execute("SELECT known_seconds FROM rollup_1h").fetchall() == [(None,)]
    end = START + timedelta(hours=3)
    cursor.execute(
        "INSERT INTO leases BY NAME SELECT 'l1' AS lease_id, 'ann' AS owner, 'released' AS state, ? AS granted_at, "
        "? AS ended_at, ? AS expires_at",
        [START, end, end],
    )
    cursor.execute(
        "INSERT INTO lease_devices BY NAME SELECT 'l1' AS lease_id, 'h1' AS host, 'g0' AS device, 1.0 AS share"
    )
    now = datetime(2026, 3, 1, tzinfo=UTC)
    cursor.execute(queries(scope_of(period_of("2026-01", "UTC", now), [By.OWNER], Filters(), now))["usage"])
    names = [column[0] for column in cursor.description]
    [row] = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    assert float(row["energy_mj"]) == 154_000 * 60
    assert cursor.execute("SELECT energy_kwh FROM lease_device_usage").fetchall() == [(154 * 60 / 3.6e6,)]
    database.close()
