"""The lake as a storage: fenced, exactly once, and with the same answers as the embedded database."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.processors.ingest import facts
from corral.processors.ingest.columnar import Decoder, Incoming
from corral.processors.storage.embedded import rollups
from corral.processors.storage.embedded.database import Database
from corral.processors.storage.errors import Deposed, StorageError, StoragePaused
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.lake import maintenance
from corral.processors.storage.lake import readers as lake_readers
from corral.processors.storage.lake.snapshot import write_snapshot
from corral.processors.storage.protocol import Arrival, Batch
from corral.processors.views import VIEWS
from corral.schemas import codec, subjects
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState, WorkRequest
from corral.schemas.telemetry import (
    AgentReport,
    DeviceEvent,
    DeviceInfo,
    HostInfo,
    Inventory,
    Link,
    ProcessBatch,
    ProcessSample,
    Severity,
)
from corral.schemas.work.jobs import JobState
from msgspec.structs import replace
from support.counter_stories import tell_stories
from support.history import known_since_version_3, sample_batch
from support.job_events import JobHistory
from support.known_samples import BASE, GIB, HOUR
from support.known_samples import samples as known_samples
from support.lake_owner import Owned
from support.postgres import Postgres

pytestmark = pytest.mark.long

PART = "CORRAL_PARTITIONS/0"


def batch(part: lakes.LakePart, sequence: int) -> Batch:
    payload = codec.encode(sample_batch("h1", sequence, devices=3, ticks=2))
    message = Incoming(subjects.samples_subject("h1"), payload, sequence)
    table, _, refused = Decoder(part.series).decode([message], lambda *_: True, time.time_ns())
    assert not refused
    return Batch(stream=PART, sequence=sequence, samples=table, arrivals=[Arrival("run-h1", sequence, 1)], messages=1)


def test_of_two_owners_at_the_same_moment_one_stores(lake: lakes.Lake) -> None:
    history = lakes.prepare(lake, 2)
    first, second = (lakes.LakePart(lake, history, PART) for _ in range(2))
    assert first.resume(PART, "made") == 0
    stored = 0
    ended: list[BaseException] = []

    def store() -> None:
        nonlocal stored
        try:
            for sequence in range(1, 500):
                first.commit(batch(first, sequence))
                stored = sequence
        except BaseException as error:
            ended.append(error)

    # The first one commits as fast as it can while the part is taken over.
    thread = threading.Thread(target=store)
    thread.start()
    while stored < 3:
        time.sleep(0.01)
    after = second.resume(PART, "made")
    for sequence in range(after + 1, after + 4):
        second.commit(batch(second, sequence))
    thread.join(20)
    assert [type(error) for error in ended] == [Deposed]
    assert stored == after
    # What is stored already changes nothing.
    second.commit(batch(second, after + 3))
    cursor = second.cursor()
    assert cursor.execute("SELECT count(*), max(gpu_utilization_percent) FROM samples").fetchone() == (
        (after + 3) * 6,
        float(max(number % 100 for number in range(1, after + 3 + 6))),
    )
    assert second.arrivals(PART) == [Arrival("run-h1", after + 3, 1)]
    with pytest.raises(StorageError, match="has 2 partitions"):
        lakes.prepare(lake, 3)
    # A stream that was made anew counts from 1 again.
    assert second.resume(PART, "made anew") == 0
    first.close()
    second.close()


def test_a_lake_is_attached_anew_now_and_then(lake: lakes.Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DuckLake remembers of each snapshot would grow for as long as a processor runs."""
    monkeypatch.setattr(lakes, "RENEW_COMMITS", 2)
    monkeypatch.setattr(lake_readers, "RENEW_COMMITS", 2)
    attached: list[lakes.Lake] = []
    attach = lakes.attach
    monkeypatch.setattr(lakes, "attach", lambda *args, **how: (attached.append(lake), attach(*args, **how))[1])
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), PART)
    part.resume(PART, "made")
    before = len(attached)
    for sequence in range(1, 6):
        part.commit(batch(part, sequence))
    assert len(attached) == before + 2
    part.close()
    asking = lake_readers.Readers(lake)
    cursors = [asking.cursor() for _ in range(5)]
    # Those of an instance that was replaced go on.
    assert [cursor.execute("SELECT count(*) FROM samples").fetchone() for cursor in cursors] == [(30,)] * 5
    asking.close()


