"""Archive and snapshot: no sample is lost or doubled, whenever the process dies and whoever asks meanwhile."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import Batch, Database, Maintenance, Retention
from corral.processors.storage.embedded.rollups import LEVELS
from corral.processors.storage.embedded.snapshot import write_snapshot
from support.archive_days import FIRST_US, SAMPLES_A_DAY, samples
from support.empty_history import new_database
from support.sorted_days import sort_all

DAYS = 2


def fill(history: Database, days: int = DAYS) -> None:
    for day in range(days):
        history.commit(Batch(stream="S", sequence=day + 1, samples=samples(history, day)))


def totals(history: Database) -> tuple[Any, ...]:
    row = (
        history.cursor()
        .execute("SELECT count(*), sum(power_watts), count(DISTINCT (device, time)) FROM samples")
        .fetchone()
    )
    assert row is not None
    return row


EXPECTED = (DAYS * SAMPLES_A_DAY, DAYS * SAMPLES_A_DAY * (SAMPLES_A_DAY + 1) / 2, DAYS * SAMPLES_A_DAY)

CHILD = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from corral.processors.storage import Database, Maintenance, Retention
from corral.processors.storage.embedded import archive
from corral.processors.storage.rollup_columns import LEVELS
history = Database(Path(sys.argv[1]))
archive.delete_orphaned_files(history)
care = Maintenance(history, Retention(archive=None, ten_seconds=None, minutes=None))
print("ready", flush=True)
for level in LEVELS:
    care.roll_up(level)
care.housekeeping(datetime(2026, 7, 1, tzinfo=UTC))
print("done", flush=True)
"""


@pytest.mark.long
def test_killed_at_any_point_of_maintenance_the_sums_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "history.duckdb"
    history = Database(path)
    fill(history)
    history.close()
    dice = random.Random(7)
    finished, kills = False, 0
    while not finished:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if kills < 6:
            time.sleep(dice.uniform(0.0, 0.12) * (kills + 1))
            child.kill()
            kills += 1
            finished = "done" in child.communicate()[0]
        else:
            finished = "done" in child.communicate(timeout=60)[0]
        history = Database(path)
        assert totals(history) == EXPECTED
        history.close()
    history = Database(path)
    assert history.days == set()
    known = {row[0] for row in history.cursor().execute("SELECT path FROM store.archive_files").fetchall()}
    lying = {str(file.relative_to(history.archive)) for file in history.archive.glob("*/*")}
    assert known == lying
    for level in LEVELS:
        row = history.cursor().execute(f"SELECT sum(samples) FROM rollup_{level.name}").fetchone()
        assert row == (DAYS * SAMPLES_A_DAY,), level.name
    history.close()


def test_another_reader_has_the_same_samples_in_encodings_of_their_columns(tmp_path: Path) -> None:
    history = new_database(tmp_path)
    fill(history, 1)
    expected = history.cursor().execute("FROM samples ORDER BY host, device, time").to_arrow_table()
    care = Maintenance(history, Retention(archive=None, ten_seconds=None, minutes=None))
    for level in LEVELS:
        care.roll_up(level)
    care.housekeeping(datetime(2026, 7, 1, tzinfo=UTC))
    [file] = history.archive.glob("day=*/*.parquet")
    found = pq.ParquetFile(file).read()
    shared = [name for name in expected.column_names if name in found.column_names]
    assert set(found.column_names) == {"time", "host", "device", "power_watts", "energy_millijoules"}
    assert found.select(shared).cast(expected.select(shared).schema) == expected.select(shared)
    columns = [pq.ParquetFile(file).metadata.row_group(0).column(at) for at in range(found.num_columns)]
    encodings = {column.path_in_schema: column.encodings for column in columns}
    assert encodings["power_watts"] == ("BYTE_STREAM_SPLIT",)
    assert encodings["host"] == ("RLE_DICTIONARY",)
    # Files have the metrics that there were by then.
    more = samples(history, 1)
    field = SCHEMA.field("temperature_celsius")
    values = pa.array([70.0] * len(more), field.type)
    more = more.set_column(SCHEMA.get_field_index(field.name), field, values)
    history.commit(Batch(stream="S", sequence=2, samples=more))
    for level in LEVELS:
        care.roll_up(level)
    care.housekeeping(datetime(2026, 7, 1, tzinfo=UTC))
    assert history.days == set()
    counts = "SELECT count(*), count(power_watts), count(temperature_celsius)"
    expected_counts = (2 * SAMPLES_A_DAY, 2 * SAMPLES_A_DAY, SAMPLES_A_DAY)
    assert history.cursor().execute(f"{counts} FROM samples").fetchone() == expected_counts
    files = history.archive / "*" / "*.parquet"
    assert duckdb.sql(f"{counts} FROM read_parquet('{files}', union_by_name = true)").fetchone() == expected_counts
    history.close()


