"""How long does each documented view take over a month of a fleet? The limit beside it: DuckDB reads every hour once.

    python bench/views.py                         30 days of 1,000 GPUs, each view five times
    python bench/views.py --keep /tmp/month       the history is made there once, and read again by later runs
    python bench/views.py --against ../other      the views of another checkout over the same tables, in turn
    python bench/views.py --only job_summary --explain

The history holds what a processor would have stored with its defaults: rollups of 10 s for a day, of 1 min with the
bins of two metrics and of 1 h for all days, leases of 1 to 8 devices that last 6 h on average, requests, jobs, events,
and a list of processes for each host every `--process-seconds`. It is made in the tables of the rollups directly, and
its hours of its minutes by the statements of the refresh; raw samples are not made, since no view reads them. Times are
those of the whole answer in a warm database, the largest of `--runs`, with the CPU time of all threads beside it. All
rows are read, as `corral query "FROM view"` would read them, but for two views of which one lease is read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
from corral.processors import views
from corral.processors.storage import rollup_columns as shapes
from corral.processors.storage.embedded import totals
from corral.processors.storage.embedded.database import Database
from corral.schemas.metrics import METRICS
from ingest import values

METRIC_NAMES = [*values(1, 1), "ecc_corrected_count", "ecc_uncorrected_count", "pcie_replay_count"]
OF_A_LEASE = ("lease_minutes", "lease_buckets")
"""Views with a row for each minute or hour of each lease: asked for one lease, since all have tens of millions."""
A_LEASE = "l8_60"
BINNED = {"gpu_utilization_percent": 6, "power_watts": 6}
"""Bins of a busy minute: as many as fit values that vary by some percent."""
GIB = 2**30


def load(unit: str) -> str:
    """Utilization by device and time: a quarter of the half hours is idle."""
    return f"CASE WHEN hash(series, {unit} // 30) % 4 = 0 THEN 0 ELSE 60 + hash(series, {unit}) % 41 END"


def bucket(level: shapes.Level) -> str:
    """Columns of a bucket of `u`, which has the utilization, in the order of `columns`."""
    metrics = [METRICS[name] for name in METRIC_NAMES]
    parts = [f"{level.seconds}::UINTEGER AS samples"]
    level_of = {"power_watts": "60 + 6 * util", "memory_used_bytes": f"(1 + util % 60) * {GIB}"}
    level_of |= {"memory_total_bytes": f"{80 * GIB}", "gpu_utilization_percent": "util"}
    level_of["throttle_reasons_bitmask"] = "CASE WHEN util >= 98 THEN 64 ELSE 0 END"
    for metric in metrics:
        name, sql = metric.name, metric.row.unit.sql
        value = level_of.get(name, "30 + util // 2")
        for aggregate in metric.row.rollup:
            if aggregate == "mean":
                parts += [f"{level.seconds}::UINTEGER AS {name}_count", f"({value}) * {level.seconds}.0 AS {name}_sum"]
            elif aggregate == "increase":
                grown = f"(60 + 6 * util) * {level.seconds * 1000}" if name == "energy_millijoules" else "0"
                first = f"second * 400000::{sql}" if name == "energy_millijoules" else f"1::{sql}"
                parts += [f"{first} AS {name}_first", f"{grown} AS {name}_inner", f"{grown} AS {name}_increase"]
            else:
                parts.append(f"({value})::{sql} AS {name}_{aggregate}")
    held = {"throttled_samples": "CASE WHEN util >= 98 THEN 60 ELSE 0 END"}
    held["throttled_thermal_samples"] = held["throttled_samples"]
    held["known_seconds"] = "60.0"
    for column in shapes.derived(metrics, level):
        parts.append(f"({held.get(column.name, '0')})::{column.sql} AS {column.name}")
    return ", ".join(parts)


def fill_rollups(cursor: Any, gpus: int, days: int, tens: int, end: int) -> None:
    metrics = [METRICS[name] for name in METRIC_NAMES]
    for level in shapes.LEVELS:
        shapes.add_columns(cursor, level.table, metrics, level)
    for day in range(end - days * 86400, end, 86400):
        for level in (shapes.TEN_SECONDS, shapes.MINUTE):
            if level is shapes.TEN_SECONDS and day < end - tens * 86400:
                continue
            rows = (
                f"SELECT t.range AS second, d.range::INTEGER AS series, {load('(t.range // 60)')} AS util "
                f"FROM range({day}, {day + 86400}, {level.seconds}) t, range({gpus}) d"
            )
            # A refresh writes five minutes of each device one after the other.
            cursor.execute(
                f"INSERT INTO {level.table} BY NAME SELECT make_timestamptz(second * 1000000) AS time, series, "
                f"0::BIGINT AS batch, {bucket(level)} FROM ({rows}) u ORDER BY second // 300, series, second"
            )
        for name, count in BINNED.items():
            numbers = "SELECT name, metric FROM store.metrics"
            number = dict(cursor.execute(numbers).fetchall())[name]
            rows = (
                f"SELECT t.range AS second, d.range::INTEGER AS series, {load('(t.range // 60)')} AS util, "
                f"b.range AS b "
                f"FROM range({day}, {day + 86400}, 60) t, range({gpus}) d, range({count}) b"
            )
            cursor.execute(
                f"INSERT INTO store.rollup_1m_bins BY NAME SELECT make_timestamptz(second * 1000000) AS time, series, "
                f"{number}::SMALLINT AS metric, greatest(util - b, 0)::SMALLINT AS bin, {60 // count}::UINTEGER AS n "
                f"FROM ({rows}) WHERE util > 0 OR b = 0 ORDER BY second // 300, series, second"
            )
        start, after = (f"make_timestamptz({at * 1_000_000})" for at in (day, day + 86400))
        names = ", ".join(name for name, _ in shapes.columns(metrics, shapes.HOUR))
        hour = "make_timestamptz(epoch_us(time) // 3600000000 * 3600000000)"
        cursor.execute(
            f"INSERT INTO store.rollup_1h (time, series, batch, {names}) SELECT {hour} AS time, series, 0, "
            f"{shapes.from_minutes(metrics)} FROM store.rollup_1m WHERE time >= {start} AND time < {after} "
            f"GROUP BY {hour}, series ORDER BY 1, 2"
        )
        cursor.execute(
            f"INSERT INTO store.rollup_1h_bins SELECT {hour}, series, metric, bin, sum(n)::UINTEGER FROM "
            f"store.rollup_1m_bins WHERE time >= {start} AND time < {after} GROUP BY ALL ORDER BY 1, 2"
        )
        print(f"  {(day + 86400 - end) // 86400 + days} of {days} days", flush=True)


def fill_facts(cursor: Any, gpus: int, days: int, jobs: bool, end: int, process_seconds: int) -> None:
    """Hosts of 8 devices; a quarter of the hosts is leased in each of 1, 2, 4 and 8 devices at a time."""
    first = end - days * 86400
    cursor.execute(
        "CREATE TEMP TABLE board AS SELECT range::INTEGER AS gpu, 'host' || lpad((range // 8)::VARCHAR, 4, '0') AS "
        "host, "
        f"'GPU-' || lpad(range::VARCHAR, 8, '0') AS device, 1 << (range // 8 % 4) AS width FROM range({gpus})"
    )
    # A slot of devices is leased by one after another; each length is 1 to 11 hours.
    cursor.execute(
        f"""CREATE TEMP TABLE held AS SELECT *, sum(seconds) OVER slots - seconds + {first} AS began,
            'l' || slot || '_' || number AS lease_id FROM (
            SELECT s.slot, n.range AS number, 3600 + hash(s.slot, n.range) % 36000 AS seconds
            FROM (SELECT DISTINCT gpu // width * width AS slot FROM board) s, range({days * 24}) n
        ) WINDOW slots AS (PARTITION BY slot ORDER BY number) QUALIFY began < {end} ORDER BY began"""
    )
    cursor.execute(
        f"""INSERT INTO leases BY NAME SELECT lease_id, 'owner' || slot % 50 AS owner,
            'work' || hash(slot, number) % 200 AS name,
            CASE WHEN began + seconds < {end} THEN 'released' ELSE 'active' END AS state, 'r' || lease_id AS request_id,
            make_timestamptz(began::BIGINT * 1000000) AS granted_at,
            make_timestamptz((began + seconds)::BIGINT * 1000000) AS expires_at,
            CASE WHEN began + seconds < {end} THEN make_timestamptz((began + seconds)::BIGINT * 1000000) END
            AS ended_at,
            'g' || slot % 5 AS group_name, slot % 2 = 0 AS preemptible FROM held"""
    )
    cursor.execute(
        f"""INSERT INTO lease_devices BY NAME SELECT h.lease_id, b.host, b.device, b.gpu % 8 AS index, 'H100' AS model,
            {80 * GIB} AS memory_bytes, 1.0 AS share FROM held h JOIN board b ON b.gpu // b.width * b.width = h.slot"""
    )
    cursor.execute(
        """INSERT INTO requests BY NAME SELECT 'r' || lease_id AS request_id, owner, name,
            granted_at - INTERVAL 60 SECOND AS asked_at,
            granted_at AS ended_at, 'granted' AS outcome, true AS queued, lease_id, 1 AS gpus,
            []::VARCHAR[] AS models,
            granted_at - INTERVAL 50 SECOND AS forecast_at, granted_at AS forecast_start,
            granted_at - INTERVAL 10 SECOND AS forecast_earliest, granted_at + INTERVAL 10 SECOND AS forecast_latest,
            3600.0 AS estimated_seconds FROM leases"""
    )
    cursor.execute(
        """INSERT INTO lease_events BY NAME SELECT granted_at AS time, 'granted' AS kind, lease_id, owner, name,
            'active' AS state,
            CASE WHEN hash(lease_id) % 20 = 0 THEN granted_at END AS preemption_notified_at FROM leases"""
    )
    if jobs:
        cursor.execute(
            """INSERT INTO jobs BY NAME SELECT 'j' || hash(lease_id) % 5000 AS job_id, min(granted_at) AS submitted_at,
                any_value(owner) AS owner, any_value(name) AS name, 'done' AS state, max(ended_at) AS ended_at,
                '0-' || count(*) AS array_indexes, count(*) AS tasks, 1 AS gpus, 1 AS hosts FROM leases GROUP BY ALL"""
        )
        cursor.execute(
            """INSERT INTO job_tasks BY NAME SELECT 'j' || hash(lease_id) % 5000 AS job_id, j.submitted_at,
                row_number() OVER (PARTITION BY j.job_id) AS index, 1 AS attempt, 'done' AS state, lease_id,
                granted_at AS pending_since, granted_at AS started_at, l.ended_at
                FROM leases l JOIN jobs j ON j.job_id = 'j' || hash(lease_id) % 5000"""
        )
    cursor.execute(
        "INSERT INTO hosts BY NAME SELECT DISTINCT host, 'run-' || host AS agent, 1.0 AS interval_seconds, 64 AS cpus "
        "FROM board"
    )
    cursor.execute(
        f"""INSERT INTO devices BY NAME SELECT device, host, gpu % 8 AS index, 'H100' AS name,
            {80 * GIB} AS memory_bytes,
            true AS present, false AS mig_enabled, 132 AS sm_count, 'pci' || gpu % 8 AS pcie_address FROM board"""
    )
    cursor.execute(
        f"""INSERT INTO host_facts BY NAME SELECT host, device, 'firmware' AS fact, 'v' || n.range AS value,
            make_timestamptz(({first} + n.range * quarter)::BIGINT * 1000000) AS valid_from,
            CASE WHEN n.range < 3 THEN make_timestamptz(({first} + (n.range + 1) * quarter)::BIGINT * 1000000)
            END AS valid_to
            FROM board, range(4) n, (SELECT {days * 86400 // 4} AS quarter)"""
    )
    cursor.execute(
        f"""INSERT INTO events BY NAME SELECT make_timestamptz(({first} + n.range * 600)::BIGINT * 1000000) AS time,
            host, 'run-' || host AS agent, 'xid' AS kind, 'warning' AS severity, device, 31 AS code,
            '{{}}'::JSON AS data
            FROM board, range({days * 144}) n WHERE hash(gpu, n.range) % 500 = 0"""
    )
    cursor.execute(
        f"""INSERT INTO events BY NAME SELECT make_timestamptz(({first} + n.range * 600)::BIGINT * 1000000) AS time,
            host, 'run-' || host AS agent, 'process_without_lease' AS kind, 'warning' AS severity, device,
            json_object('violation', 'v' || n.range, 'lease', '', 'pid', 1, 'since_ns',
            ({first} + n.range * 600)::BIGINT * 1000000000) AS data
            FROM board, range({days * 144}) n WHERE hash(gpu, n.range) % 500 = 1"""
    )
    cursor.execute(
        f"""INSERT INTO agents BY NAME SELECT make_timestamptz(t.range * 1000000) AS time, host,
            'run-' || host AS agent, 10 AS ticks FROM range({first}, {end}, 60) t, (SELECT DISTINCT host FROM board)"""
    )
    for day in range(first, end, 86400):
        cursor.execute(
            f"""INSERT INTO processes BY NAME SELECT make_timestamptz(t.range * 1000000) AS time, b.host, b.device,
                1000 + b.gpu AS pid, 'compute' AS kind,
                (1 + hash(b.gpu, t.range // 3600) % 60) * {GIB} AS memory_used_bytes,
                50.0::FLOAT AS sm_utilization_percent, 'python' AS name, 'ann' AS "user", h.lease_id AS lease
                FROM range({day}, {day + 86400}, {process_seconds}) t, board b
                JOIN held h ON h.slot = b.gpu // b.width * b.width
                AND t.range >= h.began AND t.range < h.began + h.seconds ORDER BY time"""
        )
    cursor.execute("DROP TABLE held; DROP TABLE board")


