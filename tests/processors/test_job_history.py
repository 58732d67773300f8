"""Jobs reach the history once, in whatever order their events come, and without what is their owner's alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
from corral.client.jobs import summary as job_summary
from corral.processors.storage import Database, schema
from corral.processors.storage.jobs import write_jobs
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.protocol import Batch
from corral.schemas import codec, subjects
from corral.schemas.requests import WorkRequest
from corral.schemas.work.jobs import JobEvent, JobSpec, JobState
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from support.history import Asking
from support.job_events import START, JobHistory

TABLES = ("jobs", "job_tasks")
REQUEST = WorkRequest(owner="ann", name="sweep", gpus=2, gpu_memory_bytes=2**30, cpus=4.0, labels={"team": "a"})
SECRET = "hunter2-of-ann"


def two_jobs() -> list[JobEvent]:
    """An array with a retry, a preemption, and tasks that wait or were cancelled; and a job whose id comes again."""
    sweep = JobHistory("7", 4, REQUEST)
    sweep.run(0, 1, (0, 10, 70), JobState.FAILED, peak_memory_bytes=5, cpu_seconds=1.5)
    sweep.wait_again(0, 1, 70)
    sweep.run(0, 2, (70, 80, 200), JobState.DONE, peak_memory_bytes=9, log_bytes=3)
    sweep.run(1, 1, (0, 20, 90), JobState.PREEMPTED)
    sweep.wait_again(1, 1, 90)
    sweep.run(2, 1, (0, 30), JobState.RUNNING)
    again = JobHistory("7", 1, WorkRequest(owner="ben", gpus=1), START + timedelta(days=1))
    again.run(0, 1, (0, 1, 2), JobState.DONE)
    return [*sweep.events, *again.events]


EVENTS = two_jobs()
ATTEMPTS = [
    ("ann", 0, 1, "failed", "lease-7-0-1", 1, 60.0, 5, 1.5),
    ("ann", 0, 2, "done", "lease-7-0-2", 0, 120.0, 9, None),
    ("ann", 1, 1, "preempted", "lease-7-1-1", None, 70.0, None, None),
    ("ann", 1, 2, "pending", None, None, None, None, None),
    ("ann", 2, 1, "running", "lease-7-2-1", None, None, None, None),
    ("ben", 0, 1, "done", "lease-7-0-1", 0, 1.0, None, None),
]
SQL = (
    "SELECT owner, index, attempt, t.state, lease_id, exit_code, epoch(t.ended_at - t.started_at), peak_memory_bytes, "
    "cpu_seconds FROM job_tasks t JOIN jobs j USING (job_id, submitted_at) ORDER BY ALL"
)
JOBS_SQL = (
    "SELECT owner, state, tasks, gpus, gpu_memory_bytes, cpus, labels['team'], version FROM jobs ORDER BY submitted_at"
)
JOBS = [("ann", "running", 4, 2, 2**30, 4.0, "a", 10), ("ben", "done", 1, 1, 0, 0.0, None, 3)]


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        made.execute("SET TimeZone = 'UTC'")
        for table in TABLES:
            made.execute(f"CREATE TABLE {table} ({schema.TABLES[table]})")
        yield made


def written(cursor: duckdb.DuckDBPyConnection, batches: Sequence[Sequence[JobEvent]]) -> dict[str, list[Any]]:
    """Rows of the tables after batches of events."""
    for table in TABLES:
        cursor.execute(f"DELETE FROM {table}")
    for batch in batches:
        write_jobs(cursor, batch)
    return {table: cursor.execute(f"FROM {table} ORDER BY ALL").fetchall() for table in TABLES}


def test_each_attempt_has_its_row(database: duckdb.DuckDBPyConnection) -> None:
    written(database, [EVENTS])
    assert database.execute(SQL).fetchall() == ATTEMPTS
    assert database.execute(JOBS_SQL).fetchall() == JOBS


@settings(max_examples=10, deadline=None)
@given(st.permutations(EVENTS), st.lists(st.integers(0, len(EVENTS) - 1), max_size=6), st.data())
def test_any_order_gives_the_same_tables(
    database: duckdb.DuckDBPyConnection, events: list[JobEvent], again: list[int], data: st.DataObject
) -> None:
    found = [*events]
    for at in again:
        found.insert(data.draw(st.integers(0, len(found))), EVENTS[at])
    cuts = data.draw(st.lists(st.integers(0, len(found)), max_size=5))
    edges = sorted({0, len(found), *cuts})
    assert written(database, [found[a:b] for a, b in pairwise(edges)]) == written(database, [EVENTS])


async def test_events_are_stored_without_secrets_and_bad_ones_set_aside(processor: Asking, nc: Client) -> None:
    js = nc.jetstream()
    # What a planner must not publish, and a processor must not store if it does.
    spec = {"command": [SECRET], "script": SECRET, "environment": {"TOKEN": SECRET}, "arguments": [SECRET]}
    for event in (*EVENTS, *EVENTS[:4]):
        body = json.loads(codec.encode(event, codec.JSON))
        body["spec"] = body["job"]["spec"] = spec
        body["job"]["environment"] = spec["environment"]
        for task in body["tasks"]:
            task["environment"] = spec["environment"]
        # A field of a later planner.
        if body["job"]["request"]:
            body["job"]["request"]["colour"] = "red"
        await js.publish(subjects.job_events_subject("7"), json.dumps(body).encode())
    bad = json.loads(codec.encode(EVENTS[1], codec.JSON))
    await js.publish(subjects.job_events_subject("8"), json.dumps(bad).encode())
    bad["tasks"][0]["exit_code"] = 2**40
    await js.publish(subjects.job_events_subject("7"), json.dumps(bad).encode())
    await js.publish(subjects.job_events_subject("7"), b"{}")
    await processor.until("SELECT coalesce(sum(messages), 0) FROM dead_letters WHERE stream = 'CORRAL_JOBS'", 3)
    await processor.until("SELECT count(*) FROM job_tasks", len(ATTEMPTS))
    assert [tuple(row) for row in await processor.rows(SQL)] == ATTEMPTS
    assert [tuple(row) for row in await processor.rows(JOBS_SQL)] == JOBS
    codes = await processor.rows("SELECT code, messages FROM dead_letters WHERE stream = 'CORRAL_JOBS' ORDER BY code")
    assert codes == [["invalid", 2], ["out_of_range", 1]]
    # The guard of readers lets the statement of a summary through.
    [[job_id, owner, *_]] = await processor.rows(job_summary.statement("7"))
    assert (job_id, owner) == ("7", "ben")
    for table in TABLES:
        assert SECRET not in str(await processor.rows(f"FROM {table}"))


def test_events_have_no_place_for_what_is_the_owners_alone() -> None:
    private = {"command", "script", "arguments", "environment", "directory", "output"}
    assert private <= set(JobSpec.__struct_fields__)
    _, components = msgspec.json.schema_components([JobEvent])
    told = {name for component in components.values() for name in component.get("properties", {})}
    assert not private & told
    assert not private & {name for table in TABLES for name, _ in columns(table)}


def columns(table: str) -> list[tuple[str, str]]:
    with duckdb.connect() as made:
        made.execute(f"CREATE TABLE made ({schema.TABLES[table]})")
        return [(row[0], row[1]) for row in made.execute("DESCRIBE made").fetchall()]


def test_a_history_from_before_gets_the_tables(tmp_path: Path) -> None:
    file = tmp_path / "history.duckdb"
    Database(file).close()
    with duckdb.connect(str(file)) as old:
        for view in ("questions", "job_costs", "stalled_tasks", "job_summary"):
            old.execute(f"DROP VIEW IF EXISTS {view}")
        for table in TABLES:
            old.execute(f"DROP TABLE {table}")
    database = Database(file)
    database.commit(Batch(stream=subjects.JOBS_STREAM, sequence=1, jobs=EVENTS))
    assert database.cursor().execute(SQL).fetchall() == ATTEMPTS
    database.close()


@pytest.mark.long
def test_a_lake_has_the_same(lake: lakes.Lake) -> None:
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), subjects.JOBS_STREAM)
    part.resume(subjects.JOBS_STREAM, "once")
    try:
        for sequence, at in enumerate((slice(3, None), slice(0, 5), slice(None)), 1):
            part.commit(Batch(stream=subjects.JOBS_STREAM, sequence=sequence, jobs=EVENTS[at]))
        assert part.cursor().execute(SQL).fetchall() == ATTEMPTS
        assert part.cursor().execute(JOBS_SQL).fetchall() == JOBS
    finally:
        part.close()
