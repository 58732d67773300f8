"""What survives: planners killed with -9 and paused, the bus killed with -9, a crash between a write and its event."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.durable.store import WATERMARK, Deposed, Store, lease_key
from corral.planner.fleet.device import Fault
from corral.planner.leases import lifecycle
from corral.planner.telemetry import Health
from corral.schemas import codec, subjects
from corral.schemas.requests import Grant, WorkRequest
from corral.schemas.telemetry import DeviceEvent, Severity
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, ask, lease_events, persist, until_ready


@pytest.fixture
def planners(server: EmbeddedServer, tmp_path: Path) -> Iterator[list[PlannerProcess]]:
    """Two planners, not started yet; none outlives the test."""
    both = [PlannerProcess(server.url, tmp_path / f"planner{number}.log") for number in range(2)]
    yield both
    for planner in both:
        planner.kill()


async def test_a_killed_planner_loses_no_lease_and_grants_none_twice(
    server: EmbeddedServer, nc: Client, planners: list[PlannerProcess]
) -> None:
    hosts = FakeHosts(nc)
    await hosts.start()
    planner = planners[0]
    planner.start()
    await until_ready(nc, 8)
    bodies = [{"owner": "ann", "gpus": 1, "ttl_seconds": 60, "request_id": f"r{n}"} for n in range(6)]
    before = [await ask(nc, "request", body) for body in bodies]
    no = {"owner": "ann", "gpus": 9, "request_id": "no"}
    rejected = await ask(nc, "request", no)
    await ask(nc, "drain", {"drain": True, "hosts": ["node1"], "reason": "fan"})
    planner.kill()
    planner.start()
    await until_ready(nc)
    listed = (await ask(nc, "leases", {"owner": "ann"}))["leases"]
    assert listed == [answer["lease"] for answer in before]
    assert [await ask(nc, "request", body) for body in bodies] == before
    assert await ask(nc, "request", no) == rejected
    assert (await ask(nc, "request", {**bodies[0], "gpus": 2}))["code"] == "conflict"
    full = await ask(nc, "request", {"owner": "bob", "gpus": 1})
    assert full["type"] == "rejection"
    assert "drained" in full["message"]
    await ask(nc, "drain", {"drain": False, "hosts": ["node1"]})
    more = [await ask(nc, "request", {"owner": "bob", "gpus": 1}) for _ in range(2)]
    devices = [grant["device"] for answer in [*before, *more] for grant in answer["lease"]["grants"]]
    assert len(set(devices)) == 8
    assert (await ask(nc, "request", {"owner": "bob"}))["type"] == "rejection"
    events = Counter((subject, event["kind"]) for subject, event in await lease_events(nc))
    assert set(events.values()) == {1}
    assert len(events) == 8
    planner.stop()
    await hosts.stop()


async def test_a_standby_takes_over_and_the_deposed_leader_grants_nothing(
    server: EmbeddedServer, nc: Client, planners: list[PlannerProcess]
) -> None:
    hosts = FakeHosts(nc)
    await hosts.start()
    first, second = planners
    first.start()
    leader = (await until_ready(nc, 8))["planner"]
    second.start()
    roles: dict[str, str] = {}
    for _ in range(200):  # on a machine that is busy a process takes long to start
        if len(roles) == 2:
            break
        inbox = await nc.subscribe(reply_to := nc.new_inbox())
        await nc.publish("$SRV.PING.corral-planner", reply=reply_to)
        with contextlib.suppress(TimeoutError):
            while True:
                said = json.loads((await inbox.next_msg(timeout=0.3)).data)["metadata"]
                roles[said["planner"]] = said["role"]
    assert Counter(roles.values()) == {"leader": 1, "standby": 1}
    assert roles[leader] == "leader"
    lease = (await ask(nc, "request", {"owner": "ann"}))["lease"]

    # Paused, the leader neither beats nor answers, and believes that it leads when it goes on.
    first.pause(True)
    pending = asyncio.create_task(persist(nc, "request", {"owner": "bob", "request_id": "b"}))
    assert (await persist(nc, "fleet", {}))["planner"] != leader
    # It still has its subscriptions, and must not keep messages from the one that leads now.
    unnamed = [await ask(nc, "request", {"owner": "eve", "gpus": 1}) for _ in range(3)]
    asked = [asyncio.create_task(persist(nc, "request", {"owner": "eve", "request_id": f"e{n}"})) for n in range(10)]
    await asyncio.sleep(0.2)
    first.pause(False)
    answers = [await pending, *unnamed, *(await asyncio.gather(*asked))]
    await asyncio.sleep(1.0)
    listed = (await persist(nc, "leases", {}))["leases"]
    held = [grant["device"] for entry in listed for grant in entry["grants"]]
    assert len(held) == len(set(held)) == 8
    assert lease in listed
    for answer in answers:
        assert answer["type"] == "rejection" or answer["lease"] in listed

    # The one that leads now stops in order: the other takes over at once, and knows everything.
    second.stop()
    again = await persist(nc, "leases", {})
    assert again["leases"] == listed
    first.stop()
    await hosts.stop()


async def test_a_killed_bus_comes_back_with_every_lease(
    server: EmbeddedServer, nc: Client, planners: list[PlannerProcess]
) -> None:
    hosts = FakeHosts(nc)
    await hosts.start()
    planner = planners[0]
    planner.start()
    await until_ready(nc, 8)
    answered: dict[str, dict[str, Any]] = {}

    async def client(number: int) -> None:
        for turn in range(12):
            body = {"owner": f"c{number}", "request_id": f"r{number}-{turn}", "ttl_seconds": 30}
            answer = await persist(nc, "request", body)
            if answer["type"] != "assignment":
                continue
            answered[answer["lease"]["lease_id"]] = answer
            if turn % 2:
                released = await persist(
                    nc, "release", {"owner": f"c{number}", "lease_id": answer["lease"]["lease_id"]}
                )
                assert released["state"] == "released"
                del answered[answer["lease"]["lease_id"]]

    clients = asyncio.gather(*(client(number) for number in range(4)))
    await asyncio.sleep(0.03)
    server.kill()
    server.start()
    await asyncio.wait_for(clients, 30)
    listed = {entry["lease_id"]: entry for entry in (await persist(nc, "leases", {}))["leases"]}
    for lease_id, answer in answered.items():
        assert listed[lease_id] == answer["lease"]
    held = [grant["device"] for entry in listed.values() for grant in entry["grants"]]
    assert len(held) == len(set(held)) == 8
    planner.stop()
    events = Counter((event["lease"]["lease_id"], event["kind"], event["time"]) for _, event in await lease_events(nc))
    assert set(events.values()) == {1}
    await hosts.stop()


async def test_an_event_that_a_crash_swallowed_is_told_once(
    server: EmbeddedServer, nc: Client, planners: list[PlannerProcess]
) -> None:
    """A bucket as a crash leaves it: one change told though its mark was not moved, two changes never told."""
    js = nc.jetstream()
    now = datetime.now(UTC)
    term = (await js.publish("$KV.corral_planner.leader", b'{"planner":""}')).seq
    store = Store(nc)
    await store.open()
    for name in ("told", "untold"):
        record = lifecycle.grant(
            WorkRequest(owner="ann", request_id=f"r-{name}", ttl_seconds=100),
            [Grant(host="node0", device=f"GPU-{name}")],
            lease_id=name,
            now=now,
            digest="",
            planner="gone",
            environment={},
        )
        if name == "told":
            await js.publish(subjects.lease_subject("granted", name), codec.encode(record.event(), codec.JSON))
        else:
            record = lifecycle.renew(record, None, now + timedelta(seconds=1), "gone")
        await store.put(lease_key(name), codec.encode(record, codec.JSON), term)
    await store.put(WATERMARK, b"0", term)
    await store.close()
    planner = planners[0]
    for _ in range(2):
        planner.start()
        await until_ready(nc)
        assert len((await ask(nc, "leases", {}))["leases"]) == 2
        await asyncio.sleep(1.0)
        planner.kill()
    told = [(event["lease"]["lease_id"], event["kind"]) for _, event in await lease_events(nc)]
    assert sorted(told) == [("told", "granted"), ("untold", "granted"), ("untold", "renewed")]


async def test_writes_of_an_old_term_never_land(nc: Client) -> None:
    """Thousands on their way while another planner takes the leader's key: none lands after it."""
    store = Store(nc)
    await store.open()
    term = await store.claim(b'{"planner":"a"}', 0)
    assert term is not None
    writes: list[asyncio.Task[int]] = []
    taken: asyncio.Task[int | None] | None = None
    for number in range(4000):
        write = store.put(lease_key(str(number)), b"x" * 500, term, message_id=f"{number}.1")
        writes.append(asyncio.create_task(write))
        if number == 2000:
            await asyncio.sleep(0)
            taken = asyncio.create_task(store.claim(b'{"planner":"b"}', term))
        if number % 50 == 0:
            await asyncio.sleep(0)
    outcomes = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 10)
    assert taken is not None
    after = await taken
    assert after is not None
    landed = [outcome for outcome in outcomes if isinstance(outcome, int)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, Deposed)]
    assert len(landed) + len(refused) == 4000
    assert refused
    assert max(landed) < after
    stored = [entry async for entry in store.read_all(after)]
    assert len(stored) == len(landed) + 1
    assert await store.claim(b'{"planner":"a"}', term) is None
    await store.close()


