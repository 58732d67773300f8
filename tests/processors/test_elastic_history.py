"""The history has the devices of an elastic lease to the second, in whatever order and batches the events come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.planner.leases import lifecycle, resizing
from corral.processors.storage import Database, schema
from corral.processors.storage.facts import write_leases
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.protocol import Batch
from corral.schemas import codec, subjects
from corral.schemas.requests import Grant, LeaseEvent, LeaseState, WorkRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from support.history import Asking

START = datetime(2026, 11, 24, tzinfo=UTC)
TABLES = ("lease_events", "leases", "lease_devices")
SECONDS = """
SELECT coalesce(sum(epoch(coalesce(d.until, l.ended_at) - coalesce(d.since, l.granted_at))), 0)
FROM leases l JOIN lease_devices d USING (lease_id)
"""


def events_of(start: datetime, shapes: Sequence[set[int]]) -> tuple[list[LeaseEvent], float]:
    """Events of a lease that changes its devices each minute and ends a minute after the last; and its GPU-seconds."""
    request = WorkRequest(owner="ann", gpus=1, gpus_max=8, ttl_seconds=1e6, name="grows")
    held = [Grant(host="h1", device=f"GPU-{number}", model="A", memory_bytes=1) for number in sorted(shapes[0])]
    record = lifecycle.grant(
        request, held, lease_id="l1", now=start, digest="", planner="p", environment={}, group="lab"
    )
    events, now, seconds = [record.event()], start, 0.0
    for shape in shapes[1:]:
        now += timedelta(seconds=60)
        seconds += 60 * len(record.lease.grants)
        kept = [grant for grant in record.lease.grants if int(grant.device[4:]) in shape]
        new = shape - {int(grant.device[4:]) for grant in kept}
        grants = [*kept, *(Grant(host="h1", device=f"GPU-{number}", model="A") for number in sorted(new))]
        if len(grants) == len(kept) == len(record.lease.grants):
            record = lifecycle.renew(record, None, now, "p")
        else:
            record = resizing.resized(record, grants, {}, {}, now, "p")
        events.append(record.event())
    now += timedelta(seconds=60)
    seconds += 60 * len(record.lease.grants)
    events.append(lifecycle.end(record, LeaseState.RELEASED, "", now, "p").event())
    return events, seconds


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        for table in TABLES:
            made.execute(f"CREATE TABLE {table} ({schema.TABLES[table]})")
        yield made


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6), st.data())
def test_lease_seconds_are_exact(
    database: duckdb.DuckDBPyConnection, shapes: list[set[int]], data: st.DataObject
) -> None:
    events, seconds = events_of(START, shapes)
    events = data.draw(st.permutations(events + events[: data.draw(st.integers(0, len(events)))]))
    for table in TABLES:
        database.execute(f"DELETE FROM {table}")
    cut = data.draw(st.integers(0, len(events)))
    write_leases(database, events[:cut])
    write_leases(database, events[cut:])
    # The first event of all that is stored is one that names devices: the grant, a renewal, a change or the end.
    assert database.execute(SECONDS).fetchall() == [(seconds,)]


@pytest.mark.long
def test_a_lake_has_the_same(lake: lakes.Lake) -> None:
    events, seconds = events_of(START, [{0, 1}, {0, 1, 2}, {0, 2}, {0, 1, 2}, {2}])
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), "CORRAL_PARTITIONS/1")
    part.resume("CORRAL_PARTITIONS/1", "made")
    for sequence, at in enumerate((0, 3, 1, 4, 2, 5, 3), 1):
        part.commit(Batch(stream="CORRAL_PARTITIONS/1", sequence=sequence, leases=[events[at]]))
    assert part.cursor().execute(SECONDS).fetchall() == [(seconds,)]
    part.close()


async def test_views_count_each_span(processor: Asking, nc: Client) -> None:
    start = (datetime.now(UTC) - timedelta(hours=2)).replace(minute=10, second=0, microsecond=0)
    events, seconds = events_of(start, [{0, 1}, {0, 1, 2}, {0, 2}, {0, 1, 2}])
    for event in events:
        subject = subjects.lease_subject(event.kind.value, event.lease.lease_id)
        await nc.jetstream().publish(subject, codec.encode(event, codec.JSON))
    await processor.until("SELECT count(*) FROM leases WHERE state <> 'active'", 1)

    async def one(sql: str) -> list[Any]:
        (row,) = await processor.rows(sql)
        return row

    assert await one("SELECT sum(epoch(ended - started) * gpus) FROM lease_spans") == [seconds]
    assert await one("SELECT count(*) FROM lease_spans WHERE device = 'GPU-1'") == [2]
    assert await one("SELECT sum(seconds) FROM lease_buckets") == [seconds]
    assert await one("SELECT sum(seconds) FROM lease_minutes") == [seconds]
    usage = await one("SELECT devices, round(gpu_hours * 3600) FROM lease_usage")
    assert usage == [3, seconds]
    rows = await processor.rows("SELECT device, round(hours * 3600) FROM lease_device_usage ORDER BY device")
    assert rows == [["GPU-0", 240], ["GPU-1", 180], ["GPU-2", 180]]
    assert await one("SELECT leases, gpu_seconds FROM group_usage") == [1, seconds]
    assert await one("SELECT gpus_min, gpus_max FROM leases") == [1, 8]


def test_a_history_from_before_gets_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "history.duckdb"
    Database(file).close()
    with duckdb.connect(str(file)) as old:
        for column in ("since", "until"):
            old.execute(f"ALTER TABLE lease_devices DROP COLUMN {column}")
        old.execute("INSERT INTO lease_devices (lease_id, device) VALUES ('l1', 'GPU-0')")
    Database(file).close()
    with duckdb.connect(str(file)) as new:
        assert new.execute("SELECT device, since, until FROM lease_devices").fetchall() == [("GPU-0", None, None)]
