"""Lease events answer who was preempted, for whom, and what was lost; older histories get the columns."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
from corral.processors.storage import Database
from corral.schemas import codec, subjects
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState, Preemption
from msgspec.structs import replace
from nats.aio.client import Client
from support.history import Asking

START = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=2)
COLUMNS = {
    "leases": (
        *("preemptible", "grace_seconds", "checkpoint", "min_run_seconds", "priority", "requeued", "saved_at"),
        *("preemption_notified_at", "group_name"),
    ),
    "lease_events": (
        *("saved_at", "preemption_notified_at", "preemption_ends_at", "preemption_reason", "preemption_claimant"),
        *("preemption_claimant_owner", "preemption_claimant_group", "preemption_extended"),
    ),
    "requests": ("preemptible", "grace_seconds", "checkpoint", "min_run_seconds", "requeue_of", "group_name"),
}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def notice(seconds: float, **fields: object) -> Preemption:
    return Preemption(notified_at=at(seconds), ends_at=at(seconds + 60), reason="a course", **fields)  # type: ignore[arg-type]


class Story:
    """The events of a lease of two whole devices, from its grant on."""

    def __init__(self, lease_id: str) -> None:
        self.lease = Lease(
            lease_id=lease_id,
            owner="ann",
            name="train",
            state=LeaseState.ACTIVE,
            granted_at=START,
            expires_at=START + timedelta(days=1),
            ttl_seconds=86400.0,
            grants=[Grant(host="h1", device=f"GPU-{lease_id}-{number}") for number in range(2)],
            preemptible=True,
            grace_seconds=60.0,
            group="lab/nlp",
        )
        self.events = [LeaseEvent(kind=LeaseEventKind.GRANTED, time=START, lease=self.lease)]

    def then(self, kind: str, seconds: float, **changes: object) -> Story:
        self.lease = replace(self.lease, **changes)
        self.events.append(LeaseEvent(kind=LeaseEventKind(kind), time=at(seconds), lease=self.lease))
        return self

    def end(self, kind: str, seconds: float, **changes: object) -> Story:
        return self.then(kind, seconds, state=LeaseState(kind), ended_at=at(seconds), **changes)


async def test_each_notice_is_a_row_with_what_came_of_it(processor: Asking, nc: Client) -> None:
    bob = notice(60, claimant="r1", claimant_owner="bob", claimant_group="lab/vision")
    stories = [
        Story("l1").then("renewed", 50, saved_at=at(50)).then("preempting", 60, preemption=bob)
        .then("preempting", 65, preemption=replace(bob, ends_at=at(150), extended=True))
        .end("evicted", 70, saved_at=at(70)),
        Story("l2").then("preempting", 60, preemption=bob).then("renewed", 65, preemption=None)
        .then("preempting", 100, preemption=notice(100)).then("expiring", 120).end("evicted", 160),
        Story("l3").then("renewed", 30, saved_at=at(30)).end("evicted", 60, preemption=bob),
        Story("l4").then("preempting", 60, preemption=bob),
        Story("l5").then("preempting", 60, preemption=bob).end("released", 75),
        Story("l6").end("released", 75),
    ]  # fmt: skip
    for story in stories:
        for event in story.events:
            subject = subjects.lease_subject(event.kind.value, event.lease.lease_id)
            await nc.jetstream().publish(subject, codec.encode(event, codec.JSON))
    await processor.until("SELECT count(*) FROM leases WHERE state <> 'active'", 5)
    rows = await processor.rows(
        "SELECT lease_id, epoch(notified_at - (SELECT min(granted_at) FROM leases)) AS notified, outcome, extended, "
        "claimant_owner, claimant_group, epoch(ends_by - notified_at), notice_seconds, lost_gpu_seconds, gpus "
        "FROM preemptions ORDER BY 1, 2"
    )
    assert rows == [
        ["l1", 60, "saved", True, "bob", "lab/vision", 90, 10, 0, 2],
        ["l2", 60, "withdrawn", False, "bob", "lab/vision", 60, None, None, 2],
        ["l2", 100, "evicted", False, None, None, 60, 60, 320, 2],
        ["l3", 60, "evicted", False, "bob", "lab/vision", 60, 0, 60, 2],
        ["l4", 60, "pending", False, "bob", "lab/vision", 60, None, None, 2],
        ["l5", 60, "released", False, "bob", "lab/vision", 60, 15, 150, 2],
    ]
    assert await processor.rows("SELECT DISTINCT preemptible, grace_seconds, requeued FROM leases") == [
        [True, 60, False]
    ]
    assert await processor.rows("SELECT DISTINCT group_name FROM preemptions") == [["lab/nlp"]]


def test_a_history_from_before_preemption_gets_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "history.duckdb"
    Database(file).close()
    with duckdb.connect(str(file)) as old:
        for table, columns in COLUMNS.items():
            for column in columns:
                old.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        old.execute("INSERT INTO leases (lease_id, owner, state) VALUES ('l1', 'ann', 'active')")
    history = Database(file)
    assert history.cursor().execute("SELECT lease_id, preemptible, saved_at FROM leases").fetchall() == [
        ("l1", None, None)
    ]
    assert history.cursor().execute("SELECT count(*) FROM preemptions").fetchall() == [(0,)]
    history.close()