async def test_faults_outlive_their_events(server: EmbeddedServer, nc: Client, planners: list[PlannerProcess]) -> None:
    """Health is kept in the bucket, so that a start reads only the events after it."""
    hosts = FakeHosts(nc, hosts=1, devices=3)
    kept, cleared, before = hosts.devices["node0"]

    async def event(device: str, severity: Severity) -> None:
        body = DeviceEvent(
            host="node0", agent="a", sequence=1, time_ns=time.time_ns(), kind="xid", severity=severity, device=device
        )
        await nc.jetstream().publish(subjects.events_subject("node0"), codec.encode(body))

    await event(before, Severity.RESET)
    info = await nc.jetstream().stream_info(subjects.FACTS_STREAM)
    fault = Fault(Severity.HARDWARE, "fell off the bus", 1)
    health = Health(sequence=info.state.last_seq, faults={f"device:{kept}": fault, f"device:{cleared}": fault})
    await nc.jetstream().publish("$KV.corral_planner.health", codec.encode(health))
    await event(cleared, Severity.CLEARED)
    await hosts.start()
    planners[0].start()
    await until_ready(nc, 2)
    status = {entry["uuid"]: entry for entry in (await ask(nc, "devices"))["devices"]}
    assert status[kept]["why_not"] == ["unhealthy"]
    assert status[kept]["health"] == "fell off the bus"
    assert [status[uuid]["why_not"] for uuid in (cleared, before)] == [[], []]
    await hosts.stop()