def test_no_column_of_a_lake_has_a_type_that_files_round(lake: lakes.Lake) -> None:
    """DuckLake of DuckDB 1.5.5 keeps 53 bits of a HUGEINT (findings/ducklake_rounds_hugeint.sh)."""
    lakes.prepare(lake, 2)
    with lakes.attach(lake) as opened:
        kept = "SELECT table_oid FROM duckdb_tables()"
        sql = f"SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE table_oid IN ({kept})"
        columns = opened.execute(sql).fetchall()
    assert len(columns) > 100
    assert [column for column in columns if "HUGEINT" in column[2]] == []


def test_a_watermark_of_an_older_lake_has_no_mark_until_its_next_batch(lake: lakes.Lake) -> None:
    history = lakes.prepare(lake, 2)
    with lakes.attach(lake) as older:
        older.execute(
            "CREATE TABLE store.watermark_corral_partitions_0 "
            "(part VARCHAR, created VARCHAR, sequence UBIGINT, fence UBIGINT)"
        )
        older.execute("INSERT INTO store.watermark_corral_partitions_0 VALUES (?, 'made', 7, 3)", [PART])
    part = lakes.LakePart(lake, history, PART)
    assert (part.resume(PART, "made"), part.marked_ns(PART)) == (7, 0)
    part.commit(Batch(stream=PART, sequence=8, stored_ns=77))
    again = lakes.LakePart(lake, history, PART)
    assert (again.resume(PART, "made"), again.marked_ns(PART)) == (8, 77)
    with lakes.attach(lake) as older:
        older.execute("UPDATE store.watermark_corral_partitions_0 SET sequence = 9")
    assert (again.resume(PART, "made"), again.marked_ns(PART)) == (9, 0)
    part.close()
    again.close()


def test_a_catalog_that_is_away_pauses_and_loses_nothing(lake: lakes.Lake, postgres: Postgres) -> None:
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), PART)
    part.resume(PART, "made")
    part.commit(batch(part, 1))
    reader = lakes.attach(lake, read_only=True)
    assert reader.execute("SELECT count(*) FROM samples").fetchone() == (6,)
    waiting = batch(part, 2)
    postgres.stop()
    with pytest.raises(StoragePaused):
        part.commit(waiting)
    with pytest.raises(StoragePaused):
        part.commit(waiting)
    postgres.start()
    part.commit(waiting)
    assert part.cursor().execute("SELECT count(*) FROM samples").fetchone() == (12,)
    # A reader that was there before needs no new connection.
    assert reader.execute("SELECT count(*) FROM samples").fetchone() == (12,)
    reader.close()
    part.close()


