"""What views read off rollups is what the raw samples give, for leases that begin and end anywhere."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from corral.processors import views
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage.embedded import rollups, totals
from corral.processors.storage.embedded.database import Database
from corral.processors.storage.embedded.snapshot import write_snapshot
from corral.processors.storage.protocol import Batch
from support.empty_history import new_database
from support.feed import Feed

START = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=9)
HOURS = 6
STEP = 10
DEVICES = ("g0", "g1")

Sample = dict[str, Any]


def made(dice: random.Random) -> dict[tuple[str, int], Sample]:
    """By device and second: stretches of minutes that are idle, busy, unknown or silent, some of them hours long."""
    found: dict[tuple[str, int], Sample] = {}
    for device in DEVICES:
        second = energy = 0
        while second < HOURS * 3600:
            kind = dice.choice(["idle", "busy", "mixed", "unknown", "silent"])
            until = min(second + 60 * dice.choice([1, 2, 5, 30, 60, 150]), HOURS * 3600)
            for at in range(second, until, STEP):
                load = {"idle": 0, "busy": 60, "unknown": None}.get(kind, dice.choice([0, 4, 20]))
                energy += dice.randrange(1_000_000)
                if kind == "silent":
                    continue
                mask = dice.choice([0, 0, 0x1, 0x4, 0x20, 0x44, 0x8, 0x80])
                found[device, at] = {
                    "gpu_utilization_percent": load,
                    "power_watts": dice.randrange(60, 700),
                    "throttle_reasons_bitmask": mask,
                    "sm_clock_megahertz": dice.randrange(200, 1980),
                    "sm_clock_max_megahertz": 1980,
                    **({"energy_millijoules": energy} if device == "g1" else {}),
                }
            second = until
    return found


def leases(dice: random.Random) -> list[tuple[str, str, int, int]]:
    """Id, device, first and last microsecond since `START`."""
    span = HOURS * 3600 * 10**6
    found = [
        ("whole", "g0", 0, span),
        ("hour", "g1", 3600 * 10**6, 7200 * 10**6),
        ("instant", "g0", 61 * 10**6, 61 * 10**6 + 5),
    ]
    for number in range(120):
        first = dice.randrange(span)
        last = min(first + dice.choice([1, 30 * 10**6, 600 * 10**6, 3600 * 10**6, span]), span)
        found.append((f"l{number}", dice.choice(DEVICES), first, dice.randint(first + 1, max(first + 1, last))))
    return found


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def history(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    dice = random.Random(request.param)
    samples, held = made(dice), leases(dice)
    database = Database(tmp_path_factory.mktemp("raw") / "history.duckdb")
    for device in DEVICES:
        database.series.number("h1", device)
    keys = list(samples)
    # Late ones correct what was rolled up before.
    dice.shuffle(keys)
    cursor = database.cursor()
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        database.commit(Batch(stream="S", sequence=number, samples=table([(k, samples[k]) for k in part])))
        for level in rollups.LEVELS:
            rollups.refresh(cursor, level, sorted(database.days))
    cursor.execute("INSERT INTO hosts BY NAME SELECT 'h1' AS host, 10.0 AS interval_seconds")
    spans = pa.table(
        {
            "lease_id": [row[0] for row in held],
            "device": [row[1] for row in held],
            "granted_at": [START + timedelta(microseconds=row[2]) for row in held],
            "ended_at": [START + timedelta(microseconds=row[3]) for row in held],
        }
    )
    cursor.register("spans", spans)
    cursor.execute(
        "INSERT INTO leases BY NAME SELECT lease_id, 'ann' AS owner, 'released' AS state, granted_at, "
        "ended_at AS expires_at, ended_at FROM spans"
    )
    cursor.execute("INSERT INTO lease_devices BY NAME SELECT lease_id, 'h1' AS host, device FROM spans")
    cursor.unregister("spans")
    if request.param == 1:
        # The views over leases without totals are computed by themselves in `test_views_own_computation.py`.
        assert totals.refresh(cursor) > 0
    yield cursor, samples, held, database
    database.close()


def table(rows: list[tuple[tuple[str, int], Sample]]) -> Any:
    columns: dict[str, list[Any]] = {
        "time": [START + timedelta(seconds=second) for (_, second), _ in rows],
        "series": [DEVICES.index(device) for (device, _), _ in rows],
    }
    for field in list(SCHEMA)[2:]:
        columns[field.name] = [sample.get(field.name) for _, sample in rows]
    return pa.table(columns, schema=SCHEMA)


def minutes_of(samples: dict[tuple[str, int], Sample], device: str) -> dict[int, tuple[float | None, float]]:
    """Mean utilisation of each minute with samples, and its mean watts by the energy counter or by power."""
    found: dict[int, list[Sample]] = {}
    grown: dict[int, int] = {}
    before: int | None = None
    for (owner, second), sample in sorted(samples.items()):
        if owner != device:
            continue
        minute = second // 60
        found.setdefault(minute, []).append(sample)
        energy = sample.get("energy_millijoules")
        if energy is not None:
            grown[minute] = grown.get(minute, 0) + (energy - before if before is not None else 0)
            before = energy
    means: dict[int, tuple[float | None, float]] = {}
    for minute, members in found.items():
        loads = [m["gpu_utilization_percent"] for m in members if m["gpu_utilization_percent"] is not None]
        power = sum(m["power_watts"] for m in members) / len(members)
        watts = grown[minute] / 60e3 if minute in grown else power
        means[minute] = (sum(loads) / len(loads) if loads else None), watts
    return means


@pytest.mark.long
def test_rollups_of_version_1_are_filled_as_far_as_they_tell(history: Any, tmp_path: Path) -> None:
    cursor, _, _, database = history
    asked = (
        "SELECT lease_id, idle_since, round(COLUMNS('idle_hours|idle_percent|longest|kwh'), 6) FROM idle_while_leased "
        "ORDER BY lease_id",
        "SELECT * EXCLUDE (sm_clock_percent) FROM throttling ORDER BY ALL",
    )
    expected = [cursor.execute(sql).fetchall() for sql in asked]
    write_snapshot(database, database.snapshots / "old.duckdb")
    copy = shutil.move(database.snapshots / "old.duckdb", tmp_path / "old.duckdb")
    with duckdb.connect(str(copy)) as old:
        new = old.execute(
            "SELECT table_name, column_name FROM duckdb_columns() WHERE schema_name = 'store' AND NOT internal AND "
            "table_name LIKE 'rollup%' AND regexp_matches(column_name, '^(throttled_|idle_|known_)')"
        ).fetchall()
        assert len(new) > 30
        for name, column in new:
            old.execute(f"ALTER TABLE store.{name} DROP COLUMN {column}")
        old.execute("UPDATE corral_meta SET value = '1' WHERE key = 'version'")
    opened = Database(copy)
    again = [opened.cursor().execute(sql).fetchall() for sql in asked]
    assert again[0] == expected[0]
    # One sample stands for ten seconds here, so that even throttling is the same.
    assert again[1] == expected[1]
    opened.close()


def test_idle_while_leased_is_what_the_minutes_say(history: Any) -> None:
    cursor, samples, held, _ = history
    result = cursor.execute("FROM idle_while_leased")
    names = [column[0] for column in result.description]
    found = {row[2]: dict(zip(names, row, strict=True)) for row in result.fetchall()}
    expected = 0
    for lease_id, device, first, last in held:
        known, idle, joules = 0.0, 0.0, 0.0
        stretches: list[list[float]] = []
        previous: int | None = None
        newest = -1
        for minute, (load, watts) in sorted(minutes_of(samples, device).items()):
            seconds = (min(last, (minute + 1) * 60_000_000) - max(first, minute * 60_000_000)) / 1e6
            if load is None or seconds <= 0:
                continue
            known += seconds
            newest = minute
            if load < 5:
                idle += seconds
                joules += seconds * watts
                if previous == minute - 1:
                    stretches[-1][1] += seconds
                else:
                    stretches.append([minute, seconds])
                previous = minute
        if not stretches:
            assert lease_id not in found
            continue
        expected += 1
        row = found[lease_id]
        since = stretches[-1][0] if previous == newest else None
        assert row["idle_hours"] * 3600 == pytest.approx(idle, abs=1e-6), lease_id
        assert row["idle_percent"] == pytest.approx(100 * idle / known), lease_id
        assert row["longest_idle_hours"] * 3600 == pytest.approx(max(s for _, s in stretches), abs=1e-6), lease_id
        assert row["idle_kwh"] * 3.6e6 == pytest.approx(joules, rel=1e-6), lease_id
        begun = None if since is None else START + timedelta(microseconds=max(since * 60_000_000, first))
        assert row["idle_since"] == begun, lease_id
    assert expected == len(found) > 20


def test_the_p95_of_a_lease_is_that_of_its_minutes_samples(history: Any) -> None:
    cursor, samples, held, _ = history
    found = dict(cursor.execute("SELECT lease_id, gpu_utilization_percent_p95 FROM lease_usage").fetchall())
    for lease_id, device, first, last in held:
        # A minute in which it begins or ends counts with all of its samples.
        low, high = first // 60_000_000 * 60, -(-last // 60_000_000) * 60
        loads = sorted(
            sample["gpu_utilization_percent"]
            for (owner, second), sample in samples.items()
            if owner == device and low <= second < high and sample["gpu_utilization_percent"] is not None
        )
        assert found[lease_id] == (loads[math.ceil(0.95 * len(loads)) - 1] if loads else None), lease_id


def test_throttling_counts_samples(history: Any) -> None:
    cursor, samples, _, _ = history
    found = {(row[2], row[0]): row[3:8] for row in cursor.execute("FROM throttling").fetchall()}
    for hour in range(HOURS):
        for device in DEVICES:
            members = [s for (d, at), s in samples.items() if d == device and at // 3600 == hour]
            masks = [s["throttle_reasons_bitmask"] for s in members]
            held = [s for s in members if s["throttle_reasons_bitmask"] & 0xEC]
            key = device, START + timedelta(hours=hour)
            if not held:
                assert key not in found
                continue
            clock = sum(100 * s["sm_clock_megahertz"] / 1980 for s in held) / len(held)
            seconds = [STEP * sum(bool(mask & bits) for mask in masks) for bits in (0x60, 0x84, 0x8)]
            assert found[key] == (*seconds, pytest.approx(100 * len(held) / len(members)), pytest.approx(clock)), key


def test_no_view_reads_samples_that_rollups_hold(tmp_path: Path) -> None:
    database, feed = new_database(tmp_path), Feed()
    feed.publish(1, ticks=3, devices=2)
    feed.store(database)
    cursor = database.cursor()
    [day] = database.days

    def plan(name: str) -> str:
        return str(cursor.execute(f"EXPLAIN FROM {name}").fetchall())

    assert f"samples_{day}" in plan("samples")
    assert [name for name in views.NAMES if f"samples_{day}" in plan(name)] == []
    database.close()
