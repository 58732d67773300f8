"""Columns that follow from others are left out of the tables of rollups, and nobody who reads these can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from corral.processors.ingest.columnar import SCHEMA, TIME_TYPE
from corral.processors.storage import Batch, Database
from corral.processors.storage.bucketing import Samples, buckets
from corral.processors.storage.embedded.rollups import LEVELS, MINUTE, TEN_SECONDS, Level, Rollups
from corral.processors.storage.folding import fold
from corral.processors.storage.rollup_columns import binned, columns, counters
from corral.processors.storage.rollup_omission import following
from corral.processors.storage.rollup_restoring import restored
from corral.schemas.metrics import METRICS
from support.empty_history import new_database

METRICS_LIST: Final = list(METRICS.values())
NUMBERS: Final = {metric.name: at for at, metric in enumerate(binned(METRICS_LIST))}
START: Final = 1_780_000_000 // 3600 * 3600
KINDS: Final = {"<f4": np.float32, "<i4": np.int32, "<i8": np.int64}
LOAD: Final = "gpu_utilization_percent"
ENERGY: Final = "energy_millijoules"


def rows(dice: np.random.Generator, level: Level, count: int) -> pa.Table:
    """Folded rows of all metrics: of each metric all values stand still, or all buckets, or none, and some are null."""
    found: dict[str, Any] = {
        "us": START * 1_000_000 + np.sort(dice.choice(count * 100, count, replace=False)) * 20_000,
        "series": pa.array(dice.integers(0, 3, count), pa.int32()),
    }
    for metric in METRICS_LIST:
        values = [
            np.full(count, 7),
            (found["us"] // (level.seconds * 1_000_000)) % 50,
            dice.integers(0, 50, count),
            np.sort(dice.integers(0, 50, count)),
            np.full(count, 0),
        ][int(dice.integers(0, 5))].astype(KINDS[metric.row.unit.dtype])
        found[metric.name] = pa.array(values, mask=dice.random(count) < dice.choice([0.0, 0.0, 0.1, 0.97, 1.0]))
    samples = Samples(pa.table(found))
    every = buckets(samples, level)
    table = fold(samples, METRICS_LIST, level, NUMBERS, every, len(every.number)).rows
    for metric in counters(METRICS_LIST):
        name = f"{metric.name}_increase"
        last, inner = table[f"{metric.name}_last"], table[f"{metric.name}_inner"].fill_null(0).to_numpy()
        step = [np.zeros(len(last)), dice.integers(0, 3, len(last))][int(dice.integers(0, 2))].astype(np.int64)
        lacking = last.is_null().to_numpy() | (dice.random(len(last)) < dice.choice([0.0, 0.0, 0.1]))
        grown = pa.array(np.maximum(inner, 0) + step, last.type, mask=lacking)
        table = table.set_column(table.column_names.index(name), name, grown)
    return table


@pytest.mark.parametrize("level", [TEN_SECONDS, MINUTE], ids=lambda level: level.name)
def test_what_is_left_out_is_restored(level: Level) -> None:
    connection = duckdb.connect(config={"threads": 1})
    connection.execute("SET TimeZone = 'UTC'")
    names = ["time", "series", *(name for name, _ in columns(METRICS_LIST, level))]
    omitted: set[str] = set()
    for seed in range(12):
        dice = np.random.default_rng(seed)
        # 20 values and more in 10 s, whose p95 is not the greatest, or a few.
        full = rows(dice, level, int(dice.choice([60, 900])))
        connection.register("whole", full)
        connection.execute("CREATE OR REPLACE TABLE stored AS FROM whole LIMIT 0")
        # Some rows as an older version has written them, beside others.
        cut = full.num_rows // 2
        connection.register("old", full[:cut])
        connection.execute("INSERT INTO stored BY NAME FROM old")
        without = following(full[cut:], METRICS_LIST)
        omitted |= without
        kept = [name for name in names if name not in without]
        connection.register("fresh", full[cut:].select(kept))
        connection.execute("INSERT INTO stored BY NAME FROM fresh")
        values = restored(METRICS_LIST)
        picked = ", ".join(f"{values.get(name, name)} AS {name}" for name in names)
        found = connection.execute(f"SELECT {picked} FROM stored ORDER BY series, time").to_arrow_table()
        expected = connection.execute(f"SELECT {', '.join(names)} FROM whole ORDER BY series, time").to_arrow_table()
        for name in names:
            assert found.schema.field(name).type == expected.schema.field(name).type, name
            assert found[name].equals(expected[name]), (seed, name)
    kinds = {name.rsplit("_", 1)[-1] for name in omitted}
    assert {"min", "max", "any", "p95", "sum", "first", "inner", "increase", "samples"} == kinds


def store(database: Database, sequence: int, moments: list[float], values: dict[str, list[Any]]) -> None:
    """Store samples of one device."""
    found: dict[str, Any] = {field.name: pa.nulls(len(moments), field.type) for field in SCHEMA}
    found["time"] = pa.array([int((START + at) * 1_000_000) for at in moments], pa.int64()).cast(TIME_TYPE)
    found["series"] = pa.array([database.series.number("h", "d")] * len(moments), pa.int32())
    for name, column in values.items():
        found[name] = pa.array(column, SCHEMA.field(name).type)
    database.commit(Batch(stream="S", sequence=sequence, samples=pa.table(found, SCHEMA)))


def check(database: Database, growth: int) -> None:
    """Compare the views with SQL over the raw samples."""
    cursor = database.cursor()
    for level in LEVELS[:2]:
        bucket = f"time_bucket(INTERVAL '{level.seconds} seconds', time)"
        expected = cursor.execute(
            f"SELECT {bucket} AS at, count(*), count({LOAD}), min({LOAD}), max({LOAD}), avg({LOAD}), "
            f"quantile_disc({LOAD}, 0.95), arg_max({LOAD}, time), arg_max({ENERGY}, time) FROM samples GROUP BY 1 "
            "ORDER BY 1"
        ).fetchall()
        found = cursor.execute(
            f"SELECT time, samples, {LOAD}_count, {LOAD}_min, {LOAD}_max, {LOAD}_mean, {LOAD}_p95, {LOAD}_last, "
            f"{ENERGY}_last FROM rollup_{level.name} ORDER BY time"
        ).fetchall()
        assert found == expected, level.name
    for level in LEVELS:
        (grown,) = cursor.execute(f"SELECT sum({ENERGY}_increase) FROM rollup_{level.name}").fetchall()
        assert grown == (growth,), level.name


def test_a_column_is_added_when_a_row_first_needs_it(tmp_path: Path) -> None:
    database, kept = new_database(tmp_path), Rollups()

    def refresh() -> set[str]:
        kept.refresh(database.cursor(), LEVELS, sorted(database.days))
        described = database.cursor().execute("FROM store.rollup_10s LIMIT 0").description or []
        return {row[0] for row in described}

    # All stands still.
    still = list(map(float, range(0, 40, 2)))
    store(database, 1, still, {LOAD: [50.0] * 20, ENERGY: [1000] * 20})
    have = refresh()
    assert f"{LOAD}_last" in have
    assert have.isdisjoint({f"{LOAD}_{part}" for part in ("min", "max", "p95", "sum")})
    check(database, 0)
    # The counter grows between two buckets, and stands still in each.
    store(database, 2, [float(at) for at in range(40, 60, 2)], {LOAD: [50.0] * 10, ENERGY: [1000] * 5 + [1500] * 5})
    assert f"{LOAD}_min" not in refresh()
    check(database, 500)
    # 25 values in 10 s, of which some are missing; the counter rises within the bucket.
    moments = [60 + at * 0.4 for at in range(50)]
    loads = [None if at % 7 == 0 else float(at * 37 % 50) for at in range(50)]
    store(database, 3, moments, {LOAD: loads, ENERGY: list(range(1500, 2000, 10))})
    assert {f"{LOAD}_{part}" for part in ("min", "max", "p95", "sum")} <= refresh()
    check(database, 990)
    # A sample that is late changes a bucket that had left all out, and the growth of the next.
    store(database, 4, [21.0, 80.0], {LOAD: [90.0, 50.0], ENERGY: [1000, 2000]})
    refresh()
    check(database, 1000)
    # Another process, which remembers no readings.
    store(database, 5, [41.0], {LOAD: [None], ENERGY: [1000]})
    Rollups().refresh(database.cursor(), LEVELS, sorted(database.days))
    check(database, 1000)
    database.close()