def test_late_samples_reach_days_that_are_archived(tmp_path: Path) -> None:
    history = new_database(tmp_path)
    care = Maintenance(history, Retention(archive=None, ten_seconds=None, minutes=None))
    fill(history)
    now = datetime(2026, 7, 1, tzinfo=UTC)
    care.housekeeping(now)
    assert len(history.days) == DAYS, "what is not rolled up yet is not archived"
    for level in LEVELS:
        care.roll_up(level)
    care.housekeeping(now)
    assert history.days == set()

    def minute() -> tuple[Any, ...] | None:
        return (
            history.cursor()
            .execute(
                "SELECT samples, power_watts_min, power_watts_max FROM rollup_1h "
                "WHERE device = 'GPU-0' ORDER BY time LIMIT 1"
            )
            .fetchone()
        )

    before = minute()
    assert before is not None
    late = samples(history, 0, SAMPLES_A_DAY).slice(0, 1)
    late = late.set_column(0, SCHEMA.field("time"), pa.array([FIRST_US + 1], SCHEMA.field("time").type))
    late = late.set_column(
        SCHEMA.get_field_index("power_watts"), SCHEMA.field("power_watts"), pa.array([9999.0], pa.float32())
    )
    history.commit(Batch(stream="S", sequence=DAYS + 1, samples=late))
    for level in LEVELS:
        care.roll_up(level)
    assert minute() == (before[0] + 1, before[1], 9999.0)
    care.housekeeping(now)
    assert history.days == set()
    assert totals(history) == (EXPECTED[0] + 1, EXPECTED[1] + 9999, EXPECTED[2] + 1)
    # The archive is plain Parquet that anybody reads, by day.
    files = str(history.archive / "*" / "*.parquet")
    assert duckdb.sql(f"SELECT count(DISTINCT day), count(*) FROM read_parquet('{files}')").fetchone() == (
        DAYS,
        EXPECTED[0] + 1,
    )
    # After their retention archived days go, and their files with them.
    Maintenance(history, Retention(archive=86400.0, ten_seconds=None, minutes=None)).housekeeping(now)
    assert totals(history)[0] == 0
    assert not list(history.archive.glob("*/*.parquet"))
    history.close()


@pytest.mark.long
def test_a_snapshot_is_one_moment_and_needs_no_other_file(tmp_path: Path) -> None:
    history = new_database(tmp_path)
    fill(history)
    care = Maintenance(history, Retention(archive=None, ten_seconds=None, minutes=None))
    for level in LEVELS:
        care.roll_up(level)
    care.housekeeping(datetime(2026, 7, 1, tzinfo=UTC))
    history.commit(Batch(stream="S", sequence=10, samples=samples(history, 0, 8)))  # late: day 0 is both
    sort_all(history)  # closed and not rolled up: it waits
    history.commit(Batch(stream="S", sequence=11, samples=samples(history, 9, 80)))
    target = history.snapshots / "copy.duckdb"
    copies: list[tuple[Path, int, int]] = []
    for with_archive, expected in ((True, EXPECTED[0] + 88), (False, 88)):
        copied = write_snapshot(history, target, archive=with_archive)
        copies.append((target.rename(tmp_path / f"elsewhere-{with_archive}.duckdb"), copied, expected))
    history.commit(Batch(stream="S", sequence=12, samples=samples(history, 9, 80)))  # ingest goes on
    for moved, copied, expected in copies:
        with duckdb.connect(str(moved), read_only=True) as copy:
            assert copied == expected
            assert copy.execute("SELECT count(*) FROM samples").fetchone() == (expected,)
            assert copy.execute("SELECT sum(samples) FROM rollup_1m").fetchone() == (EXPECTED[0],)
            assert copy.execute("SELECT count(*) FROM fleet_by_hour").fetchone() != (0,)
        # It is a history like any other, that a processor could go on with.
        continued = Database(moved)
        assert continued.processor != history.processor
        continued.close()
    history.close()