def test_every_view_answers_as_the_embedded_one_does(lake: lakes.Lake, tmp_path: Path) -> None:
    """But for the p95 of an hour, which both have within 0.5 or 1%."""
    database = Database(tmp_path / "history.duckdb")
    part = Owned(lake, lakes.prepare(lake, 2), PART)
    found = facts.decode(facts_messages(), lambda *_: True, time.time_ns())
    assert not found.refused
    job = JobHistory("7", 2, WorkRequest(owner="ann", gpus=1, gpu_memory_bytes=GIB), BASE)
    job.run(0, 1, (0, 0, 3600), JobState.FAILED)
    job.run(1, 1, (0, 60), JobState.RUNNING)
    jobs = [
        replace(event, tasks=[replace(task, lease_id=f"l{task.index + 1}") for task in event.tasks])
        for event in job.events
    ]
    for storage in (database, part):
        table = known_samples(storage)  # type: ignore[arg-type]
        half = table.num_rows // 2 + 7
        rest = Batch(
            stream=PART, sequence=2, samples=table.slice(0, half), tables=found.tables(),
            inventories=found.inventories, leases=found.leases, jobs=jobs,
        )  # fmt: skip
        for one in (Batch(stream=PART, sequence=1, samples=table.slice(half)), rest):
            storage.commit(one)
            if storage is part:
                # In between, so that what comes then corrects what is there.
                part.roll_up()
                maintenance.once(lake)
        # The same lease events and inventories again change nothing.
        storage.commit(
            Batch(stream=PART, sequence=3, inventories=found.inventories, leases=found.leases, jobs=jobs[:2])
        )
    for level in rollups.LEVELS:
        rollups.refresh(database.cursor(), level, sorted(database.days))
    both = database.cursor(), part.cursor()
    names = ["samples", "rollup_10s", "rollup_1m", "rollup_1h", "rollup_1m_bins", "rollup_1h_bins"]
    names += [
        "devices",
        "hosts",
        "host_facts",
        "links",
        "leases",
        "lease_devices",
        "lease_events",
        "drains",
        "jobs",
        "job_tasks",
        *VIEWS,
    ]
    for name in names:
        expected, got = (rows(cursor, name) for cursor in both)
        columns = [row[0] for row in both[0].execute(f"DESCRIBE {name}").fetchall()]
        unequal = [
            (row[:3], column, a, b)
            for row, other in zip(expected, got, strict=True)
            for column, a, b in zip(columns, row, other, strict=False)
            if a != b and not ("p95" in column and abs(a - b) <= max(0.5, 0.01 * a))
        ]
        assert unequal == [], name
    assert len(rows(both[1], "rollup_1m")) > 200
    # A copy to take away has them too, and nobody takes it for a history to write on.
    copy = tmp_path / "copy.duckdb"
    assert write_snapshot(lake, copy, True, HOUR) == len(rows(both[1], "samples"))
    with duckdb.connect(str(copy)) as opened:
        opened.execute("SET TimeZone = 'UTC'")
        for name in ("samples", "rollup_1h", "lease_usage", "idle_while_leased", "throttling"):
            assert rows(opened, name) == rows(both[1], name), name
    with pytest.raises(StorageError, match="corral lake copy"):
        Database(copy)
    assert 0 < write_snapshot(lake, tmp_path / "recent.duckdb", False, 2.5 * HOUR) < len(rows(both[1], "samples"))
    assert rows(both[1], "leases")
    part.close()
    database.close()


def test_counters_grow_as_in_the_embedded_storage(lake: lakes.Lake) -> None:
    part = Owned(lake, lakes.prepare(lake, 2), PART)
    tell_stories(part, PART, part.roll_up)
    part.close()


