"""Schema of the database: internal tables in `store`, and in `main` the tables and views that people query.

Samples are in tables per UTC day, so that archiving a day takes `DROP TABLE` and never a long `DELETE`:
`store.samples_20261124` in the order of their arrival, `store.samples_20261124_sorted` in that of device and time, and
for a while `store.samples_20261124_closed` (`embedded/sorting.py`). They name their device by a small number, the
series; the view `samples` replaces it by host and uuid, and includes the archive. Every column of a metric derives from
the catalog of metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ...schemas.metrics import METRICS

PROGRAM: Final = "corral"
VERSION: Final = 6
"""Version of the tables; `migrations.py` upgrades older ones. 2 counts throttled samples in all rollups, and keeps the
idle minutes of an hour. 3 has `agents.samples` and `devices.mig_instance`. 4 has no keys in tables whose rows are
replaced. 5 keeps totals of leases, and their peaks of memory by process lists. 6 has sorted samples in tables of their
own, and leaves values out of rollups that follow from others."""

MICROSECONDS_PER_DAY: Final = 86_400_000_000
CLOSED: Final = "_closed"
"""End of the name of a part of a day that gets no more rows, and is to be sorted."""
SORTED: Final = "_sorted"
"""End of the name of the part of a day that is sorted by device and time."""
NO_SERIES: Final = "store.samples_none"
"""An empty table with every metric: with it in a union, metrics that a day or a file lacks are null."""

# Columns that a table gets later are at its end, where ALTER TABLE adds them. A table whose rows are replaced has no
# primary key: see `statements.put`.
TABLES: Final[dict[str, str]] = {
    "store.series": "series INTEGER PRIMARY KEY, host VARCHAR NOT NULL, device VARCHAR NOT NULL",
    "store.watermarks": (
        "stream VARCHAR NOT NULL, created VARCHAR NOT NULL, sequence UBIGINT NOT NULL, batch BIGINT NOT NULL"
    ),
    # When the bus stored the message at a watermark. A row is valid only for a watermark with the same sequence: an
    # older Corral moves watermarks without it.
    "store.marks": "stream VARCHAR, sequence UBIGINT, stored_ns BIGINT",
    # The last 64 sequences of an agent's run that are stored: see `deduplication.py`. The newest row of a run counts.
    "store.arrivals": "stream VARCHAR, agent VARCHAR, high UBIGINT, seen UBIGINT, batch BIGINT",
    # Hosts whose clock is off, or was: the last time of each.
    "store.clocks": "host VARCHAR NOT NULL, offset_seconds DOUBLE, since TIMESTAMPTZ, until TIMESTAMPTZ",
    "store.refused": "time TIMESTAMPTZ, stream VARCHAR, code VARCHAR, messages BIGINT",
    "store.archive_files": (
        "path VARCHAR, day DATE, rows BIGINT, bytes BIGINT, first TIMESTAMPTZ, last TIMESTAMPTZ, written TIMESTAMPTZ"
    ),
    "store.rolled": "level VARCHAR NOT NULL, batch BIGINT NOT NULL",
    # Peaks of the memory of a lease's processes on a device: a row whenever there is a higher one; the highest counts.
    "store.lease_peaks": "lease VARCHAR, host VARCHAR, device VARCHAR, peak BIGINT",
    # What a lease that has ended used: see `totals.py`. A row for each of its spans, whose times are in microseconds.
    "store.lease_totals": (
        "lease_id VARCHAR, host VARCHAR, device VARCHAR, series INTEGER, first BIGINT, last BIGINT, joules DOUBLE, "
        "peak DOUBLE, whole_load DOUBLE, whole_samples DOUBLE, load DOUBLE, samples DOUBLE, p95 SMALLINT, "
        "idle_seconds DOUBLE, idle_known_seconds DOUBLE, idle_longest_seconds DOUBLE, idle_since_minute BIGINT, "
        "idle_joules DOUBLE"
    ),
    # When hosts began to have no process on any device, since an empty list leaves no row in `processes`.
    "store.without_processes": "time TIMESTAMPTZ, host VARCHAR",
    "processes": (
        "time TIMESTAMPTZ, host VARCHAR, device VARCHAR, pid BIGINT, kind VARCHAR, memory_used_bytes BIGINT, "
        "sm_utilization_percent FLOAT, memory_utilization_percent FLOAT, encoder_utilization_percent FLOAT, "
        'decoder_utilization_percent FLOAT, name VARCHAR, "user" VARCHAR, container VARCHAR, lease VARCHAR, '
        "started TIMESTAMPTZ, command VARCHAR"
    ),
    "agents": (
        "time TIMESTAMPTZ, host VARCHAR, agent VARCHAR, source VARCHAR, ticks BIGINT, late_ticks BIGINT, "
        "read_seconds_mean DOUBLE, read_seconds_max DOUBLE, read_errors BIGINT, published_messages BIGINT, "
        "buffered_bytes BIGINT, dropped_messages BIGINT, dropped_samples BIGINT, cpu_seconds DOUBLE, "
        "resident_bytes BIGINT, corral_version VARCHAR, samples BIGINT"
    ),
    "devices": (
        "device VARCHAR NOT NULL, host VARCHAR, index INTEGER, name VARCHAR, vendor VARCHAR, architecture VARCHAR, "
        "compute_capability VARCHAR, sm_count INTEGER, memory_bytes BIGINT, "
        "memory_bandwidth_bytes_per_second BIGINT, sm_clock_max_megahertz INTEGER, power_limit_max_watts FLOAT, "
        "driver VARCHAR, pcie_address VARCHAR, mig_enabled BOOLEAN, mig_parent VARCHAR, mig_profile VARCHAR, "
        "numa_node INTEGER, cpu_affinity INTEGER[], serial VARCHAR, first_seen TIMESTAMPTZ, last_seen TIMESTAMPTZ, "
        "present BOOLEAN, mig_instance INTEGER"
    ),
    "hosts": (
        "host VARCHAR NOT NULL, address VARCHAR, cpus INTEGER, memory_bytes BIGINT, driver VARCHAR, "
        "labels MAP(VARCHAR, VARCHAR), agent VARCHAR, source VARCHAR, interval_seconds DOUBLE, devices INTEGER, "
        "first_seen TIMESTAMPTZ, last_seen TIMESTAMPTZ, fingerprint VARCHAR, kernel VARCHAR"
    ),
    # What was true of a host or a device, and from when to when; `valid_to` is null while it is.
    "host_facts": (
        "host VARCHAR, device VARCHAR, fact VARCHAR, value VARCHAR, valid_from TIMESTAMPTZ, valid_to TIMESTAMPTZ"
    ),
    # Devices that a host lists although another host owns them.
    "device_conflicts": ("host VARCHAR, device VARCHAR, owner VARCHAR, since TIMESTAMPTZ, last_seen TIMESTAMPTZ"),
    "links": "host VARCHAR, device VARCHAR, other VARCHAR, link VARCHAR, nvlinks INTEGER",
    "events": (
        "time TIMESTAMPTZ, host VARCHAR, agent VARCHAR, sequence BIGINT, kind VARCHAR, severity VARCHAR, "
        "device VARCHAR, code INTEGER, message VARCHAR, data JSON, stored TIMESTAMPTZ"
    ),
    "lease_events": (
        "time TIMESTAMPTZ, kind VARCHAR, lease_id VARCHAR, owner VARCHAR, name VARCHAR, state VARCHAR, "
        "planner VARCHAR, reason VARCHAR, expires_at TIMESTAMPTZ, devices VARCHAR[], saved_at TIMESTAMPTZ, "
        "preemption_notified_at TIMESTAMPTZ, preemption_ends_at TIMESTAMPTZ, preemption_reason VARCHAR, "
        "preemption_claimant VARCHAR, preemption_claimant_owner VARCHAR, preemption_claimant_group VARCHAR, "
        "preemption_extended BOOLEAN"
    ),
    "leases": (
        "lease_id VARCHAR NOT NULL, owner VARCHAR, name VARCHAR, state VARCHAR, request_id VARCHAR, "
        "policy VARCHAR, labels MAP(VARCHAR, VARCHAR), ttl_seconds DOUBLE, granted_at TIMESTAMPTZ, "
        "expires_at TIMESTAMPTZ, ended_at TIMESTAMPTZ, reason VARCHAR, devices VARCHAR[], changed TIMESTAMPTZ, "
        "preemptible BOOLEAN, grace_seconds DOUBLE, checkpoint BOOLEAN, min_run_seconds DOUBLE, priority INTEGER, "
        "requeued BOOLEAN, saved_at TIMESTAMPTZ, preemption_notified_at TIMESTAMPTZ, group_name VARCHAR, "
        "gpus_min INTEGER, gpus_max INTEGER"
    ),
    # `since` is null for devices that the lease was granted, and `until` for those that it had to its end.
    "lease_devices": (
        "lease_id VARCHAR, host VARCHAR, device VARCHAR, index INTEGER, model VARCHAR, memory_bytes BIGINT, "
        "share DOUBLE, cpus DOUBLE, host_memory_bytes BIGINT, score DOUBLE, since TIMESTAMPTZ, until TIMESTAMPTZ"
    ),
    "requests": (
        "uid VARCHAR, request_id VARCHAR, owner VARCHAR, name VARCHAR, asked_at TIMESTAMPTZ, ended_at TIMESTAMPTZ, "
        "outcome VARCHAR, code VARCHAR, message VARCHAR, queued BOOLEAN, position BIGINT, lease_id VARCHAR, "
        "gpus INTEGER, gpu_share DOUBLE, gpu_memory_bytes BIGINT, cpus DOUBLE, host_memory_bytes BIGINT, "
        "models VARCHAR[], vendors VARCHAR[], hosts VARCHAR[], host_labels MAP(VARCHAR, VARCHAR), "
        "min_compute_capability VARCHAR, placement VARCHAR, mig VARCHAR, policy VARCHAR, priority INTEGER, "
        "ttl_seconds DOUBLE, wait_seconds DOUBLE, expected_seconds DOUBLE, max_seconds DOUBLE, items BIGINT, "
        "labels MAP(VARCHAR, VARCHAR), estimated_seconds DOUBLE, estimated_low_seconds DOUBLE, "
        "estimated_high_seconds DOUBLE, estimate_basis VARCHAR, forecast_at TIMESTAMPTZ, "
        "forecast_start TIMESTAMPTZ, forecast_earliest TIMESTAMPTZ, forecast_latest TIMESTAMPTZ, "
        "last_forecast_at TIMESTAMPTZ, last_forecast_start TIMESTAMPTZ, last_forecast_earliest TIMESTAMPTZ, "
        "last_forecast_latest TIMESTAMPTZ, planner VARCHAR, preemptible BOOLEAN, grace_seconds DOUBLE, "
        "checkpoint BOOLEAN, min_run_seconds DOUBLE, requeue_of VARCHAR, group_name VARCHAR, "
        "within VARCHAR, prefer_within VARCHAR, gpus_max INTEGER"
    ),
    # Requests that wait. Their rows are deleted when they have ended, and are in `requests` then.
    "store.waiting_requests": (
        "uid VARCHAR, request_id VARCHAR, owner VARCHAR, name VARCHAR, group_name VARCHAR, asked_at TIMESTAMPTZ, "
        "until TIMESTAMPTZ, position BIGINT, gpus INTEGER, gpus_max INTEGER, gpu_share DOUBLE, "
        "gpu_memory_bytes BIGINT, cpus DOUBLE, host_memory_bytes BIGINT, models VARCHAR[], vendors VARCHAR[], "
        "hosts VARCHAR[], host_labels MAP(VARCHAR, VARCHAR), min_compute_capability VARCHAR, placement VARCHAR, "
        "mig VARCHAR, policy VARCHAR, priority INTEGER, wait_seconds DOUBLE, expected_seconds DOUBLE, "
        "max_seconds DOUBLE, estimated_seconds DOUBLE, items BIGINT, labels MAP(VARCHAR, VARCHAR), "
        "preemptible BOOLEAN, requeue_of VARCHAR, within VARCHAR, prefer_within VARCHAR, planner VARCHAR"
    ),
    # What was drained, from when to when; `until` is null while it is, and for maintenance the planned end. `window_id`
    # is empty without maintenance.
    "drains": (
        "target VARCHAR NOT NULL, since TIMESTAMPTZ NOT NULL, until TIMESTAMPTZ, reason VARCHAR, operator VARCHAR, "
        "ended_by VARCHAR, window_id VARCHAR NOT NULL, planner VARCHAR"
    ),
    "jobs": (
        "job_id VARCHAR NOT NULL, submitted_at TIMESTAMPTZ NOT NULL, owner VARCHAR, name VARCHAR, group_name VARCHAR, "
        "state VARCHAR, ended_at TIMESTAMPTZ, array_indexes VARCHAR, tasks BIGINT, gpus INTEGER, hosts INTEGER, "
        "tasks_per_host INTEGER, held BOOLEAN, after_jobs VARCHAR[], progress DOUBLE, message VARCHAR, "
        "changed TIMESTAMPTZ, version BIGINT, planner VARCHAR, labels MAP(VARCHAR, VARCHAR), gpu_share DOUBLE, "
        "gpu_memory_bytes BIGINT, cpus DOUBLE, host_memory_bytes BIGINT, models VARCHAR[], priority INTEGER, "
        "preemptible BOOLEAN, expected_seconds DOUBLE, max_seconds DOUBLE"
    ),
    # A row for each attempt, and one for an attempt that a task waits for, or was ended before.
    "job_tasks": (
        "job_id VARCHAR NOT NULL, submitted_at TIMESTAMPTZ NOT NULL, index BIGINT NOT NULL, attempt INTEGER NOT NULL, "
        "state VARCHAR, lease_id VARCHAR, hosts VARCHAR[], exit_code INTEGER, signal INTEGER, "
        "pending_since TIMESTAMPTZ, started_at TIMESTAMPTZ, ended_at TIMESTAMPTZ, progress DOUBLE, message VARCHAR, "
        "retries_left INTEGER, peak_memory_bytes BIGINT, cpu_seconds DOUBLE, executor VARCHAR, log_bytes BIGINT, "
        "changed TIMESTAMPTZ, version BIGINT"
    ),
}

META_TABLE: Final = "CREATE TABLE IF NOT EXISTS corral_meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL)"

METRIC_NAMES: Final = ", ".join(METRICS)


def day_of(time_us: int) -> str:
    """The UTC day of a time in microseconds since the epoch, as `20261124`."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y%m%d")


