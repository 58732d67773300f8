"""Work requests reach the history once, with what was asked, and answer how long people waited."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from corral.processors.storage import Batch
from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.protocol import Asked
from corral.schemas import codec, subjects
from corral.schemas.request_events import Forecast, RequestEvent, RequestEvents, RequestOutcome, asked
from corral.schemas.requests import (
    Distribution,
    Grant,
    Lease,
    LeaseEvent,
    LeaseEventKind,
    LeaseState,
    Method,
    WorkRequest,
)
from corral.schemas.values.durations import DurationDigest, DurationEstimate, bin_of
from nats.aio.client import Client
from support.history import Asking

NOW = datetime.now(UTC).replace(microsecond=0)


def event(number: int, outcome: RequestOutcome, waited: float, **more: object) -> RequestEvent:
    request = WorkRequest(
        owner="ann" if number % 2 else "ben",
        name="train",
        gpus=2,
        models=["*H100*"],
        request_id=f"r{number}",
        wait_seconds=3600.0,
        labels={"team": "a"},
        distribution=Distribution(items=["a", "b", "c"], method=Method.UNIFORM),
    )
    at = NOW - timedelta(hours=2)
    lease = f"l{number}" if outcome is RequestOutcome.GRANTED else ""
    return RequestEvent(
        uid=f"u{number}", request=asked(request), asked_at=at, ended_at=at + timedelta(seconds=waited),
        outcome=outcome, queued=waited > 0, position=1 if waited > 0 else 0, lease_id=lease, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def lease(number: int, seconds: float, state: LeaseState) -> list[LeaseEvent]:
    at = NOW - timedelta(hours=2)
    held = Lease(
        lease_id=f"l{number}", owner="ann", name="train", state=LeaseState.ACTIVE, granted_at=at,
        expires_at=at + timedelta(days=1), ttl_seconds=86400.0,
        grants=[Grant(host="h1", device=f"GPU-{number}-{at}", model="NVIDIA H100") for at in range(2)],
    )  # fmt: skip
    over = Lease(
        lease_id=held.lease_id, owner="ann", name="train", state=state, granted_at=at, expires_at=held.expires_at,
        ttl_seconds=86400.0, grants=[], ended_at=at + timedelta(seconds=seconds),
    )  # fmt: skip
    return [
        LeaseEvent(kind=LeaseEventKind.GRANTED, time=at, lease=held),
        LeaseEvent(kind=LeaseEventKind(state.value), time=at + timedelta(seconds=seconds), lease=over),
    ]


async def test_requests_are_stored_once_and_answer_what_was_waited_for(processor: Asking, nc: Client) -> None:
    js = nc.jetstream()
    at = NOW - timedelta(hours=2)
    forecast = Forecast(
        expected_start=at + timedelta(seconds=80), earliest_start=at + timedelta(seconds=20),
        latest_start=at + timedelta(seconds=200), made_at=at,
    )  # fmt: skip
    estimate = DurationEstimate(seconds=500.0, low_seconds=100.0, high_seconds=900.0, basis="name", leases=3.0)
    events = [
        event(1, RequestOutcome.GRANTED, 100.0, forecast=forecast, estimate=estimate),
        event(2, RequestOutcome.TIMED_OUT, 3600.0, code="timed_out", message="2 of 2 devices: leased"),
        event(3, RequestOutcome.GRANTED, 0.0, estimate=estimate),
        event(4, RequestOutcome.REFUSED, 0.0, code="invalid"),
    ]
    subject = subjects.request_events_subject("p1")
    for message in (events[:2], events[1:], events):
        await js.publish(subject, codec.encode(RequestEvents(planner="p1", events=message), codec.JSON))
    # A field of a later planner is ignored; what is no event at all stops nothing.
    gone = RequestEvents(planner="p1", events=[event(5, RequestOutcome.GONE, 9.0)])
    later = json.loads(codec.encode(gone, codec.JSON))
    later["events"][0]["request"]["colour"] = "red"
    await js.publish(subject, b"{}")
    await js.publish(subject, json.dumps(later).encode())
    for told in [*lease(1, 600.0, LeaseState.RELEASED), *lease(3, 50.0, LeaseState.EVICTED)]:
        named = subjects.lease_subject(told.kind.value, told.lease.lease_id)
        await js.publish(named, codec.encode(told, codec.JSON))

    await processor.until("SELECT count(*) FROM requests", 5)
    await processor.until("SELECT count(*) FROM leases WHERE state <> 'active'", 2)
    [row] = await processor.rows(
        "SELECT outcome, owner, models, gpus, \"items\", labels['team'], epoch(forecast_start - forecast_at), "
        "estimate_basis, planner, position FROM requests WHERE uid = 'u1'"
    )
    assert row == ["granted", "ann", ["*H100*"], 2, 3, "a", 80, "name", "p1", 1]
    [forecast_row] = await processor.rows("SELECT error_seconds, error_percent, inside FROM queue_forecasts")
    assert forecast_row == [20, 20, True]
    owners = await processor.rows(
        "SELECT owner, requests, granted, waited, wait_seconds_mean, unserved FROM waits_by_owner ORDER BY owner"
    )
    assert owners == [["ann", 3, 2, 2, 50, 1], ["ben", 2, 0, 1, None, 1]]
    models = await processor.rows(
        "SELECT model, requests, granted, unserved_gpu_requests FROM waits_by_model ORDER BY model"
    )
    assert models == [["*H100*", 3, 0, 4], ["NVIDIA H100", 2, 2, 0]]
    assert await processor.rows("SELECT outcome, requests, gpus FROM unserved_demand ORDER BY 1") == [
        ["gone", 1, 2], ["timed_out", 1, 2]
    ]  # fmt: skip
    # An evicted lease says nothing of how long its work would have taken.
    assert await processor.rows("SELECT lease_id, basis, actual_seconds, ratio, inside FROM duration_estimates") == [
        ["l1", "name", 600, 1.2, True]
    ]  # fmt: skip

    answer = await nc.request(subjects.DURATIONS, b"{}", timeout=10)
    digest = codec.decode(answer.data, DurationDigest, codec.JSON)
    [group] = digest.groups
    assert (group.owner, group.name, group.shape) == ("ann", "train", "2 *h100*")
    assert [number for number, _ in group.ended] == [bin_of(600.0)]
    assert [number for number, _ in group.censored] == [bin_of(50.0)]
    assert 0.99 < group.ended[0][1] <= 1.0


@pytest.mark.long
def test_a_lake_stores_a_request_once(lake: lakes.Lake) -> None:
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), "CORRAL_REQUESTS")
    part.resume("CORRAL_REQUESTS", "once")
    events = [Asked(event(number, RequestOutcome.GRANTED, 5.0), "p1") for number in range(3)]
    try:
        for sequence, some in enumerate((events[:2], events[1:], events), 1):
            part.commit(Batch(stream="CORRAL_REQUESTS", sequence=sequence, requests=some))
        found = part.cursor().execute("SELECT uid, owner, models FROM requests ORDER BY uid").fetchall()
    finally:
        part.close()
    assert found == [("u0", "ben", ["*H100*"]), ("u1", "ann", ["*H100*"]), ("u2", "ben", ["*H100*"])]