def facts_messages() -> list[Incoming]:
    """What was on h1 while the known samples were taken."""
    time_ns = int(BASE.timestamp() * 1e9)
    uuids = ["g0", "g1"]
    inventory = Inventory(
        host=HostInfo(name="h1", cpus=64, memory_bytes=2**39, labels={"rack": "r1"}),
        agent="a",
        time_ns=time_ns,
        interval_seconds=10.0,
        devices=[
            DeviceInfo(uuid=uuid, host="h1", index=at, name="A100", memory_bytes=80 * GIB, cpu_affinity=[0, 1])
            for at, uuid in enumerate(uuids)
        ],
        links=[[Link.SAME, Link.NVLINK], [Link.NVLINK, Link.SAME]],
        nvlink_counts=[[0, 18], [18, 0]],
    )
    later = replace(inventory, time_ns=time_ns + 60 * 10**9)
    moved = replace(later, host=HostInfo(name="h2"), time_ns=later.time_ns + 1, devices=[], links=[], nvlink_counts=[])
    event = DeviceEvent(
        host="h1", agent="a", sequence=2, time_ns=time_ns, kind="xid", severity=Severity.RESET, device="g0", code=79
    )
    run = ProcessSample(device="g1", pid=7, memory_used_bytes=2**30, name="python", lease="l2")
    processes = ProcessBatch(host="h1", agent="a", sequence=3, time_ns=time_ns + 10**9, processes=[run])
    report = AgentReport(host="h1", agent="a", sequence=4, time_ns=time_ns, ticks=9)
    found = [
        (subjects.inventory_subject("h1"), codec.encode(inventory)),
        (subjects.inventory_subject("h1"), codec.encode(later)),
        (subjects.inventory_subject("h2"), codec.encode(moved)),
        (subjects.events_subject("h1"), codec.encode(event)),
        # As a partition's consumer sees them.
        (f"{subjects.PROCESSES}.1.h1", codec.encode(processes)),
        (f"{subjects.AGENTS}.1.h1", codec.encode(report)),
    ]
    for lease_id, device, ended in (("l1", "g0", True), ("l2", "g1", False)):
        lease = Lease(
            lease_id=lease_id,
            owner="ann",
            state=LeaseState.ACTIVE,
            granted_at=BASE,
            expires_at=BASE + HOUR,
            ttl_seconds=3600.0,
            name="train",
            labels={"team": "vision"},
            grants=[Grant(host="h1", device=device, index=0, memory_bytes=40 * GIB)],
        )
        changes = [(LeaseEventKind.GRANTED, lease, BASE)]
        if ended:
            done = replace(lease, state=LeaseState.RELEASED, ended_at=BASE + HOUR / 2, reason="done")
            changes.append((LeaseEventKind.RELEASED, done, BASE + HOUR / 2))
            changes.append((LeaseEventKind.RENEWED, lease, BASE + HOUR / 4))
        for kind, state, at in changes:
            payload = codec.encode(LeaseEvent(kind=kind, time=at, lease=state, planner="p"), codec.JSON)
            found.append((subjects.lease_subject(kind.value, lease_id), payload))
    return [Incoming(subject, payload, at) for at, (subject, payload) in enumerate(found, start=1)]


def test_a_nul_in_a_text_stops_no_history(lake: lakes.Lake, tmp_path: Path) -> None:
    """PostgreSQL stores none, and a message is read again until it is stored."""
    database = Database(tmp_path / "history.duckdb")
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), PART)
    part.resume(PART, "made")
    words = {
        b"A100": b"A1\0'",
        b"python": b"pyth\0n",
        b"r1": b"\0'",
        b'"train"': b'"tr\\u0000n"',
        b'"vision"': b'"\\u0000"',
    }
    messages = facts_messages()
    for word, other in words.items():
        messages = [
            Incoming(message.subject, message.payload.replace(word, other), message.sequence) for message in messages
        ]
    found = facts.decode(messages, lambda *_: True, time.time_ns())
    assert not found.refused
    job = JobHistory("7", 1, WorkRequest(owner="ann", gpus=1, name="a\0b"), BASE)
    job.run(0, 1, (0, 0, 60), JobState.FAILED)
    batch = Batch(
        stream=PART, sequence=1, tables=found.tables(), inventories=found.inventories, leases=found.leases,
        jobs=job.events,
    )  # fmt: skip
    for storage in (database, part):
        storage.commit(batch)
        cursor = storage.cursor()
        told = cursor.execute("SELECT name, (SELECT any_value(name) FROM processes) FROM devices WHERE host = 'h1'")
        assert told.fetchall() == [("A1\ufffd'", "pyth\ufffdn")] * 2
        assert cursor.execute("SELECT DISTINCT name, labels FROM leases").fetchall() == [
            ("tr\ufffdn", {"team": "\ufffd"}),
        ]
    for name in ("hosts", "devices", "host_facts", "leases", "lease_events", "jobs", "job_tasks", "processes"):
        expected, got = (rows(storage.cursor(), name) for storage in (database, part))
        assert expected == got, name
    part.close()
    database.close()