def day_table(day: str) -> str:
    """Name of the table of a day, or of a part of it, such as `20261124_sorted`."""
    return f"store.samples_{day}"


def parts_of(day: str, days: Iterable[str]) -> set[str]:
    """Parts of a day among those of all days: the day itself, closed and sorted ones."""
    return {part for part in days if part.startswith(day)}


def create_day(table: str, metrics: Iterable[str] = ()) -> str:
    """Statement that creates the table of a day. It has only these metrics, since even an empty column has a cost."""
    columns = "".join(f", {name} {METRICS[name].row.unit.sql}" for name in metrics)
    return (
        f"CREATE TABLE IF NOT EXISTS {table} "
        f"(time TIMESTAMPTZ NOT NULL, series INTEGER NOT NULL, batch BIGINT NOT NULL{columns})"
    )


def all_days(days: Iterable[str], columns: str) -> str:
    """Subquery over the tables of days and their parts, with every metric: null if a day does not have it."""
    tables = [NO_SERIES, *(day_table(day) for day in sorted(days))]
    return f"(SELECT {columns} FROM (" + " UNION ALL BY NAME ".join(f"FROM {table}" for table in tables) + "))"


def samples_view(days: Iterable[str], files: Sequence[Path] = ()) -> str:
    """Statement that creates the view `samples` over the tables of days and the files of the archive.

    The files are named one by one: files that a crash left in the archive's folder are not part of the history.
    """
    raw = all_days(days, f"time, series, {METRIC_NAMES}")
    select = f"SELECT r.time, s.host, s.device, {METRIC_NAMES} FROM {raw} r JOIN store.series s USING (series)"
    if files:
        names = ", ".join(sql_text(str(file)) for file in files)
        # The empty table first: it has the columns of metrics that were added after the oldest files.
        archived = (
            f"SELECT NULL::VARCHAR AS host, NULL::VARCHAR AS device, * EXCLUDE (series, batch) FROM {NO_SERIES} "
            f"UNION ALL BY NAME SELECT * FROM read_parquet([{names}], union_by_name = true, hive_partitioning = false)"
        )
        select += f" UNION ALL SELECT time, host, device, {METRIC_NAMES} FROM ({archived})"
    return f"CREATE OR REPLACE VIEW samples AS {select}"


def sql_text(text: str) -> str:
    """Quote a text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"
