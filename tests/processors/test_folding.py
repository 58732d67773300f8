"""Aggregates computed in numpy equal those of SQL, for every metric of the catalog."""

from __future__ import annotations

import math
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from corral.processors.storage.bucketing import Samples, buckets
from corral.processors.storage.folding import fold
from corral.processors.storage.rollup_columns import (
    FELL,
    MINUTE,
    TEN_SECONDS,
    Level,
    bin_of,
    binned,
    columns,
    counters,
    from_raw,
    is_linear,
)
from corral.schemas.metrics import METRICS

METRICS_LIST: Final = list(METRICS.values())
NUMBERS: Final = {metric.name: at for at, metric in enumerate(binned(METRICS_LIST))}
START: Final = 1_780_000_000 // 3600 * 3600
BELOW_HALF: Final = float(np.nextafter(np.float32(0.5), np.float32(0)))
KINDS: Final = {"<f4": np.float32, "<i4": np.int32, "<i8": np.int64}


def samples(dice: np.random.Generator, rows: int) -> pa.Table:
    """Samples of five devices in any order, with values that stand still, repeat, are null, or are anything."""
    moments = dice.choice(1_000_000, rows, replace=False) * dice.choice([250, 1000])
    found: dict[str, Any] = {"us": START * 1_000_000 + np.sort(moments), "series": dice.integers(0, 5, rows)}
    for metric in METRICS_LIST:
        dtype = KINDS[metric.row.unit.dtype]
        values = {
            0: np.full(rows, 7),
            1: dice.integers(0, 4, rows),
            2: dice.integers(0, 101, rows) + dice.choice([0.0, 0.5, 0.25, BELOW_HALF], rows),
            3: dice.integers(0, 300 if is_linear(metric) else 2**24, rows),
            4: np.sort(dice.integers(0, 300 if is_linear(metric) else 2**20, rows)),
        }[int(dice.integers(0, 5))].astype(dtype)
        lacking = dice.random(rows) < dice.choice([0.0, 0.0, 0.3, 0.97, 1.0])
        found[metric.name] = pa.array(values, mask=lacking)
    found["series"] = pa.array(found["series"], pa.int32())
    table = pa.table(found)
    return table if dice.random() < 0.3 else table.take(dice.permutation(rows))


@pytest.mark.parametrize("level", [TEN_SECONDS, MINUTE], ids=lambda level: level.name)
def test_numpy_aggregates_as_sql(level: Level) -> None:
    for rows in (50, 3000):
        check(level, samples(np.random.default_rng(rows), rows))


def check(level: Level, table: pa.Table) -> None:
    """Compare every column, and all bins."""
    taken = Samples(table)
    every = buckets(taken, level)
    closed = len(every.number) // 3
    order = np.random.default_rng(1).permutation(len(every.number))
    found = fold(taken, METRICS_LIST, level, NUMBERS, every.take(order), closed)
    width = level.seconds * 1_000_000
    connection = duckdb.connect(config={"threads": 1})
    connection.execute("SET TimeZone = 'UTC'")
    connection.register("arrow", table)
    connection.execute("CREATE TABLE raw AS SELECT make_timestamptz(us) AS time, * EXCLUDE us FROM arrow")
    expected = connection.execute(
        f"SELECT make_timestamptz(epoch_us(time) // {width} * {width}) AS time, series, "
        f"{from_raw(METRICS_LIST, level)} FROM raw GROUP BY epoch_us(time) // {width}, series ORDER BY series, time"
    ).to_arrow_table()
    assert found.rows.column_names == ["time", "series", *(name for name, _ in columns(METRICS_LIST, level))]
    rows = found.rows.sort_by([("series", "ascending"), ("time", "ascending")])
    for name in rows.column_names:
        if not name.endswith("_inner"):
            assert rows[name].type == expected[name].type, name
            for got, wanted in zip(rows[name].to_pylist(), expected[name].to_pylist(), strict=True):
                same = math.isclose(got, wanted, rel_tol=1e-9) if isinstance(wanted, float) and got else got == wanted
                assert same, (name, got, wanted)
    check_falls(rows, table, width)
    if found.bins is None:
        return
    keys = [set(zip(*(part[name].to_pylist() for name in ("time", "series")), strict=True)) for part in
            (found.rows[:closed], found.bins[: found.closed_bins], found.bins[found.closed_bins :])]  # fmt: skip
    assert keys[1] <= keys[0]
    assert not keys[2] & keys[0]
    for metric in binned(METRICS_LIST):
        counted = connection.execute(
            f"SELECT make_timestamptz(epoch_us(time) // {width} * {width}) AS at, series, {bin_of(metric)} AS bin, "
            f"count(*) FROM raw WHERE {metric.name} IS NOT NULL GROUP BY ALL"
        ).fetchall()
        of_it = found.bins.filter(pa.compute.equal(found.bins["metric"], NUMBERS[metric.name]))
        got = zip(*(of_it[name].to_pylist() for name in ("time", "series", "bin", "n")), strict=True)
        assert sorted(got) == sorted(counted), metric.name


def check_falls(rows: pa.Table, table: pa.Table, width: int) -> None:
    """The growth within a bucket is that from its first to its last value, unless the counter fell in between."""
    ordered = table.sort_by([("us", "ascending")])
    times, series = ordered["us"].to_pylist(), ordered["series"].to_pylist()
    at = {
        key: number for number, key in enumerate(zip(rows["series"].to_pylist(), rows["time"].to_pylist(), strict=True))
    }
    for metric in counters(METRICS_LIST):
        values: list[list[int]] = [[] for _ in at]
        places = {(number, time.timestamp() * 1e6 // width): index for (number, time), index in at.items()}
        for moment, number, value in zip(times, series, ordered[metric.name].to_pylist(), strict=True):
            if value is not None:
                values[places[number, moment // width]].append(value)
        expected = [None if not found else found[-1] - found[0] if found == sorted(found) else FELL for found in values]
        assert rows[f"{metric.name}_inner"].to_pylist() == expected, metric.name
