"""The analytics views over a small known history: exact answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corral.processors import views
from corral.processors.storage import peaks
from corral.processors.storage.embedded import rollups
from corral.processors.storage.embedded.database import Database
from corral.processors.storage.protocol import Batch
from corral.schemas.metrics import METRICS
from support.empty_history import new_database
from support.known_samples import BASE, GIB, HOUR, NOW, samples


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Any:
    database = Database(tmp_path_factory.mktemp("views") / "history.duckdb")
    database.commit(Batch(stream="S", sequence=1, samples=samples(database), messages=1))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    views.install(cursor)
    for device, index in (("g0", 0), ("g1", 1), ("g2", 2)):
        cursor.execute(
            "INSERT INTO devices BY NAME SELECT ? AS device, 'h1' AS host, ? AS index, 'A100' AS name, "
            "false AS mig_enabled, true AS present, 80 * 2::BIGINT ** 30 AS memory_bytes",
            [device, index],
        )
    cursor.execute("INSERT INTO hosts BY NAME SELECT 'h1' AS host, 16 AS cpus, 10.0 AS interval_seconds")
    leases = [
        ("train-1", "alice", "train", "released", BASE, BASE + HOUR, BASE + HOUR, "g0", 1.0, 40 * GIB),
        # Ends in mid-minute, holds half a device, and says nothing of memory.
        (
            "serve-1",
            "bob",
            "serve",
            "expired",
            BASE + HOUR / 2,
            NOW,
            BASE + timedelta(minutes=90, seconds=30),
            "g1",
            0.5,
            0,
        ),
        # Active now, on a device without samples.
        ("now-1", "carol", "train", "active", NOW - HOUR / 2, NOW + HOUR, None, "g2", 1.0, 70 * GIB),
    ]
    for lease, owner, name, state, granted, expires, ended, device, share, memory in leases:
        cursor.execute(
            "INSERT INTO leases BY NAME SELECT ? AS lease_id, ? AS owner, ? AS name, ? AS state, ? AS granted_at, "
            "? AS expires_at, ? AS ended_at",
            [lease, owner, name, state, granted, expires, ended],
        )
        cursor.execute(
            "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, 'h1' AS host, ? AS device, ? AS share, "
            "? AS memory_bytes, 16 AS cpus",
            [lease, device, share, memory],
        )
    # Of bob's half of a device his own processes are known.
    cursor.execute(
        "INSERT INTO processes BY NAME SELECT ?::TIMESTAMPTZ AS time, 'h1' AS host, 'g1' AS device, pid, "
        "'serve-1' AS lease, pid * 2::BIGINT ** 30 AS memory_used_bytes FROM (VALUES (2), (3)) AS p(pid)",
        [BASE + HOUR],
    )
    peaks.fill(cursor)
    for at, severity, code, kind in (
        (BASE, "hardware", 79, "xid"), (BASE + HOUR, "cleared", 0, "device_returned"),
        (NOW - HOUR / 2, "reset", 48, "xid"),
    ):  # fmt: skip
        cursor.execute(
            "INSERT INTO events BY NAME SELECT ? AS time, 'h1' AS host, ? AS severity, ? AS code, ? AS kind, "
            "? AS device",
            [at, severity, code, kind, "g0" if code != 48 else "g2"],
        )
    yield cursor
    database.close()


def ask(cursor: Any, sql: str) -> list[dict[str, Any]]:
    result = cursor.execute(sql)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def near(**values: Any) -> dict[str, Any]:
    return {name: pytest.approx(value) if isinstance(value, float) else value for name, value in values.items()}


def test_each_view_documents_each_of_its_columns(history: Any) -> None:
    for view in views.VIEWS.values():
        columns = [row[0] for row in history.execute(f"DESCRIBE {view.name}").fetchall()]
        assert columns == list(view.columns), view.name
        assert all(view.columns.values()), view.name
        assert view.question.endswith("?"), view.name
    comments = history.execute("SELECT comment FROM duckdb_views() WHERE view_name = 'lease_usage'").fetchall()
    assert comments == [(views.VIEWS["lease_usage"].question,)]


def test_the_questions_can_be_asked_for(history: Any) -> None:
    rows = dict(history.execute("FROM questions").fetchall())
    assert rows == {view.name: view.question for view in views.VIEWS.values()}


def test_install_again_changes_nothing(history: Any) -> None:
    before = ask(history, "FROM lease_usage ORDER BY lease_id")
    views.install(history)
    after = ask(history, "FROM lease_usage ORDER BY lease_id")
    assert before[1:] == after[1:]


def test_lease_usage_has_the_hours_energy_and_peaks_of_each_lease(history: Any) -> None:
    rows = {row.pop("lease_id"): row for row in ask(history, "FROM lease_usage")}
    assert rows["train-1"] == near(
        owner="alice", name="train", state="released", started=BASE, ended=BASE + HOUR, devices=1, gpu_hours=1.0,
        energy_kwh=(300 * 0.5 + 60 * 0.5) / 1000, gpu_utilization_percent_mean=40.0, gpu_utilization_percent_p95=80.0,
        memory_used_bytes_peak=20 * GIB, memory_granted_bytes=40 * GIB, memory_used_percent=50.0,
    )  # fmt: skip
    # Half a device for 60.5 minutes at 100 W. Its own two processes hold 5 GiB of the device's 70.
    assert rows["serve-1"] == near(
        owner="bob", name="serve", state="expired", started=BASE + HOUR / 2,
        ended=BASE + timedelta(minutes=90, seconds=30), devices=1, gpu_hours=60.5 / 60 / 2,
        energy_kwh=0.1 * 60.5 / 60 / 2, gpu_utilization_percent_mean=0.0, gpu_utilization_percent_p95=0.0,
        memory_used_bytes_peak=5 * GIB, memory_granted_bytes=0, memory_used_percent=None,
    )  # fmt: skip
    # Without samples nothing is known but the time, and that goes on: other tests may have run since NOW.
    assert rows["now-1"]["gpu_hours"] == pytest.approx((datetime.now(UTC) - NOW) / HOUR + 0.5, abs=0.02)
    assert rows["now-1"]["energy_kwh"] is rows["now-1"]["gpu_utilization_percent_mean"] is None


def test_a_lease_is_cut_into_whole_hours_and_minutes_around_them(history: Any) -> None:
    pieces = "SELECT width, count(*) AS n, min(time) AS first, sum(seconds) AS seconds FROM lease_buckets"
    rows = {
        lease: {row.pop("width"): row for row in ask(history, f"{pieces} WHERE lease_id = '{lease}' GROUP BY width")}
        for lease in ("train-1", "serve-1")
    }
    assert rows["train-1"] == {"hour": {"n": 1, "first": BASE, "seconds": 3600}}
    assert rows["serve-1"] == {"minute": {"n": 61, "first": BASE + HOUR / 2, "seconds": 3630}}
    # From 0:10:30 to 2:05: ten minutes and a half, an hour, five minutes.
    history.execute("BEGIN")
    history.execute(
        "UPDATE leases SET granted_at = ?, ended_at = ? WHERE lease_id = 'train-1'",
        [BASE + timedelta(minutes=10, seconds=30), BASE + timedelta(hours=2, minutes=5)],
    )
    rows = {row.pop("width"): row for row in ask(history, f"{pieces} WHERE lease_id = 'train-1' GROUP BY width")}
    (usage,) = ask(history, "SELECT gpu_utilization_percent_mean AS mean FROM lease_usage WHERE lease_id = 'train-1'")
    (idle,) = ask(history, "SELECT idle_hours, longest_idle_hours FROM idle_while_leased WHERE lease_id = 'train-1'")
    history.execute("ROLLBACK")
    assert rows == {
        "hour": {"n": 1, "first": BASE + HOUR, "seconds": 3600},
        "minute": {"n": 55, "first": BASE + timedelta(minutes=10), "seconds": 49.5 * 60 + 5 * 60},
    }
    # Busy at 80% for 19.5 minutes of the 109.5 with samples; the last five have none.
    assert usage["mean"] == pytest.approx(80 * 19.5 / 109.5)
    assert idle == {"idle_hours": pytest.approx(1.5), "longest_idle_hours": pytest.approx(1.5)}


def test_idle_while_leased(history: Any) -> None:
    rows = {row.pop("lease_id"): row for row in ask(history, "FROM idle_while_leased")}
    assert set(rows) == {"train-1", "serve-1"}
    assert rows["train-1"] == near(
        owner="alice", name="train", host="h1", device="g0", idle_hours=0.5, idle_gpu_hours=0.5, idle_percent=50.0,
        longest_idle_hours=0.5, idle_since=BASE + HOUR / 2, idle_kwh=0.03,
    )  # fmt: skip
    # Ten minutes without samples break the stretch and count neither way.
    assert rows["serve-1"] == near(
        owner="bob", name="serve", host="h1", device="g1", idle_hours=50.5 / 60, idle_gpu_hours=50.5 / 120,
        idle_percent=100.0, longest_idle_hours=30 / 60, idle_since=BASE + timedelta(minutes=70),
        idle_kwh=0.1 * 50.5 / 120,
    )  # fmt: skip


def test_usage_by_owner(history: Any) -> None:
    rows = {row.pop("owner"): row for row in ask(history, "FROM usage_by_owner")}
    assert rows["alice"] == near(
        leases=1, gpu_hours=1.0, idle_gpu_hours=0.5, idle_percent=50.0, energy_kwh=0.18,
        gpu_utilization_percent_mean=40.0,
    )  # fmt: skip
    assert rows["carol"]["idle_gpu_hours"] == 0


def test_fleet_by_hour(history: Any) -> None:
    rows = {row.pop("hour"): row for row in ask(history, "FROM fleet_by_hour")}
    assert sorted(rows) == [BASE - HOUR, BASE, BASE + HOUR]
    assert rows[BASE] == near(
        devices=2, gpu_utilization_percent=20.0, busy_devices=1, leased_devices=1 + 0.25,
        memory_used_percent=100 * (10.5 + 70) / 160, power_watts=181.0, energy_kwh=0.18 + 0.1,
        temperature_celsius_max=90.0,
    )  # fmt: skip
    assert rows[BASE + HOUR]["leased_devices"] == pytest.approx(30.5 / 60 / 2)


def test_a_device_whose_host_has_had_two_names_is_one_device(tmp_path: Path) -> None:
    database = new_database(tmp_path)
    table = samples(database).slice(0, 0)
    one, other = (database.series.number(host, "g0") for host in ("pod", "node"))
    seconds = range(0, 3600, 10)
    columns = {name: pa.array([None] * len(seconds), table.schema.field(name).type) for name in METRICS}
    columns["power_watts"] = pa.array([300.0] * len(seconds), pa.float32())
    rows = {
        "time": pa.array([BASE + timedelta(seconds=at) for at in seconds], pa.timestamp("us", "UTC")),
        "series": pa.array([one if at < 1200 else other for at in seconds], pa.int32()),
    }
    database.commit(Batch(stream="S", sequence=1, samples=pa.table(rows | columns), messages=1))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    views.install(cursor)
    cursor.execute("INSERT INTO hosts BY NAME SELECT unnest(['pod', 'node']) AS host, 10.0 AS interval_seconds")
    (row,) = ask(cursor, "SELECT devices, power_watts, energy_kwh FROM fleet_by_hour")
    database.close()
    assert row == near(devices=1, power_watts=300.0, energy_kwh=0.3)


def test_samples_that_a_host_makes_up_of_another_ones_device_do_not_count(tmp_path: Path) -> None:
    database = new_database(tmp_path)
    table = samples(database).slice(0, 0)
    good, evil = (database.series.number(host, "g0") for host in ("good", "evil"))
    times = [BASE + timedelta(seconds=at) for at in range(0, 3600, 10)]
    columns = {name: pa.array([None] * 2 * len(times), table.schema.field(name).type) for name in METRICS}
    columns["power_watts"] = pa.array([300.0] * len(times) + [900.0] * len(times), pa.float32())
    columns["temperature_celsius"] = pa.array([40.0] * len(times) + [120.0] * len(times), pa.float32())
    rows = {
        "time": pa.array(times * 2, pa.timestamp("us", "UTC")),
        "series": pa.array([good] * len(times) + [evil] * len(times), pa.int32()),
    }
    database.commit(Batch(stream="S", sequence=1, samples=pa.table(rows | columns), messages=1))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    views.install(cursor)
    cursor.execute("INSERT INTO hosts BY NAME SELECT unnest(['good', 'evil']) AS host, 10.0 AS interval_seconds")
    cursor.execute("INSERT INTO devices BY NAME SELECT 'g0' AS device, 'good' AS host, true AS present")
    (row,) = ask(cursor, "SELECT devices, power_watts, energy_kwh, temperature_celsius_max FROM fleet_by_hour")
    database.close()
    assert row == near(devices=1, power_watts=300.0, energy_kwh=0.3, temperature_celsius_max=40.0)


def test_throttling_counts_the_seconds_of_each_reason_and_no_hour_without(history: Any) -> None:
    (row,) = ask(history, "FROM throttling")
    assert row == near(
        hour=BASE, host="h1", device="g0", thermal_seconds=600, power_seconds=1200, slowdown_seconds=0,
        throttled_percent=50.0, sm_clock_percent=50.0, temperature_celsius_max=90.0, power_watts_max=300.0,
        power_limit_watts=None,
    )  # fmt: skip


def test_device_health(history: Any) -> None:
    rows = {row.pop("device"): row for row in ask(history, "FROM device_health")}
    assert rows["g0"]["concern"] == "rows remapped after uncorrectable errors; uncorrectable memory errors; Xid 79"
    assert rows["g0"]["unhealthy"] is None  # cleared since
    assert (rows["g0"]["xid_events"], rows["g0"]["last_xid"], rows["g0"]["last_xid_at"]) == (1, 79, BASE)
    assert (rows["g0"]["ecc_uncorrected_7d"], rows["g0"]["remapped_rows"], rows["g0"]["remapped_rows_7d"]) == (1, 3, 3)
    # 0, 0, 3 at the hours: a slope of 1.5 an hour.
    assert rows["g0"]["remapped_rows_per_week"] == pytest.approx(1.5 * 168)
    assert rows["g1"]["concern"] == ""
    assert (rows["g2"]["concern"], rows["g2"]["unhealthy"]) == ("needs a reset; Xid 48", "reset")


def test_memory_right_sizing(history: Any) -> None:
    assert ask(history, "FROM memory_right_sizing") == [
        {
            "name": "train", "leases": 1, "memory_granted_bytes": 40 * GIB, "memory_used_bytes_p50": 20 * GIB,
            "memory_used_bytes_p99": 20 * GIB, "memory_used_bytes_max": 20 * GIB, "suggested_bytes": 22 * GIB,
            "over_asked_bytes": 18 * GIB,
        }
    ]  # fmt: skip


def test_devices_now_and_stranded_capacity(history: Any) -> None:
    assert ask(history, "FROM devices_now") == []  # the samples are hours old
    cursor = history
    cursor.execute("BEGIN")
    for device, used, share in (("g0", 30 * GIB, None), ("g1", 75 * GIB, 0.5), ("g2", 2 * GIB, None)):
        cursor.execute(
            "INSERT INTO store.rollup_10s BY NAME SELECT now() - INTERVAL 5 SECONDS AS time, series, 9 AS batch, "
            "1 AS samples, ? AS memory_used_bytes_last, 80 * 2::BIGINT ** 30 AS memory_total_bytes_last, "
            "50 AS gpu_utilization_percent_last "
            "FROM (SELECT series FROM store.series WHERE device = ? UNION SELECT 99 WHERE ? = 'g2')",
            [used, device, device],
        )
        if share is not None:
            cursor.execute(
                "UPDATE leases SET state = 'active', ended_at = NULL, expires_at = now() + INTERVAL 1 HOUR "
                "WHERE lease_id = 'serve-1'"
            )
    cursor.execute("INSERT INTO store.series VALUES (99, 'h1', 'g2')")
    cursor.execute("UPDATE lease_devices SET cpus = 8 WHERE lease_id = 'now-1'")
    now = {row["device"]: row for row in ask(cursor, "FROM devices_now")}
    assert (now["g1"]["owner"], now["g1"]["gpu_utilization_percent"]) == ("bob", 50)
    assert (now["g0"]["owner"], now["g0"]["memory_used_bytes"]) == (None, 30 * GIB)
    found = ask(cursor, "FROM stranded_capacity ORDER BY device, reason")
    cursor.execute("ROLLBACK")
    assert [(r["device"], r["reason"], r["stranded_share"], r["stranded_memory_bytes"] // GIB) for r in found] == [
        ("g0", "foreign", 1, 30),
        ("g0", "no_cores", 1, 50),
        ("g1", "memory_full", 0.5, 0),
        ("g1", "no_cores", 0.5, 5),
        ("g2", "share_full", 0, 10),
        ("g2", "unhealthy", 0, 10),
    ]


def test_the_document_is_fresh() -> None:
    written = (Path(views.__file__).parents[2] / "docs" / "views.md").read_text()
    assert written == views.document(), "run `make docs`"
