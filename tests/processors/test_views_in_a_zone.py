"""Views of a history that somebody opens in a zone of their own: the same numbers as in UTC.

A difference of two times counts days of the session's zone in DuckDB, so one over a change of the clock is an hour off
(`findings/duckdb_difference_in_days.sh`).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.processors.views import NAMES
from support.empty_history import new_database

CHANGES = {
    "Europe/Berlin": datetime(2025, 10, 26, 1, tzinfo=UTC),
    "America/New_York": datetime(2025, 11, 2, 6, tzinfo=UTC),
    "Australia/Lord_Howe": datetime(2025, 10, 4, 15, 30, tzinfo=UTC),
}
SPAN = timedelta(hours=36)


def store(folder: Path, change: datetime) -> Path:
    """A history in which everything lasts three days, with a change of the clock in the middle."""
    database = new_database(folder)
    cursor = database.cursor()
    first, last = change - SPAN, change + SPAN

    def insert(table: str, **values: Any) -> None:
        names = ", ".join(f"? AS {name}" for name in values)
        cursor.execute(f"INSERT INTO {table} BY NAME SELECT {names}", list(values.values()))

    insert(
        "requests", uid="u1", request_id="r1", owner="ann", outcome="granted", lease_id="l1", queued=True, gpus=1,
        models=["*T4*"], asked_at=first, ended_at=last, forecast_at=first, forecast_start=change,
        forecast_earliest=first, forecast_latest=last, expected_seconds=3600.0, estimated_low_seconds=1.0,
        estimated_high_seconds=259_300.0,
    )  # fmt: skip
    insert(
        "leases", lease_id="l1", owner="ann", state="released", granted_at=first, ended_at=last, expires_at=last,
    )  # fmt: skip
    insert("lease_devices", lease_id="l1", host="h1", device="d1", model="Tesla T4", share=1.0)
    insert(
        "lease_events", lease_id="l1", owner="ann", state="released", time=last, preemption_notified_at=first,
        preemption_ends_at=last,
    )  # fmt: skip
    insert("jobs", job_id="j1", submitted_at=first, owner="ann", state="done", tasks=1, gpus=1, hosts=1)
    insert(
        "job_tasks", job_id="j1", submitted_at=first, index=0, attempt=1, state="done", lease_id="l1",
        pending_since=first, started_at=first + SPAN / 6, ended_at=last,
    )  # fmt: skip
    insert("drains", target="host:h1", since=first, until=last, reason="memory", operator="eve", window_id="")
    insert("devices", device="d1", host="h1", present=True)
    told = {"violation": "v1", "pid": 1, "since_ns": nanoseconds(first)}
    for time, suffix, data in ((first, "", told), (last, "_ended", {**told, "until_ns": nanoseconds(last)})):
        kind = f"process_without_lease{suffix}"
        insert("events", time=time, host="h1", agent="a1", kind=kind, device="d1", data=json.dumps(data))
    database.close()
    return database.path


def nanoseconds(time: datetime) -> int:
    return int(time.timestamp()) * 10**9


def rows(connection: duckdb.DuckDBPyConnection, view: str, zone: str) -> list[tuple[Any, ...]]:
    connection.execute(f"SET TimeZone = '{zone}'")
    found = connection.execute(f"FROM {view}").fetchall()
    return sorted(
        (tuple(value.astimezone(UTC) if isinstance(value, datetime) else value for value in row) for row in found),
        key=repr,
    )


@pytest.mark.parametrize("zone", CHANGES)
def test_a_view_has_the_same_numbers_in_every_zone(zone: str, tmp_path: Path) -> None:
    with duckdb.connect(str(store(tmp_path, CHANGES[zone])), read_only=True) as connection:
        connection.execute("BEGIN")  # so that now() is one time
        filled = {view: rows(connection, view, "UTC") for view in NAMES}
        assert {name: rows(connection, name, zone) for name in NAMES} == filled
        seconds = 2 * SPAN.total_seconds()
        for value, view in (
            ("wait_seconds_max", "waits_by_owner"),
            ("wait_seconds_p95", "waits_by_model"),
            ("waited_seconds", "queue_forecasts"),
            ("actual_seconds", "duration_estimates"),
            ("notice_seconds", "preemptions"),
            ("pending_seconds + seconds", "job_summary"),
            ("hours * 3600", "host_drains"),
            ("hours * 3600", "lease_violations"),
        ):
            assert connection.execute(f"SELECT {value} FROM {view}").fetchall() == [(seconds,)], view
