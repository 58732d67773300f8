"""Does maintenance hold ingest up, and what does a sample take on disk then? Beside commits left alone.

    python bench/maintenance.py --rows 2000000
    python bench/maintenance.py --rows 1728000 --devices 20    whole days of devices, as archived files have them
    python bench/maintenance.py --rows 3600000 --devices 340 --jitter-us 2000   three hours a device

A day of samples is filled in, then small batches of today are committed one after another: first alone, then while
rollups are brought up to date, while the old day is sorted by device and time, while it is copied to Parquet and
dropped, and while a snapshot is made. CPU time includes that of the commits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage import Batch, Database, Maintenance, Retention
from corral.processors.storage.embedded import sorting
from corral.processors.storage.embedded.rollups import LEVELS
from corral.processors.storage.embedded.snapshot import write_snapshot
from ingest import values


class Ingest:
    """Commits a second of all devices at a time."""

    def __init__(self, history: Database, ticks: int, devices: int, jitter_us: int) -> None:
        self.history = history
        # All devices of a host are read together.
        late = np.random.default_rng(2).integers(-jitter_us, jitter_us + 1, (ticks, -(-devices // 8)))
        self.late_us = np.repeat(late, 8, axis=1)[:, :devices]
        self.devices = devices
        self.data = values(devices, ticks)
        self.series = np.array([history.series.number(f"h{at // 8}", f"GPU-{at:08x}") for at in range(devices)])
        self.sequence = 0

    def table(self, first_us: int, ticks: int, skip: int = 0) -> pa.Table:
        columns = {
            "time": pa.array(
                np.repeat(first_us + np.arange(ticks) * 10**6, self.devices) + self.late_us[skip : skip + ticks].ravel()
            ).cast(SCHEMA.field("time").type),
            "series": pa.array(np.tile(self.series, ticks).astype(np.int32)),
        }
        rows = self.devices * ticks
        for field in list(SCHEMA)[2:]:
            found = self.data.get(field.name)
            part = None if found is None else found[skip : skip + ticks].ravel()
            columns[field.name] = pa.nulls(rows, field.type) if part is None else pa.array(part)
        return pa.table(columns, schema=SCHEMA)

    def commit(self, table: pa.Table) -> float:
        self.sequence += 1
        began = time.perf_counter()
        self.history.commit(Batch(stream="S", sequence=self.sequence, samples=table))
        return time.perf_counter() - began


def beside(ingest: Ingest, label: str, work: Callable[[], object], at_least: float = 0.0) -> None:
    """Commit while something else goes on, and say how long the commits took."""
    done = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    began, cpu = time.perf_counter(), time.process_time()
    thread = threading.Thread(target=run)
    thread.start()
    took: list[float] = []
    while not done.is_set() or time.perf_counter() - began < at_least:
        took.append(ingest.commit(ingest.table(time.time_ns() // 1000, 1)))
        time.sleep(0.02)
    thread.join()
    if failures:
        raise failures[0]
    took.sort()
    print(
        f"{label}: {time.perf_counter() - began:.1f} s, {time.process_time() - cpu:.1f} CPU-s, "
        f"{len(took)} commits of {ingest.devices} samples: "
        f"median {took[len(took) // 2] * 1e3:.0f} ms, longest {took[-1] * 1e3:.0f} ms",
        flush=True,
    )


def used_bytes(history: Database) -> int:
    cursor = history.cursor()
    cursor.execute("CHECKPOINT")
    row = cursor.execute(
        "SELECT used_blocks * block_size FROM pragma_database_size() WHERE database_name = current_database()"
    ).fetchone()
    assert row is not None
    return int(row[0])


def sort(history: Database) -> None:
    """Sort the oldest day, however few rows it has."""
    cursor, day = history.cursor(), min(history.days)
    assert sorting.close(history, cursor, day)
    assert sorting.sort(history, cursor, day)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the day that goes to the archive")
    parser.add_argument("--devices", type=int, default=1000, help="that they are of, one a second")
    parser.add_argument("--jitter-us", type=int, default=0, help="by how much the times of ticks vary")
    parser.add_argument("--unsorted", action="store_true", help="archive samples in the order of arrival")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-maintenance-"))
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    try:
        history = Database(folder / "history.duckdb")
        empty = used_bytes(history)
        # Its first tick is not that early that it would be of the day before.
        old_us = int(datetime(2026, 1, 5, tzinfo=UTC).timestamp() * 1e6) + given.jitter_us
        ticks = given.rows // given.devices
        ingest = Ingest(history, ticks, given.devices, given.jitter_us)
        step = 300_000 // given.devices
        for first in range(0, ticks, step):
            ingest.commit(ingest.table(old_us + first * 10**6, min(step, ticks - first), first))
        arrived = (used_bytes(history) - empty) / given.rows
        print(f"{arrived:.1f} bytes a sample in the order of arrival")
        care = Maintenance(history, Retention(archive=None, ten_seconds=None, minutes=None))
        beside(ingest, "alone", lambda: None, 3.0)
        for level in LEVELS:
            beside(ingest, f"rollup {level.name}", lambda level=level: care.roll_up(level))
        if not given.unsorted:
            before, sequence = used_bytes(history), ingest.sequence
            beside(ingest, f"sorting of {given.rows:,} samples", lambda: sort(history))
            added = (ingest.sequence - sequence) * given.devices * arrived
            size = arrived * given.rows + used_bytes(history) - before - added
            print(f"{size / given.rows:.1f} bytes a sample in the order of device and time")
        beside(ingest, f"archive of {given.rows:,} samples", lambda: care.housekeeping(datetime.now(UTC)))
        size = sum(file.stat().st_size for file in history.archive.rglob("*.parquet"))
        print(f"{size / given.rows:.1f} bytes a sample in the archive")
        beside(ingest, "snapshot", lambda: write_snapshot(history, history.snapshots / "copy.duckdb"))
        beside(ingest, "checkpoint", lambda: history.cursor().execute("CHECKPOINT"))
        history.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
