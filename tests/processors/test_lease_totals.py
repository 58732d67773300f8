"""Totals of leases that have ended: the views say the same with them as without, whatever comes late."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import peaks
from corral.processors.storage.embedded import rollups, totals
from corral.processors.storage.embedded.database import Database
from corral.processors.storage.protocol import Batch
from support.empty_history import new_database

START = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=9)
HOURS = 6
DEVICES = 3
VIEWS = ("lease_device_usage", "lease_usage", "idle_while_leased")


def samples(database: Database, chosen: list[tuple[int, int]], dice: random.Random) -> Any:
    """Samples of devices at seconds since `START`."""
    rows = [
        {
            "time": START + timedelta(seconds=second),
            "series": database.series.number("h1", f"g{device}"),
            "gpu_utilization_percent": dice.choice((0, 3, 50, 100)) if second // 900 % 2 else 0,
            "power_watts": dice.randrange(60, 700),
            "energy_millijoules": 300_000 * second if device else None,
            "memory_used_bytes": dice.randrange(2**36),
        }
        for device, second in chosen
    ]
    columns = {field.name: [row.get(field.name) for row in rows] for field in SCHEMA}
    return pa.table(columns, schema=SCHEMA)


class History:
    def __init__(self, folder: Path) -> None:
        self.dice = random.Random(3)
        self.database = new_database(folder)
        self.cursor = self.database.cursor()
        self.batch = 0
        self.store([(d, s) for d in range(DEVICES) for s in range(0, HOURS * 3600, 10) if s // 700 % 5])
        spans = []
        for number in range(30):
            first = self.dice.randrange(HOURS * 3600 * 10**6)
            last = first + self.dice.choice((1, 50 * 10**6, 900 * 10**6, 9000 * 10**6))
            spans.append((f"l{number}", f"g{number % DEVICES}", first, min(last, HOURS * 3600 * 10**6)))
        spans.append(("twice", "g0", 3600 * 10**6, 5000 * 10**6))
        spans.append(("twice", "g0", 6000 * 10**6, 9000 * 10**6))
        spans.append(("twice", "g1", 3600 * 10**6, 9000 * 10**6))
        for lease, device, first, last in spans:
            begin, end = (START + timedelta(microseconds=at) for at in (first, last))
            if not self.cursor.execute("FROM leases WHERE lease_id = ?", [lease]).fetchone():
                self.cursor.execute(
                    "INSERT INTO leases BY NAME SELECT ? AS lease_id, ? AS owner, 'work' AS name, 'released' AS state, "
                    "?::TIMESTAMPTZ AS granted_at, ?::TIMESTAMPTZ AS ended_at, ?::TIMESTAMPTZ AS expires_at",
                    [lease, self.dice.choice("ab"), begin, end, end],
                )
            self.cursor.execute(
                "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, 'h1' AS host, ? AS device, ? AS share, "
                "1 AS memory_bytes, ?::TIMESTAMPTZ AS since, ?::TIMESTAMPTZ AS until",
                [lease, device, 1.0 if lease == "twice" else self.dice.choice((0.5, 1.0)), begin, end],
            )

    def store(self, chosen: list[tuple[int, int]]) -> None:
        self.batch += 1
        rows = samples(self.database, chosen, self.dice)
        self.database.commit(Batch(stream="S", sequence=self.batch, samples=rows))
        for level in rollups.LEVELS:
            rollups.refresh(self.cursor, level, sorted(self.database.days))

    def answers(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for name in VIEWS:
            result = self.cursor.execute(f"FROM {name} ORDER BY ALL")
            names = [column[0] for column in result.description]
            found[name] = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
        return found

    def without_totals(self) -> dict[str, list[dict[str, Any]]]:
        self.cursor.execute(f"CREATE OR REPLACE TEMP TABLE kept AS FROM {totals.TABLE}")
        self.cursor.execute(f"DELETE FROM {totals.TABLE}")
        found = self.answers()
        self.cursor.execute(f"INSERT INTO {totals.TABLE} FROM kept")
        return found

    def totaled(self) -> set[str]:
        return {row[0] for row in self.cursor.execute(f"SELECT DISTINCT lease_id FROM {totals.TABLE}").fetchall()}


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(totals, "SPANS_AT_ONCE", 12)
    made = History(tmp_path)
    yield made
    made.database.close()


def same(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> None:
    for name in VIEWS:
        assert len(found[name]) == len(expected[name]), name
        for row, other in zip(found[name], expected[name], strict=True):
            # Sums of floats in another order.
            near = {k: pytest.approx(v, rel=1e-9, abs=1e-9) if isinstance(v, float) else v for k, v in other.items()}
            assert row == near, name


def test_views_say_the_same_with_totals_and_after_late_samples(history: History) -> None:
    expected = history.answers()
    added = totals.refresh(history.cursor)
    whole = history.totaled()
    # Those that ended in the newest hour, or have no time at all, have none.
    assert added == history.cursor.execute(f"SELECT count(*) FROM {totals.TABLE}").fetchone()[0] > 20
    assert "twice" in whole
    assert len(whole) < 31
    assert totals.refresh(history.cursor) == 0
    same(history.answers(), expected)

    # A minute of one device comes late: leases of that hour on that device, and no others, are computed again.
    history.store([(0, 7200 + second) for second in range(20, 60)])
    gone = whole - history.totaled()
    touched = history.cursor.execute(
        "SELECT DISTINCT lease_id FROM lease_spans WHERE device = 'g0' AND ended > started AND ended > ? "
        "AND started < ?",
        [START + timedelta(hours=2), START + timedelta(hours=3)],
    ).fetchall()
    assert gone == {row[0] for row in touched} & whole
    assert "twice" in gone
    changed = history.answers()
    same(changed, history.without_totals())
    assert changed != expected
    assert totals.refresh(history.cursor) > 0
    assert history.totaled() == whole
    same(history.answers(), changed)

    # The planner says later that a lease has ended earlier.
    history.cursor.execute("UPDATE lease_devices SET until = until - INTERVAL 5 MINUTE WHERE lease_id = 'twice'")
    changed = history.answers()
    same(changed, history.without_totals())
    totals.refresh(history.cursor)
    same(history.answers(), changed)


def processes(*rows: tuple[int, str, str, int, int]) -> Any:
    return pa.table(
        {
            "time": pa.array([START + timedelta(seconds=row[0]) for row in rows], pa.timestamp("us", "UTC")),
            "host": ["h1"] * len(rows),
            "lease": [row[1] for row in rows],
            "device": [row[2] for row in rows],
            "pid": [row[3] for row in rows],
            "memory_used_bytes": [row[4] for row in rows],
        }
    )


def test_peaks_are_those_of_all_lists(tmp_path: Path) -> None:
    database = new_database(tmp_path)
    dice = random.Random(5)
    at = 0
    for sequence in range(1, 30):
        if sequence == 15:
            database.close()
            database = Database(tmp_path / "history.duckdb")
        rows = [
            (at + tick * 10, dice.choice(("", "a", "b")), dice.choice(("g0", "g1")), pid, dice.randrange(2**40))
            for tick in range(3)
            for pid in range(4)
        ]
        at += 30
        database.commit(Batch(stream="S", sequence=sequence, tables={"processes": processes(*rows)}))
    cursor = database.cursor()
    expected = cursor.execute(
        "SELECT lease, host, device, max(used) FROM (SELECT lease, host, device, time, sum(memory_used_bytes) AS used "
        "FROM processes WHERE lease <> '' GROUP BY ALL) GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    highest = f"SELECT lease, host, device, max(peak) FROM {peaks.TABLE} GROUP BY ALL ORDER BY ALL"
    assert cursor.execute(highest).fetchall() == expected
    # Rows are added for higher peaks only.
    assert cursor.execute(f"SELECT count(*) FROM {peaks.TABLE}").fetchone()[0] < 60
    # A file of an older version has none: they are read off its lists as it is opened.
    cursor.execute(f"DROP TABLE {peaks.TABLE}")
    cursor.execute("UPDATE corral_meta SET value = '4' WHERE key = 'version'")
    database.close()
    database = Database(tmp_path / "history.duckdb")
    assert database.cursor().execute(highest).fetchall() == expected
    database.close()