def make(path: Path, given: argparse.Namespace) -> None:
    database = Database(path)
    cursor = database.cursor()
    for gpu in range(given.gpus):
        names = [gpu, f"host{gpu // 8:04}", f"GPU-{gpu:08}"]
        cursor.execute("INSERT INTO store.series VALUES (?, ?, ?) ON CONFLICT DO NOTHING", names)
    # To the end of this hour, so that views of what is now have something to show.
    end = (int(time.time()) // 3600 + 1) * 3600
    fill_rollups(cursor, given.gpus, given.days, given.tens, end)
    fill_facts(cursor, given.gpus, given.days, given.jobs, end, given.process_seconds)
    cpu = time.process_time()
    while added := totals.refresh(cursor):
        print(f"  totals of {added:,} spans of leases, {time.process_time() - cpu:.1f} CPU-seconds", flush=True)
    cursor.execute("CHECKPOINT")
    database.close()


def install(cursor: Any, checkout: Path | None) -> None:
    """Create the views of this build, or of another one by its files: each once those that it reads are there."""
    if checkout is None:
        views.install(cursor)
        return
    left = {path.stem: path.read_text() for path in (checkout / "processors" / "views").glob("*.sql")}
    while left:
        before = len(left)
        for name, sql in list(left.items()):
            with contextlib.suppress(duckdb.CatalogException):
                cursor.execute(f"DROP VIEW IF EXISTS main.{name}")
                cursor.execute(f"CREATE VIEW main.{name} AS {sql}")
                del left[name]
        if len(left) == before:
            print(f"{checkout}: views that read other tables are left out: {', '.join(left)}", file=sys.stderr)
            return


def measure(path: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """The child: read each view, and say how long each answer took and what CPU time."""
    database = Database(path, threads=given.threads)
    cursor = database.cursor()
    install(cursor, given.against[0] if given.against else None)
    there = {row[0] for row in cursor.execute("SELECT view_name FROM duckdb_views()").fetchall()}
    names = [name for name in views.NAMES if name in there and (not given.only or name in given.only)]
    asked = {name: f"FROM {name}" + (f" WHERE lease_id = '{A_LEASE}'" if name in OF_A_LEASE else "") for name in names}
    asked["(limit: every hour once)"] = "SELECT sum(COLUMNS(* EXCLUDE (time, series, batch))) FROM store.rollup_1h"
    found: dict[str, list[float]] = {}
    for name, sql in asked.items():
        if given.explain:
            print(name, cursor.execute(f"EXPLAIN ANALYZE {sql}").fetchall()[0][1])
        for run in range(given.runs + 1):
            cpu, began = time.process_time(), time.perf_counter()
            rows = sum(batch.num_rows for batch in cursor.execute(sql).to_arrow_reader())
            took = [time.perf_counter() - began, time.process_time() - cpu, float(rows)]
            if run:
                found[name] = max(found.get(name, took), took)
        print(f"  {name}: {found[name][0]:.2f} s, {found[name][1]:.2f} CPU-seconds", file=sys.stderr, flush=True)
    database.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument(
        "--tens", type=int, default=1, help="days with rollups of 10 s, to save time: by default a processor keeps 7"
    )
    parser.add_argument("--process-seconds", type=int, default=60, help="a collector sends a list every 10 s")
    parser.add_argument("--no-jobs", dest="jobs", action="store_false")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", default=[], metavar="VIEW")
    parser.add_argument("--explain", action="store_true", help="the plan of each, with its times")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--against", type=Path, action="append", default=[], metavar="CHECKOUT")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given)))
        return
    folder = given.keep or Path(tempfile.mkdtemp(prefix="bench-views-"))
    path = folder / "history.duckdb"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(path, given)
        print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; {path.stat().st_size / 1e9:.1f} GB")
        if given.explain:
            measure(path, given)
            return
        builds = {"this": [], **{one.resolve().name: [f"--against={one.resolve()}"] for one in given.against}}
        told: dict[str, dict[str, list[float]]] = {}
        for name, options in builds.items():
            command = [
                sys.executable,
                __file__,
                *options,
                f"--runs={given.runs}",
                f"--threads={given.threads}",
                f"--child={path}",
            ]
            command += [f"--only={one}" for one in given.only]
            ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            told[name] = json.loads(ended.stdout.splitlines()[-1])
        print(f"{'seconds (CPU-seconds)':28}" + "".join(f"{name:>18}" for name in told) + "       rows")
        for view, (_, _, rows) in told["this"].items():
            times = "".join(
                f"{found[view][0]:9.2f} ({found[view][1]:5.2f}) " for found in told.values() if view in found
            )
            print(f"{view:28}{times}{rows:12,.0f}")
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
