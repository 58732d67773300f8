"""Idle leases from the history: what a rule would have done, by hand, and who holds idle GPUs now."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client.reports.idle_query import held_and_known, held_and_listed, idle_now, what_if
from corral.processors.embedded import EmbeddedHistory
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.service import process
from corral.processors.storage import Batch, Database
from corral.processors.storage.embedded import rollups
from corral.schemas.work.idle import IdleRule, parse_rule
from support.empty_history import empty_history
from support.local_cluster import invoke

NOW = datetime.now(UTC).replace(second=0, microsecond=0)
BASE = NOW.replace(minute=0) - timedelta(hours=6)
MINUTE = timedelta(minutes=1)
RULE = "below 5% for 30m: end after 10m"


def at(text: str) -> datetime:
    hours, _, minutes = text.partition(":")
    return BASE + timedelta(hours=int(hours), minutes=int(minutes))


def load(device: str, time: datetime, now: datetime) -> float | None:
    """Utilization in percent; None for no sample."""
    match device:
        case "g0":  # active for half an hour, and for one sample at 2:00
            return 90.0 if time < at("0:30") or time == at("2:00") else 0.0
        case "g1":
            return 90.0 if time < at("0:40") else 2.0
        case "g2":  # one active sample, and ten minutes without samples
            return None if at("1:00") <= time < at("1:10") else 50.0 if time == at("0:20") else 0.0
        case "g3":  # a minute without samples
            return None if at("2:10") <= time < at("2:11") else 60.0 if at("0:35") <= time < at("2:00") else 1.0
        case _:
            return 70.0 if time < now - 20 * MINUTE else 0.0


LEASES = [
    ("a", "ann", at("0:00"), at("3:00"), "released", [("g0", 1.0), ("g1", 1.0)]),
    ("b", "ben", at("0:00"), at("4:00"), "expired", [("g2", 1.0)]),
    ("c", "cat", at("0:00"), at("2:00"), "released", [("g3", 1.0)]),
    ("d", "dan", at("2:00"), at("4:00"), "released", [("g3", 0.5)]),
    ("e", "eve", NOW - 2 * 60 * MINUTE, None, "active", [("g4", 1.0)]),
]


@pytest.fixture(scope="module")
def now() -> datetime:
    """The minute in which the history is made, which may be long after this file was read."""
    return datetime.now(UTC).replace(second=0, microsecond=0)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, now: datetime) -> Path:
    path = tmp_path_factory.mktemp("idle") / "history.duckdb"
    database = Database(Path(shutil.copy(empty_history(), path)))
    times: list[datetime] = []
    series: list[int] = []
    percents: list[float] = []
    for device in ("g0", "g1", "g2", "g3", "g4"):
        number = database.series.number("h1", device)
        first, last = (now - 30 * MINUTE, now) if device == "g4" else (BASE, at("4:00"))
        for tick in range(round((last - first).total_seconds()) // 20):
            time = first + timedelta(seconds=20 * tick)
            if (percent := load(device, time, now)) is not None:
                times.append(time)
                series.append(number)
                percents.append(percent)
    columns: dict[str, Any] = {field.name: [None] * len(times) for field in list(SCHEMA)[2:]}
    table = pa.table({"time": times, "series": series, **columns, "gpu_utilization_percent": percents}, schema=SCHEMA)
    database.commit(Batch(stream="S", sequence=1, samples=table))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    for lease_id, owner, granted, ended, state, devices in LEASES:
        cursor.execute(
            "INSERT INTO leases BY NAME SELECT ? AS lease_id, ? AS owner, ? AS state, ? AS granted_at, "
            "? AS expires_at, ? AS ended_at",
            [lease_id, owner, state, granted, ended or now + 60 * MINUTE, ended],
        )
        for device, share in devices:
            cursor.execute(
                "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, 'h1' AS host, ? AS device, ? AS share",
                [lease_id, device, share],
            )
    cursor.execute("CHECKPOINT")
    database.close()
    return path


HITS = {
    # Idle from 0:40 on, when the second device is; again active at 2:00.
    "a": (at("1:10"), at("1:20"), at("2:00"), 2 * 40 / 60, 2.0),
    # 39 minutes are too few for the action; after the gap it counts anew.
    "b": (at("0:51"), at("1:50"), None, 130 / 60, 0.0),
    "c": (at("0:30"), None, None, 0.0, 0.0),
    # The minute without samples does not count, and does not end the stretch.
    "d": (at("2:31"), at("2:41"), None, 0.5 * 79 / 60, 0.0),
}


def test_what_a_rule_would_have_done_is_what_a_hand_computes(history: Path, now: datetime) -> None:
    database = Database(history)
    cursor = database.cursor()
    since = (BASE - timedelta(days=1)).timestamp()

    def rows(sql: str) -> list[dict[str, Any]]:
        found = cursor.execute(sql)
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    found = {row["lease_id"]: row for row in rows(what_if(parse_rule(RULE), since))}
    for lease_id, (warned, acted, again, freed, lost) in HITS.items():
        row = found.pop(lease_id)
        assert (row["warned_at"], row["acted_at"], row["active_again_at"]) == (warned, acted, again), lease_id
        assert (row["freed_gpu_hours"] or 0.0, row["lost_gpu_hours"] or 0.0) == pytest.approx((freed, lost))
        assert row["warnings"] == (2 if lease_id in "ab" else 1)
    assert found == {}
    # Below 2% the second device of ann counts as active: its least sample in an hour says so.
    less = {row["lease_id"] for row in rows(what_if(parse_rule("below 2% for 30m: end after 10m"), since))}
    assert less == {"b", "c", "d"}
    warned = {row["lease_id"]: row for row in rows(what_if(parse_rule("no activity for 1h: warn"), since))}
    assert {lease_id: row["acted_at"] for lease_id, row in warned.items()} == {"b": at("2:10")}
    held = {row["owner"]: (row["held_gpu_hours"], row["known_gpu_hours"]) for row in rows(held_and_known(since))}
    assert held["ann"] == pytest.approx((6, 6))
    assert held["ben"] == pytest.approx((4, 4 - 10 / 60))
    assert held["dan"] == pytest.approx((1, 1 - 0.5 / 60))
    # Two minutes may pass between the samples and the question.
    idle = rows(idle_now(IdleRule(below_percent=5.0, after_seconds=600.0), since))
    assert [(row["lease_id"], row["since"], row["peak_percent"]) for row in idle] == [("e", now - 20 * MINUTE, 0.0)]
    database.close()


# Devices of host h2, with their lease and owner: the processes in each list of the host.
LISTED: dict[str, tuple[str, str, Callable[[datetime], dict[str, str] | None]]] = {
    "p0": ("x", "ann", lambda time: None if at("0:30") <= time < at("2:00") or time >= at("2:30") else {"lease": "x"}),
    "p1": ("y", "ben", lambda time: {"lease": "y"}),
    # A desktop is no work; a process that no lease explains may be; one of which only the id is known may be anything.
    "p2": ("v", "dan", lambda time: {"name": "Xorg", "kind": "graphics"}),
    "p3": ("u", "eve", lambda time: {"name": "python", "user": "eve"}),
    "p4": ("t", "fay", lambda time: {}),
}


def with_processes(path: Path) -> Database:
    """A history in which h2 always has a process, h3 has none from 0:20 on, and h4 has no lists."""
    database = Database(Path(shutil.copy(empty_history(), path)))
    times = [BASE + timedelta(seconds=20 * tick) for tick in range(3 * 60 * 3)]
    sampled = [time for time in times if not at("1:00") <= time < at("1:10")]
    columns: dict[str, Any] = {field.name: [None] * len(sampled) for field in list(SCHEMA)[2:]}
    columns |= {"gpu_utilization_percent": [0.0] * len(sampled)}
    series = [database.series.number("h3", "q0")] * len(sampled)
    table = pa.table({"time": sampled, "series": series, **columns}, schema=SCHEMA)
    database.commit(Batch(stream="S", sequence=1, samples=table))
    cursor = database.cursor()
    for level in rollups.LEVELS:
        rollups.refresh(cursor, level, sorted(database.days))
    held = [(lease_id, owner, "h2", device) for device, (lease_id, owner, _) in LISTED.items()]
    for lease_id, owner, host, device in [*held, ("z", "cat", "h3", "q0"), ("w", "gus", "h4", "r0")]:
        cursor.execute(
            "INSERT INTO leases BY NAME SELECT ? AS lease_id, ? AS owner, 'released' AS state, ? AS granted_at, "
            "? AS expires_at, ? AS ended_at",
            [lease_id, owner, at("0:00"), at("3:00"), at("3:00")],
        )
        cursor.execute(
            "INSERT INTO lease_devices BY NAME SELECT ? AS lease_id, ? AS host, ? AS device, 1.0 AS share",
            [lease_id, host, device],
        )
    rows = [
        [time, "h2", device, found.get("kind", "compute"), found.get("name", ""), found.get("user", ""), lease]
        for time in times
        for device, (_, _, process_at) in LISTED.items()
        if (found := process_at(time)) is not None
        for lease in [found.get("lease", "")]
    ]
    rows += [[time, "h3", "q0", "compute", "python", "cat", "z"] for time in times if time < at("0:20")]
    cursor.executemany(
        'INSERT INTO processes (time, host, device, kind, name, "user", lease) VALUES (?, ?, ?, ?, ?, ?, ?)', rows
    )
    cursor.execute("INSERT INTO store.without_processes VALUES (?, 'h3')", [at("0:20")])
    return database


def test_a_rule_about_processes_is_answered_from_their_lists(tmp_path: Path) -> None:
    database = with_processes(tmp_path / "history.duckdb")
    cursor = database.cursor()
    since = (BASE - timedelta(days=1)).timestamp()
    found = cursor.execute(what_if(parse_rule("no process for 30m: end after 10m"), since)).fetchall()
    # After the minutes without samples it counts anew for z; the action was before.
    assert {row[0]: row[4:8] for row in found} == {
        "x": (at("1:00"), 2, at("1:10"), at("2:00")),
        "z": (at("0:50"), 2, at("1:00"), None),
        "v": (at("0:30"), 1, at("0:40"), None),
    }
    assert {row[0]: row[8:] for row in found} == {
        "x": pytest.approx((50 / 60, 1.0)),
        "z": pytest.approx((2.0, 0.0)),
        "v": pytest.approx((140 / 60, 0.0)),
    }
    known = {row[0]: row[2:] for row in cursor.execute(held_and_listed(since)).fetchall()}
    assert known == {
        **{owner: pytest.approx((3, 3)) for owner in ("ann", "ben", "dan", "eve")},
        "cat": pytest.approx((3, 3 - 10 / 60)),
        "fay": pytest.approx((3, 0)),
        "gus": pytest.approx((3, 0)),
    }
    database.close()


async def test_the_command_asks_over_the_bus(server: EmbeddedServer, history: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(history, tmp_path / "history.duckdb"))
    ready = asyncio.Event()
    task = asyncio.create_task(process(EmbeddedHistory(path), nats_url=server.url, ready=ready))
    await asyncio.wait([task, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    asked = await asyncio.to_thread(invoke, "idle", "--what-if", RULE, "--json", url=server.url)
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    assert (found["warned"], found["acted"], found["false_alarms"]) == (4, 3, 1)
    assert found["freed_gpu_hours"] == pytest.approx(sum(hit[3] for hit in HITS.values()))
    assert found["lost_gpu_hours"] == pytest.approx(2.0)
    shown = await asyncio.to_thread(invoke, "idle", "--what-if", RULE, url=server.url)
    assert "1 leases were active again afterwards, for 2.0 GPU-hours" in " ".join(shown.stdout.split())
    assert "the rest counts as not idle" in shown.stdout
    wrong = await asyncio.to_thread(invoke, "idle", "--what-if", "no process for 1h", url=server.url)
    assert (wrong.returncode, "the history holds no lists of processes" in wrong.stderr) == (5, True)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
