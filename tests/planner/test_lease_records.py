"""A lease's record can always be written and read again: whatever it says, however large, whatever was acknowledged."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.durable.store import HEARTBEAT, Store, WriteFailed, lease_key
from corral.planner.leases import lifecycle
from corral.planner.leases.lifecycle import LeaseRecord, LeaseTable
from corral.schemas import codec, subjects
from corral.schemas.query import QueryRequest
from corral.schemas.requests import Distribution, LeaseAction, LeaseState, WithdrawAction, WorkRequest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from nats.aio.client import Client
from nats.js import api
from support.lease_examples import START, granted
from support.planner_rig import FakeHosts, ask, running, until_ready


def size_of(value: object) -> int:
    return len(codec.encode(value, codec.JSON))


@pytest.mark.parametrize(
    ("type", "body", "field"),
    [
        (WorkRequest, {"owner": "ann\n"}, "owner"),
        (WorkRequest, {"owner": "ann", "request_id": "x\n"}, "request_id"),
        (WorkRequest, {"owner": "ann", "min_compute_capability": "8.0\n"}, "min_compute_capability"),
        (WithdrawAction, {"owner": "ann", "request_id": "x\n"}, "request_id"),
        (LeaseAction, {"owner": "ann", "lease_id": "x\n"}, "lease_id"),
        (QueryRequest, {"sql": "select 1", "query_id": "x\n"}, "query_id"),
        (WorkRequest, {"owner": "ann", "gpu_share": 1e-320}, "gpu_share"),
        (Distribution, {"weights": [1e-320]}, "weights[0]"),
        (Distribution, {"weights": [float("inf")]}, "weights[0]"),
        (Distribution, {"weights": [float("nan")]}, "weights[0]"),
    ],
)
def test_what_no_record_can_hold_is_refused(type: Any, body: dict[str, Any], field: str) -> None:
    with pytest.raises(codec.DecodeError) as refused:
        codec.decode(codec.encode(body), type)
    assert refused.value.field.startswith(f"$.{field.removesuffix('[0]')}")


@given(st.lists(st.sampled_from(["change", "start", "land", "tell"]), max_size=40), st.randoms(use_true_random=False))
def test_events_acknowledged_in_any_order_are_not_carried_on(steps: list[str], random: Any) -> None:
    """What the stream has is never in the record of a later change that is made after it; what it has not always is."""
    table = LeaseTable([granted()])
    flying: LeaseRecord | None = None
    untold = [1]
    now = START
    for step in steps:
        record = table.get("l1")
        assert record is not None
        now += timedelta(seconds=1)
        if step == "start" and flying is None:
            flying = lifecycle.renew(record, None, now, "p")
        elif step == "land" and flying is not None:
            table.put(flying)
            untold.append(flying.version)
            flying = None
        elif step == "tell" and untold:
            version = untold.pop(random.randrange(len(untold)))
            table.note_published("l1", version)
        record = table.get("l1")
        assert record is not None
        carried = [announcement.version for announcement in record.earlier]
        assert carried == [version for version in sorted(untold) if version < record.version]
        assert record.told == (min(untold) - 1 if untold else record.version)
    table.remove("l1")


@given(st.integers(0, 12), st.integers(0, 8000))
def test_the_newest_events_that_fit_stay_in_a_record(changes: int, max_bytes: int) -> None:
    record = granted()
    for number in range(changes):
        record = lifecycle.renew(record, None, START + timedelta(seconds=number), "p" * (number + 1))
    fit = lifecycle.fitting(record, max_bytes, size_of)
    kept = len(fit.earlier)
    assert fit.earlier == record.earlier[len(record.earlier) - kept :]
    assert not kept or size_of(fit) <= max_bytes
    if kept < len(record.earlier):
        assert size_of(replace(record, earlier=record.earlier[-kept - 1 :])) > max_bytes - 20


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_write_that_no_server_takes_fails_and_the_others_go_on(nc: Client, grouped: bool) -> None:
    store = Store(nc)
    await store.open()
    if grouped:  # as on a stream with replicas
        js = nc.jetstream()
        config = (await js.stream_info("KV_corral_planner")).config
        config.allow_atomic = True
        await js.update_stream(config)
        store._replicated, store._max_group = True, 250  # pyright: ignore[reportPrivateUsage]
    term = await store.claim(b'{"planner":"a"}', 0)
    assert term is not None
    large = {"l2": nc.max_payload + 1, "l4": nc.max_payload, "l5": nc.max_payload - 100}
    keys = [*(f"l{number}" for number in range(9)), "a\n", "a..b"]
    writes = [
        asyncio.create_task(store.put(lease_key(key), b"x" * large.get(key, 10), term, message_id=f"{number}.1"))
        for number, key in enumerate(keys)
    ]
    await asyncio.sleep(0)
    assert await store.put(HEARTBEAT, b"1", term) > term
    found = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 5)
    outcomes = dict(zip(keys, found, strict=True))
    failed = {key for key, outcome in outcomes.items() if isinstance(outcome, WriteFailed)}
    assert failed == {*large, "a\n", "a..b"}
    assert sum(isinstance(outcome, int) for outcome in outcomes.values()) == 6
    assert "max_payload" in str(outcomes["l2"])
    await store.close()


async def test_a_large_lease_whose_events_wait_can_be_renewed_and_released(server: EmbeddedServer, nc: Client) -> None:
    """The stream of facts takes nothing: each change carries the events before it that are to be told."""
    hosts = FakeHosts(nc)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 8)
        js = nc.jetstream()
        await js.delete_stream(subjects.FACTS_STREAM)
        body = {"owner": "ann", "request_id": "x", "distribution": {"items": 70_000}}
        lease = (await ask(nc, "request", body))["lease"]
        action = {"owner": "ann", "lease_id": lease["lease_id"]}
        for _ in range(3):
            assert (await ask(nc, "renew", action))["state"] == "active"
        assert (await ask(nc, "release", action))["state"] == "released"
        held = await js.get_last_msg("KV_corral_planner", f"$KV.corral_planner.lease.{lease['lease_id']}")
        record = codec.decode(held.data or b"", LeaseRecord, codec.JSON)
        assert record.lease.state is LeaseState.RELEASED
        assert record.version == 5
        assert {1, 2} <= {before.version for before in record.earlier} <= {1, 2, 3, 4}
        await js.add_stream(api.StreamConfig(name=subjects.FACTS_STREAM, subjects=["corral.v1.leases.>"]))
    await hosts.stop()