def rows(cursor: Any, name: str) -> list[tuple[Any, ...]]:
    """All rows, in the order of what identifies them; what depends on the moment of asking is left out."""
    described = cursor.execute(f"DESCRIBE {name}").fetchall()
    chosen = ", ".join(
        f'round("{column}"::DOUBLE, 6) AS "{column}"'
        if kind in ("DOUBLE", "FLOAT")
        # Of a metric that no device has the embedded rollup keeps nothing, and the lake's that there were 0 values.
        else f'nullif("{column}", 0) AS "{column}"'
        if column.endswith("_count") and name.startswith("rollup")
        else f'"{column}"'
        for column, kind, *_ in described
        if "seconds_ago" not in column
    )
    return cursor.execute(f"SELECT {chosen} FROM {name} ORDER BY ALL").fetchall()


def test_a_lake_keeps_what_was_true_of_hosts(lake: lakes.Lake) -> None:
    part = lakes.LakePart(lake, lakes.prepare(lake, 1), PART)
    part.resume(PART, "made")
    (first, *_) = facts.decode(facts_messages(), lambda *_: True, 0).inventories
    for at, driver in enumerate(("570", "570", "580"), 1):
        told = replace(first, time_ns=at * 10**18, host=replace(first.host, driver=driver), leaving=at == 2)
        part.commit(Batch(stream=PART, sequence=at, inventories=[told], messages=at))
    changes = part.cursor().execute(
        "SELECT value, epoch_ns(valid_from), epoch_ns(valid_to) FROM lake.host_facts WHERE fact = 'driver' ORDER BY 2"
    )
    assert changes.fetchall() == [("570", 10**18, 3 * 10**18), ("580", 3 * 10**18, None)]
    part.close()


def test_a_lake_of_an_older_version_is_brought_up_to_this_one(lake: lakes.Lake) -> None:
    """As if it were of the version before: without the columns that are new, and with views that are not."""
    part = Owned(lake, lakes.prepare(lake, 2), PART)
    part.commit(Batch(stream=PART, sequence=1, samples=known_samples(part), messages=1))  # type: ignore[arg-type]
    part.roll_up()
    cursor = part.cursor()
    expected = rows(cursor, "lake.rollup_1h")
    for name in ("idle_while_leased", "usage_by_owner", "throttling", "rollup_1h", "store.series_1h"):
        cursor.execute(f"DROP VIEW {name}")
    for name in ("idle_minutes_bitmask", "throttled_samples"):
        cursor.execute(f"ALTER TABLE store.rollup_1h DROP COLUMN {name}")
    for table, column in (("agents", "samples"), ("devices", "mig_instance"), ("samples", "fan_percent")):
        cursor.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    cursor.execute("UPDATE corral_meta SET value = '1' WHERE key = 'lake_version'")
    cursor.execute("DELETE FROM corral_meta WHERE key IN ('views', 'tables', 'options')")
    cursor.execute("DROP TABLE store.rolled_0; DROP TABLE store.rolled_1")
    cursor.execute("CREATE TABLE store.rolled (level VARCHAR, snapshot BIGINT, steps BIGINT)")
    cursor.execute("INSERT INTO store.rolled VALUES ('10s', 9, 1), ('1m', 9, 1), ('1h', 9, 1)")
    part.close()
    again = Owned(lake, lakes.prepare(lake, 2), PART)
    found = known_since_version_3()
    again.commit(Batch(stream=PART, sequence=2, tables=found.tables(), inventories=found.inventories, messages=2))
    cursor = again.cursor()
    assert cursor.execute("SELECT samples FROM agents").fetchall() == [(17,)]
    assert cursor.execute("SELECT mig_instance FROM devices ORDER BY index").fetchall() == [(None,), (5,)]
    again.roll_up()
    again.close()
    # As an analyst sees it, who attaches it under another name.
    reader = duckdb.connect()
    lakes.load(reader)
    reader.execute(f"ATTACH 'ducklake:{lake.catalog}' AS history (READ_ONLY)")
    assert rows(reader, "history.rollup_1h") == expected
    assert len(rows(reader, "history.throttling")) == 1
    assert rows(reader, "history.idle_while_leased") == []
    reader.close()
