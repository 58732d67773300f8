"""Samples that are rewritten by device and time: each is there once, in its order, whenever the process dies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import Batch, Database, Maintenance, Retention
from corral.processors.storage.embedded import sorting
from corral.processors.storage.rollup_columns import LEVELS
from support.archive_days import FIRST_US, SAMPLES_A_DAY, samples
from support.empty_history import new_database
from support.sorted_days import sort_all

DAY = f"{datetime.fromtimestamp(FIRST_US // 10**6, UTC):%Y%m%d}"
NOW = datetime(2026, 7, 1, tzinfo=UTC)

CHILD = """
import os, signal, sys
from pathlib import Path
from corral.processors.storage import Database
from corral.processors.storage.embedded import archive, database, sorting
from corral.processors.storage import statements
from support.sorted_days import sort_all

history, left = Database(Path(sys.argv[1])), int(sys.argv[2])
files = {module.__file__ for module in (sorting, database, statements)}

def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename not in files:
        return None
    if event == "line":
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
sort_all(history)
sys.settrace(None)
print("done", flush=True)
history.close()
"""


def contents(history: Database) -> list[tuple[Any, ...]]:
    sql = "SELECT time, device, power_watts, energy_millijoules FROM samples ORDER BY ALL"
    return history.cursor().execute(sql).fetchall()


def maintenance(history: Database) -> Maintenance:
    return Maintenance(history, Retention(archive=None, ten_seconds=None, minutes=None))


def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("not within 30 s")


def roll_up(history: Database) -> None:
    for level in LEVELS:
        maintenance(history).roll_up(level)


def late(history: Database, time_us: int, watts: float) -> pa.Table:
    """One sample of the first device."""
    found = samples(history, 0, 1)
    for name, value in (("time", time_us), ("power_watts", watts)):
        field = SCHEMA.field(name)
        found = found.set_column(SCHEMA.get_field_index(name), field, pa.array([value], field.type))
    return found


def test_sorted_samples_are_the_same_in_the_order_of_device_and_time(tmp_path: Path) -> None:
    history = new_database(tmp_path)
    history.commit(Batch(stream="S", sequence=1, samples=samples(history, 0)))
    before = contents(history)
    sort_all(history)
    assert history.days == {f"{DAY}_closed"}, "what is not rolled up yet is not sorted"
    roll_up(history)
    sort_all(history)
    assert history.days == {f"{DAY}_sorted"}
    assert contents(history) == before
    rows = history.cursor().execute(f"SELECT series, time FROM store.samples_{DAY}_sorted").fetchall()
    assert rows == sorted(rows)

    # Late samples correct the rollups of sorted ones, and are sorted after them; so are metrics that come later.
    history.commit(Batch(stream="S", sequence=2, samples=late(history, FIRST_US + 1, 9999.0)))
    assert history.days == {DAY, f"{DAY}_sorted"}
    more = late(history, FIRST_US + 2, 3.0)
    field = SCHEMA.field("temperature_celsius")
    more = more.set_column(SCHEMA.get_field_index(field.name), field, pa.array([70.0], field.type))
    history.commit(Batch(stream="S", sequence=3, samples=more))
    roll_up(history)
    row = history.cursor().execute(
        "SELECT samples, power_watts_max, temperature_celsius_max FROM rollup_1h WHERE device = 'GPU-0'"
    )
    assert row.fetchone() == (SAMPLES_A_DAY // 8 + 2, 9999.0, 70.0)
    before = contents(history)
    sort_all(history)
    assert history.days == {f"{DAY}_sorted"}
    assert contents(history) == before
    assert history.cursor().execute("SELECT max(temperature_celsius) FROM samples").fetchone() == (70.0,)

    # A day is archived with all of its parts.
    history.commit(Batch(stream="S", sequence=4, samples=late(history, FIRST_US + 3, 4.0)))
    history.close()
    history = Database(tmp_path / "history.duckdb")
    assert history.days == {DAY, f"{DAY}_sorted"}
    roll_up(history)
    before = contents(history)
    maintenance(history).housekeeping(NOW)
    assert history.days == set()
    assert contents(history) == before
    history.close()


def test_a_part_is_sorted_once_it_has_enough_rows_or_its_day_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "ROW_GROUP_ROWS", 100)
    monkeypatch.setattr(sorting, "ROWS", SAMPLES_A_DAY)
    monkeypatch.setattr(sorting, "ROWS_A_DEVICE", SAMPLES_A_DAY // 8)
    monkeypatch.setattr(sorting, "ROWS_AT_ONCE", SAMPLES_A_DAY // 3)
    history = new_database(tmp_path)
    history.commit(Batch(stream="S", sequence=1, samples=samples(history, 0, SAMPLES_A_DAY - 8)))
    roll_up(history)
    sorting.sort_days(history)
    assert history.days == {DAY}
    history.commit(Batch(stream="S", sequence=2, samples=samples(history, 0).slice(SAMPLES_A_DAY - 8)))
    roll_up(history)
    sorting.sort_days(history)
    assert history.days == {f"{DAY}_sorted"}
    rows = history.cursor().execute(f"SELECT series, time FROM store.samples_{DAY}_sorted").fetchall()
    assert len(rows) == SAMPLES_A_DAY
    assert rows == sorted(rows), "in several steps, too"
    history.commit(Batch(stream="S", sequence=3, samples=samples(history, 1, 200)))
    history.commit(Batch(stream="S", sequence=4, samples=samples(history, 3, 200)))
    care = maintenance(history)
    care.start()
    try:
        # The last day is not over, and has too few.
        until(lambda: sorted(part[8:] for part in history.days) == ["", "_sorted", "_sorted"])
    finally:
        care.stop()
    assert len(contents(history)) == SAMPLES_A_DAY + 400
    history.close()


@pytest.mark.long
def test_killed_at_any_line_each_sample_is_there_once(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    history = new_database(start)
    history.commit(Batch(stream="S", sequence=1, samples=samples(history, 0, 800)))
    roll_up(history)
    sort_all(history)
    history.commit(Batch(stream="S", sequence=2, samples=samples(history, 0).slice(800)))
    roll_up(history)
    before = contents(history)
    history.close()
    kills, line = 0, 1
    while True:
        folder = shutil.copytree(start, tmp_path / str(line))
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder / "history.duckdb"), str(line)],
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        history = Database(folder / "history.duckdb")
        assert contents(history) == before, line
        sort_all(history)
        assert history.days == {f"{DAY}_sorted"}
        assert contents(history) == before, line
        history.close()
        shutil.rmtree(folder)
        if child.returncode == 0:
            assert child.stdout == b"done\n"
            break
        kills, line = kills + 1, line + 13
    assert kills > 5
