"""However lease events are cut into batches, and however often they come, the tables are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import duckdb
import pytest
from corral.processors.storage import schema
from corral.processors.storage.facts import write_leases
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState, Preemption
from hypothesis import given, settings
from hypothesis import strategies as st

TABLES = ("lease_events", "leases", "lease_devices")
START = datetime(2026, 11, 24, tzinfo=UTC)


@st.composite
def event(draw: st.DrawFn) -> LeaseEvent:
    number = draw(st.integers(0, 3))
    seconds = draw(st.integers(0, 6))
    lease = Lease(
        lease_id=f"lease{number}",
        owner=f"owner{number}",
        state=draw(st.sampled_from(LeaseState)),
        granted_at=START,
        expires_at=START + timedelta(seconds=draw(st.integers(1, 9))),
        ttl_seconds=5.0,
        grants=[Grant(host="h", device=f"gpu{number}{index}", index=index) for index in range(number)],
        labels={"team": "a"} if number % 2 else {},
        saved_at=draw(st.sampled_from([None, START])),
        preemption=draw(st.sampled_from([None, Preemption(notified_at=START, ends_at=START, claimant_owner="o")])),
    )
    return LeaseEvent(kind=draw(st.sampled_from(LeaseEventKind)), time=START + timedelta(seconds=seconds), lease=lease)


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        for table in TABLES:
            made.execute(f"CREATE TABLE {table} ({schema.TABLES[table]})")
        yield made


def written(
    database: duckdb.DuckDBPyConnection, batches: Sequence[Sequence[LeaseEvent]]
) -> dict[str, list[tuple[Any, ...]]]:
    """What the tables hold after them, and had not before."""
    for table in TABLES:
        database.execute(f"DELETE FROM {table}")
    for batch in batches:
        write_leases(database, batch)
    return {table: database.execute(f"FROM {table} ORDER BY ALL").fetchall() for table in TABLES}


@settings(max_examples=10, deadline=None)
@given(st.lists(event(), min_size=1, max_size=8), st.lists(st.integers(0, 8), max_size=4), st.integers(0, 8))
def test_batches_are_what_their_events_are_one_by_one(
    database: duckdb.DuckDBPyConnection, events: list[LeaseEvent], cuts: list[int], again: int
) -> None:
    events = [*events, *events[:again]]  # delivered once more
    edges = sorted({0, len(events), *(min(cut, len(events)) for cut in cuts)})
    found = written(database, [events[first:last] for first, last in pairwise(edges)])
    assert found == written(database, [[one] for one in events])
    # What is known of a lease is its first end, or the latest while it has none.
    for lease_id, state, changed in ((row[0], row[3], row[13]) for row in found["leases"]):
        mine = [one for one in events if one.lease.lease_id == lease_id]
        ended = [one for one in mine if one.lease.state is not LeaseState.ACTIVE]
        right = ended[0] if ended else max(mine, key=lambda one: one.time)
        assert (state, changed) == (right.lease.state.value, right.time)
    assert len(found["lease_events"]) == len({(one.lease.lease_id, one.kind, one.time) for one in events})
    assert sorted(row[2] for row in found["lease_devices"]) == sorted(
        {grant.device for one in events for grant in one.lease.grants}
    )