async def test_an_outage_of_planners_ends_no_lease(
    server: EmbeddedServer, nc: Client, planners: list[PlannerProcess]
) -> None:
    """Its time was over while nobody could renew it: it may be renewed for a while yet."""
    js = nc.jetstream()
    began = datetime.now(UTC) - timedelta(seconds=60)
    for name, ttl in (("overdue", 30), ("running", 300)):
        record = lifecycle.grant(
            WorkRequest(owner="ann", request_id=f"r-{name}", ttl_seconds=ttl),
            [Grant(host="node0", device=f"GPU-{name}")],
            lease_id=name,
            now=began,
            digest="",
            planner="gone",
            environment={},
        )
        await js.publish(f"$KV.corral_planner.{lease_key(name)}", codec.encode(record, codec.JSON))
    await js.publish("$KV.corral_planner.leader", b'{"planner":""}')
    await js.publish("$KV.corral_planner.heartbeat", str(time.time() - 50).encode())
    planners[0].start()
    await until_ready(nc)
    await asyncio.sleep(0.7)
    assert {lease["lease_id"] for lease in (await ask(nc, "leases", {}))["leases"]} == {"overdue", "running"}
    renewed = await ask(nc, "renew", {"owner": "ann", "lease_id": "overdue"})
    assert renewed["state"] == "active"

    # It also ends in order where the bus is away.
    server.kill()
    planners[0].stop()
    assert planners[0].process is not None
    assert planners[0].process.returncode == 0
