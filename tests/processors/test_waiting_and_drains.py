"""The history knows what waits now and what was drained, also when the planner is killed in between."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.broker.drain_spans import SavedSpans, follow
from corral.processors.storage import Batch
from corral.processors.storage.lake import lake as lakes
from corral.schemas import codec, subjects
from corral.schemas.request_events import RequestEvents, WaitingRequest, asked
from corral.schemas.requests import WorkRequest
from corral.schemas.work.drains import DrainSpan
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from support.history import Asking
from support.planner_rig import FakeHosts, PlannerProcess, ask, queued, until_ready

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.mark.long
async def test_what_waits_and_what_was_drained_survives_a_planner_that_is_killed(
    processor: Asking, server: EmbeddedServer, nc: Client, tmp_path: Path
) -> None:
    hosts = FakeHosts(nc, hosts=2, devices=1, labels={"rack": "r1"})
    await hosts.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 2)
    holding = [await ask(nc, "request", {"owner": "x", "ttl_seconds": 600}) for _ in range(2)]
    asking = [
        asyncio.create_task(
            ask(nc, "request", {"owner": owner, "gpus": 1, "wait_seconds": 600, "request_id": owner}, timeout=60)
        )
        for owner in ("ann", "ben")
    ]
    await queued(nc, 2)
    await processor.until("SELECT count(*) FROM waiting_requests", 2)
    [row] = await processor.rows(
        "SELECT owner, gpus, waiting_seconds > 0, round(epoch(until - asked_at)) FROM waiting_requests "
        "WHERE request_id = 'ben'"
    )
    assert row == ["ben", 1, True, 600]
    await ask(nc, "drain", {"drain": True, "hosts": ["node0"], "reason": "new fans", "operator": "olga"})
    await ask(nc, "drain", {"drain": True, "host_labels": {"rack": "r1"}, "reason": "power", "operator": "paul"})
    begins = (datetime.now(UTC) - timedelta(seconds=20)).isoformat()
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    window = {"window_id": "w", "maintenance": True, "hosts": ["node1"], "starts_at": begins, "ends_at": ends}
    await ask(nc, "book", {"book": {**window, "reason": "BIOS"}, "operator": "olga"})
    await processor.until("SELECT count(*) FROM host_drains WHERE active", 4)
    # What was changed, but not published by the planner that was killed, is published by the next.
    planner.kill()
    bucket = await nc.jetstream().key_value(subjects.PLANNER_BUCKET)
    drains = json.loads((await bucket.get("drains")).value or b"")
    del drains["label:rack=r1"]
    await bucket.put("drains", json.dumps(drains | {"device:GPU-node1-0": "ecc (by rita)"}).encode())
    planner.start()
    await until_ready(nc, 0)
    await queued(nc, 2)
    await processor.until("SELECT count(*) FROM host_drains WHERE NOT active", 2)
    await ask(nc, "drain", {"drain": False, "hosts": ["node0"], "devices": ["GPU-node1-0"], "operator": "paul"})
    await ask(nc, "book", {"cancel": "w"})
    for held in holding:
        await ask(nc, "release", {"owner": "x", "lease_id": held["lease"]["lease_id"]})
    await ask(nc, "withdraw", {"owner": "ben", "request_id": "ben"})
    await processor.until("SELECT count(*) FROM waiting_requests", 0)
    await processor.until("SELECT count(*) FROM requests", 4)
    await processor.until("SELECT count(*) FROM host_drains WHERE active", 0)
    found = await processor.rows(
        "SELECT host, device, reason, operator, ended_by, window_id, hours BETWEEN 0 AND 1 FROM host_drains "
        "ORDER BY since, host"
    )
    assert found == [
        ["node1", None, "BIOS", "olga", None, "w", True],
        ["node0", None, "new fans", "olga", "paul", None, True],
        ["node0", None, "power", "paul", None, None, True],
        ["node1", None, "power", "paul", None, None, True],
        ["node1", "GPU-node1-0", "ecc", "rita", "paul", None, True],
    ]
    planner.stop()
    await hosts.stop()
    for each in asking:
        each.cancel()


async def test_a_new_leader_says_what_still_waits(processor: Asking, nc: Client) -> None:
    """A request whose end was never published is gone then, and one that comes again counts once."""

    def waiting(name: str, until: timedelta = timedelta(hours=1)) -> WaitingRequest:
        request = WorkRequest(owner="ann", request_id=name, gpus=1, wait_seconds=3600.0)
        return WaitingRequest(uid=name, request=asked(request), asked_at=NOW, until=NOW + until, position=1)

    subject = subjects.request_events_subject("p")
    for message in (
        RequestEvents(planner="p1", events=[], new_term=True, waiting=[waiting("a"), waiting("b")]),
        RequestEvents(planner="p1", events=[], waiting=[waiting("b"), waiting("over", timedelta(seconds=-1))]),
    ):
        await nc.jetstream().publish(subject, codec.encode(message, codec.JSON))
    await processor.until("SELECT string_agg(request_id, ' ' ORDER BY 1) FROM waiting_requests", "a b")
    for message in (
        RequestEvents(planner="p2", events=[], new_term=True, waiting=[waiting("b")]),
        RequestEvents(planner="p2", events=[], waiting=[waiting("c")]),
    ):
        await nc.jetstream().publish(subject, codec.encode(message, codec.JSON))
    await processor.until("SELECT string_agg(request_id, ' ' ORDER BY 1) FROM waiting_requests", "b c")


TARGETS = st.sampled_from(["host:a", "host:b", "label:rack=1"])
REASONS = st.sampled_from(["fans", "fans (by olga)", "power (by paul)"])


@given(st.lists(st.dictionaries(TARGETS, REASONS), max_size=8))
def test_spans_say_what_was_drained_at_each_time(states: list[dict[str, str]]) -> None:
    saved = SavedSpans()
    for number, drains in enumerate(states):
        saved = follow(saved, drains, NOW + timedelta(seconds=number), by="olga")
    spans = [*saved.begun.values(), *saved.ended]
    assert len({(span.target, span.since) for span in spans}) == len(spans)
    for number, drains in enumerate(states):
        at = NOW + timedelta(seconds=number)
        held = {
            span.target: f"{span.reason} (by {span.operator})" if span.operator else span.reason
            for span in spans
            if span.since <= at and (span.until is None or at < span.until)
        }
        assert held == drains


@pytest.mark.long
def test_a_lake_keeps_the_first_end_of_a_drain(lake: lakes.Lake) -> None:
    part = lakes.LakePart(lake, lakes.prepare(lake, 2), "CORRAL_REQUESTS")
    part.resume("CORRAL_REQUESTS", "once")
    begun = DrainSpan(target="host:h1", since=NOW, until=NOW + timedelta(hours=2), reason="BIOS", window="w")
    canceled = DrainSpan(target="host:h1", since=NOW, until=NOW + timedelta(hours=1), window="w", ended_by="olga")
    request = asked(WorkRequest(owner="ann", request_id="r"))
    waits = WaitingRequest(uid="u", request=request, asked_at=NOW, until=NOW + timedelta(hours=1))
    try:
        for sequence, spans in enumerate(([begun], [canceled], [begun]), 1):
            message = RequestEvents(planner="p", events=[], drains=spans, waiting=[waits])
            part.commit(Batch(stream="CORRAL_REQUESTS", sequence=sequence, request_events=[message]))
        found = part.cursor().execute("SELECT target, until, reason, ended_by FROM drains").fetchall()
        waiting = part.cursor().execute("SELECT uid FROM store.waiting_requests").fetchall()
    finally:
        part.close()
    [(target, until, _, by)] = found
    assert (target, until.astimezone(UTC), by) == ("host:h1", NOW + timedelta(hours=1), "olga")
    assert waiting == [("u",)]
