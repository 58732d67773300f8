"""A grant that fails or is cancelled at any await leaves devices, bucket, quotas and events in agreement."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Coroutine, Generator
from typing import Any

import msgspec
import pytest
from corral.bus.connect import connect
from corral.bus.layout import until_laid_out
from corral.cli.local.server import EmbeddedServer
from corral.planner.leases.records import decode_record
from corral.planner.service import Planner, Settings
from corral.schemas.requests import Assignment, Error, LeaseAction, LeaseState, WorkRequest
from msgspec import Struct
from nats.aio.client import Client as Nats
from support.planner_rig import FakeHosts, lease_events, until_ready


class Caller:
    """Client that waits for one answer; each answer takes two iterations of the event loop."""

    client_name = ""
    reply_to = "_INBOX.caller.1"

    def __init__(self) -> None:
        self.answers: list[Struct] = []

    async def answer(self, reply: Struct) -> None:
        await asyncio.sleep(0)
        self.answers.append(reply)
        await asyncio.sleep(0)

    def forward(self, body: Struct) -> None:
        raise AssertionError(f"{body} was forwarded by the leader")


@types.coroutine
def interrupted(
    work: Coroutine[Any, Any, None], at: int, error: BaseException, reached: list[int]
) -> Generator[Any, Any, None]:
    """Run a coroutine, and throw an error at its suspension number `at`, which is noted in `reached`."""
    count = 0
    try:
        awaited = work.send(None)
        while True:
            if count == at:
                reached.append(count)
                awaited = work.throw(error)
            else:
                try:
                    value = yield awaited
                except BaseException as outer:
                    awaited = work.throw(outer)
                else:
                    awaited = work.send(value)
            count += 1
    except StopIteration:
        return


@pytest.fixture
async def planner(server: EmbeddedServer, nc: Nats) -> AsyncIterator[Planner]:
    """A leading planner in this process, with eight devices, whose publishing is suspended before and after."""
    connections = [await connect(server.url, name=name) for name in ("planner", "telemetry", "leader")]
    await until_laid_out(connections[0].jetstream())
    planner = Planner(*connections, Settings())
    await planner.start()
    hosts = FakeHosts(nc)
    async with asyncio.timeout(60):
        await planner.leading.wait()
    await hosts.start()
    await until_ready(nc, 8)
    publish = connections[0].publish

    async def suspended(*args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        await publish(*args, **kwargs)
        await asyncio.sleep(0)

    connections[0].publish = suspended
    yield planner
    await hosts.stop()
    await planner.stop()
    for connection in connections:
        await connection.close()


async def active_in_bucket(planner: Planner) -> set[str]:
    """Ids of the active leases in the bucket."""
    store = planner._store
    until = await store.put("probe", b"", planner._election.term)
    found: set[str] = set()
    async for entry in store.read_all(until):
        record = decode_record(entry.key[6:], entry.value) if entry.key.startswith("lease.") else None
        if record is not None and record.lease.state is LeaseState.ACTIVE:
            found.add(entry.key[6:])
    return found


@pytest.mark.parametrize("kind", [RuntimeError, asyncio.CancelledError])
@pytest.mark.parametrize("items", [0, 20_000])
async def test_devices_bucket_quota_and_events_agree_wherever_a_grant_is_interrupted(
    planner: Planner, nc: Nats, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], items: int
) -> None:
    monkeypatch.setattr(
        "corral.planner.broker.waiting.query_costs.CHEAP_SECONDS", 0.0
    )  # items are distributed in a fork
    broker = planner._broker
    assert broker is not None
    table, kept = broker.ledger.table, 0
    work = {"distribution": {"items": items}} if items else {}
    for at in range(50):
        reached, caller = list[int](), Caller()
        body = {"owner": "ann", "gpus": 4, "request_id": f"r{at}", "ttl_seconds": 600.0, **work}
        request = msgspec.convert(body, WorkRequest)
        task = asyncio.create_task(interrupted(broker.request(request, caller), at, kind("interrupted"), reached))
        await asyncio.wait({task})
        await asyncio.wait_for(planner._store.settled(), 20)
        held = set(planner.fleet.leases)
        assert held == {record.lease.lease_id for record in table if record.lease.state is LeaseState.ACTIVE}
        assert held == await active_in_bucket(planner)
        assert table.owners.of("ann").leases == len(held)
        assert all(isinstance(answer, Error) for answer in caller.answers) or held
        if not reached:
            assert isinstance(caller.answers[0], Assignment)
        # A retry is decided: it gets the lease, or a new one.
        again = Caller()
        await broker.request(request, again)
        assert isinstance(again.answers[0], Assignment)
        kept += bool(held)
        lease_id = again.answers[0].lease.lease_id
        assert set(planner.fleet.leases) == held | {lease_id} == {lease_id}
        await broker.lease_commands.release(LeaseAction(lease_id=lease_id, owner="ann"), again)
        assert not planner.fleet.leases
        assert table.owners.of("ann").leases == 0
        if not reached:
            break
    else:
        pytest.fail("the grant never ran to its end")
    assert at >= (8 if items else 7)
    assert kept > 1
    publisher = planner._publisher
    assert publisher is not None
    await asyncio.wait_for(publisher.flush(), 20)
    told = [(event["lease"]["lease_id"], event["kind"]) for _, event in await lease_events(nc)]
    leases = {record.lease.lease_id for record in table}
    assert sorted(told) == sorted((lease_id, event) for lease_id in leases for event in ("granted", "released"))
