"""The planner as its clients meet it: over a real bus, as JSON, from a client that knows nothing of Corral."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from corral.bus.connect import connect as bus_connect
from corral.cli.local.server import EmbeddedServer
from corral.client import connect
from corral.schemas import codec, subjects
from nats.aio.client import Client
from support.planner_rig import GIB, FakeHosts, ask, lease_events, running, until_ready


@pytest.fixture
async def fleet(server: EmbeddedServer, nc: Client) -> AsyncIterator[FakeHosts]:
    """Two hosts of four devices, and a planner that knows them."""
    hosts = FakeHosts(nc)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 8)
        yield hosts
        await hosts.stop()


async def test_a_bare_client_requests_and_releases(server: EmbeddedServer, nc: Client, fleet: FakeHosts) -> None:
    bare = await nats.connect(server.url)
    body = b'{"owner": "ann", "gpus": 2, "gpu_memory_bytes": 21474836480, "name": "train"}'
    reply = json.loads((await bare.request("corral.v1.plan.request", body, timeout=5)).data)
    assert reply["type"] == "assignment"
    lease = reply["lease"]
    uuids = [grant["device"] for grant in lease["grants"]]
    host = lease["grants"][0]["host"]
    assert len(set(uuids)) == 2
    assert lease["environment"] == {host: {"CUDA_VISIBLE_DEVICES": ",".join(uuids), "CORRAL_LEASE": lease["lease_id"]}}
    release = json.dumps({"owner": "ann", "lease_id": lease["lease_id"]}).encode()
    ended = json.loads((await bare.request("corral.v1.plan.release", release, timeout=5)).data)
    assert (ended["type"], ended["state"]) == ("lease", "released")
    again = json.loads((await bare.request("corral.v1.plan.release", release, timeout=5)).data)
    assert again == ended
    packed = await bare.request(
        "corral.v1.plan.request",
        msgspec.msgpack.encode({"owner": "ann", "gpus": 8, "placement": "fewest_hosts"}),
        timeout=5,
        headers={"Content-Type": "application/msgpack"},
    )
    assert packed.headers is not None
    assert packed.headers["Content-Type"] == "application/msgpack"
    assert len(msgspec.msgpack.decode(packed.data)["lease"]["grants"]) == 8
    ping = json.loads((await bare.request("$SRV.PING.corral-planner", b"", timeout=5)).data)
    info = json.loads((await bare.request("$SRV.INFO.corral-planner", b"", timeout=5)).data)
    stats = json.loads((await bare.request("$SRV.STATS.corral-planner", b"", timeout=5)).data)
    assert ping["metadata"]["role"] == "leader"
    assert "corral.v1.plan.request" in {endpoint["subject"] for endpoint in info["endpoints"]}
    assert {e["name"]: e["num_requests"] for e in stats["endpoints"]}["release"] == 2
    await bare.close()


BAD = [
    ("request", {"owner": "a", "gpus": -1}, "invalid", "$.gpus"),
    ("request", {"owner": "a", "gpus": 0}, "invalid", "$.gpus"),
    ("request", {"owner": "a", "gpus": 2, "gpu_share": 0.5}, "invalid", "$.gpu_share"),
    ("request", {"owner": "a", "gpu_share": 0}, "invalid", "$.gpu_share"),
    ("request", {"owner": "a", "policy": "luck"}, "invalid", "$.policy"),
    ("request", {"owner": "a", "gpu_memroy_bytes": 5}, "invalid", "$.gpu_memroy_bytes"),
    ("request", {"owner": "a", "gpu_memory_bytes": "20GiB"}, "invalid", "$.gpu_memory_bytes"),
    ("request", {"owner": "a", "ttl_seconds": 0}, "invalid", "$.ttl_seconds"),
    ("request", {"owner": "a b", "gpus": 1}, "invalid", "$.owner"),
    ("request", {"gpus": 1}, "invalid", "$.owner"),
    ("request", {"owner": "a", "request_id": "a.b"}, "invalid", "$.request_id"),
    ("request", b"\xff\xfe", "undecodable", ""),
    ("request", b'{"labels":' * 100_000, "invalid", "$.labels[...]"),
    ("request", [1], "invalid", ""),
    ("renew", {"owner": "a", "lease_id": "nope"}, "not_found", "$.lease_id"),
    ("release", {"owner": "a", "lease_id": "nope"}, "not_found", "$.lease_id"),
    ("evict", {"lease_id": "nope", "reason": "why"}, "not_found", "$.lease_id"),
    ("evict", {"lease_id": "nope"}, "invalid", "$.reason"),
    ("drain", {"drain": True, "hosts": ["node0"]}, "invalid", "$.reason"),
    ("drain", {"drain": True, "reason": "x"}, "invalid", "$.devices"),
    ("drain", {"drain": True, "hosts": ["nodeX"], "reason": "x"}, "not_found", "$.hosts[0]"),
    (
        "explain",
        {"request": {"owner": "a"}, "with_more": [{"model": "Z", "devices": 1}]},
        "invalid",
        "$.with_more[0].model",
    ),
    ("leases", {"states": ["gone"]}, "invalid", "$.states[0]"),
    ("request.bob", {"owner": "ann"}, "refused", "$.owner"),
    ("renew.bob", {"owner": 5, "lease_id": "nope"}, "invalid", "$.owner"),
    # An empty message may be the server's own, and grants nothing.
    *((f"{verb}{at}", b"", "invalid", "") for verb in ("request", "explain", "renew", "drain") for at in ("", ".bob")),
]


async def test_bad_input_gets_a_clear_error(nc: Client, fleet: FakeHosts) -> None:
    for verb, body, code, field in BAD:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        message = await nc.request(f"corral.v1.plan.{verb}", data, timeout=5)
        reply = json.loads(message.data)
        assert (reply["type"], reply["code"], reply.get("field", "")) == ("error", code, field), (body, reply)
        assert message.headers is not None
        assert message.headers["Nats-Service-Error"] == reply["message"][:256]
        assert message.headers["Nats-Service-Error-Code"].startswith("4")
    unknown = await ask(nc, "request", {"owner": "a"}, headers={"Content-Type": "text/xml"})
    assert "application/json" in unknown["message"]
    # Beyond any device, and beyond the fleet: no error, but a rejection with its reasons.
    beyond = await ask(nc, "request", {"owner": "a", "gpu_memory_bytes": 2**50})
    assert (beyond["type"], beyond["code"]) == ("rejection", "impossible")
    with pytest.raises(nats.errors.MaxPayloadError):
        await nc.request("corral.v1.plan.request", b"x" * 10_000_000)
    # The answer to this one would be larger than any message.
    big = await ask(nc, "request", {"owner": "a", "distribution": {"items": 1_000_000}}, timeout=20)
    assert big["code"] == "too_large"
    assert (await ask(nc, "fleet"))["leased_devices"] == 0
    future = await ask(nc, "request", {"owner": "a", "colour_of_tomorrow": "blue"})
    assert future["type"] == "assignment"
    assert "colour_of_tomorrow" in future["warnings"][0]


async def test_the_subject_makes_the_owner_certain(nc: Client, fleet: FakeHosts) -> None:
    explained = await ask(nc, "explain.bob", {"request": {"gpus": 1}})
    assert explained["granted"], "whose request it would be stands in the subject"
    undrained = await ask(nc, "drain.olga", {"drain": False, "hosts": ["node0"], "operator": ""})
    assert undrained["type"] == "drains"
    mine = await ask(nc, "request.team.bob", {"gpus": 1})
    assert mine["lease"]["owner"] == "team.bob"
    lease_id = mine["lease"]["lease_id"]
    stolen = await ask(nc, "release.ann", {"lease_id": lease_id})
    assert stolen["code"] == "not_owner"
    assert (await ask(nc, "renew.team.bob", {"lease_id": lease_id}))["state"] == "active"
    assert (await ask(nc, "release.team.bob", {"lease_id": lease_id}))["state"] == "released"


async def test_one_id_has_one_answer(nc: Client, fleet: FakeHosts) -> None:
    job = {"owner": "ann", "gpus": 1, "request_id": "job-1"}
    body = job | {"labels": {"a": "1", "b": "2"}, "distribution": {"items": ["a", {"id": "b"}]}}
    written_out = {"method": "uniform", "items": ["a", {"cost": 1.0, "id": "b"}], "memory_per_item_bytes": 0}
    same = {"labels": {"b": "2", "a": "1"}, "wait_seconds": 0, "distribution": written_out} | job
    answers = await asyncio.gather(*(ask(nc, "request", body if n % 2 else same) for n in range(20)))
    assert all(answer == answers[0] for answer in answers)
    lease_id = answers[0]["lease"]["lease_id"]
    assert (await ask(nc, "request", {**body, "gpus": 2}))["code"] == "conflict"
    await ask(nc, "renew", {"owner": "ann", "lease_id": lease_id})
    assert await ask(nc, "request", body) == answers[0]
    await ask(nc, "release", {"owner": "ann", "lease_id": lease_id})
    # Its devices may be another's by now: nothing that looks like a grant is an answer any more.
    over = await ask(nc, "request", body)
    assert (over["code"], over["field"]) == ("ended", "$.request_id")
    assert lease_id in over["message"]
    no = {"owner": "ann", "gpus": 9, "request_id": "job-2"}
    rejected = await asyncio.gather(*(ask(nc, "request", no) for _ in range(5)))
    assert all(answer == rejected[0] for answer in rejected)
    assert (await ask(nc, "request", {**no, "gpus": 1}))["code"] == "conflict"
    assert [event["kind"] for _, event in await lease_events(nc)] == ["granted", "renewed", "released"]


async def test_ids_are_their_owners_own(nc: Client, fleet: FakeHosts) -> None:
    """Granted, refused, withdrawn or in line: what one does under an id is nothing to another."""
    wish = {"gpus": 1, "request_id": "nightly"}
    first = await ask(nc, "request.mallory", wish)
    second = await ask(nc, "request.alice", wish)
    assert {first["type"], second["type"]} == {"assignment"}
    assert first["lease"]["lease_id"] != second["lease"]["lease_id"]
    assert await ask(nc, "request.mallory", wish) == first

    # What is turned down, and what is withdrawn before it comes; each by two owners, so that keys would meet.
    for owner in ("mallory", "eve"):
        assert (await ask(nc, f"request.{owner}", {"gpus": 99, "request_id": "eval"}))["type"] == "rejection"
        assert (await ask(nc, f"withdraw.{owner}", {"request_id": "eve"}))["code"] == "withdrawn"
    for request_id in ("eval", "eve"):
        assert (await ask(nc, "request.alice", {"gpus": 1, "request_id": request_id}))["type"] == "assignment"
    for owner in ("mallory", "eve"):
        assert (await ask(nc, f"request.{owner}", {"gpus": 1, "request_id": "eve"}))["code"] == "withdrawn"

    # In line under the same id: one's withdrawal leaves the other there.
    line = {"gpus": 8, "placement": "fewest_hosts", "wait_seconds": 20, "request_id": "line"}
    waiting = {owner: asyncio.create_task(ask(nc, f"request.{owner}", line, timeout=30)) for owner in ("ann", "bob")}
    for _ in range(200):
        if len((await ask(nc, "queue"))["entries"]) == 2:
            break
        await asyncio.sleep(0.05)
    assert (await ask(nc, "withdraw.ann", {"request_id": "line"}))["code"] == "withdrawn"
    assert (await waiting["ann"])["code"] == "withdrawn"
    assert [entry["owner"] for entry in (await ask(nc, "queue"))["entries"]] == ["bob"]
    await ask(nc, "withdraw.bob", {"request_id": "line"})
    await waiting["bob"]


async def test_requests_wait_by_priority_and_arrival(nc: Client, fleet: FakeHosts) -> None:
    everything = {"owner": "first", "gpus": 8, "placement": "fewest_hosts"}
    held = await ask(nc, "request", everything)
    half = {"gpus": 4, "wait_seconds": 20}
    waiting: dict[str, asyncio.Task[dict[str, Any]]] = {}
    for owner, priority in (("late", 0), ("later", 0), ("urgent", 5)):
        body = {**half, "owner": owner, "priority": priority, "request_id": f"r-{owner}"}
        waiting[owner] = asyncio.create_task(ask(nc, "request", body, timeout=20))
        await asyncio.sleep(0.05)
    again = asyncio.create_task(ask(nc, "request", {**half, "owner": "late", "request_id": "r-late"}, timeout=20))
    short = await ask(nc, "request", {**half, "owner": "hasty", "wait_seconds": 0.3})
    assert (short["type"], short["code"]) == ("rejection", "timed_out")
    assert "nothing came free within" in short["message"]
    impossible = await ask(nc, "request", {**half, "owner": "x", "gpus": 99})
    assert impossible["code"] == "impossible"
    queue = (await ask(nc, "queue"))["entries"]
    assert [(entry["owner"], entry["position"]) for entry in queue] == [("urgent", 1), ("late", 2), ("later", 3)]
    assert (await ask(nc, "fleet"))["waiting_requests"] == 3
    await ask(nc, "release", {"owner": "first", "lease_id": held["lease"]["lease_id"]})
    urgent, late = await waiting["urgent"], await waiting["late"]
    assert (urgent["type"], late["type"]) == ("assignment", "assignment")
    assert await again == late
    assert not waiting["later"].done()
    await ask(nc, "release", {"owner": "late", "lease_id": late["lease"]["lease_id"]})
    assert (await waiting["later"])["type"] == "assignment"


async def test_a_lease_ends_in_time_and_says_so(nc: Client, fleet: FakeHosts) -> None:
    heard: list[dict[str, Any]] = []

    async def hear(message: Any) -> None:
        heard.append(json.loads(message.data))

    await nc.subscribe("corral.v1.leases.>", cb=hear)
    body = {"owner": "ann", "gpus": 8, "placement": "fewest_hosts", "ttl_seconds": 1}
    lease = (await ask(nc, "request", body))["lease"]
    taken = await ask(nc, "request", {"owner": "bob", "wait_seconds": 5}, timeout=6)
    assert taken["type"] == "assignment"
    kinds = [(event["kind"], event["lease"]["lease_id"]) for event in heard[:3]]
    assert kinds == [(kind, lease["lease_id"]) for kind in ("granted", "expiring", "expired")]
    assert taken["lease"]["granted_at"] >= lease["expires_at"]
    late = await ask(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]})
    assert late["code"] == "ended"
    listed = await ask(nc, "leases", {"states": ["expired"]})
    assert [entry["lease_id"] for entry in listed["leases"]] == [lease["lease_id"]]
    kept = (await ask(nc, "request", {"owner": "ann", "ttl_seconds": 1}))["lease"]
    for _ in range(4):
        await asyncio.sleep(0.4)
        renewed = await ask(nc, "renew", {"owner": "ann", "lease_id": kept["lease_id"]})
        assert renewed["state"] == "active"


async def test_operators_drain_and_evict(server: EmbeddedServer, nc: Client, fleet: FakeHosts) -> None:
    lease = (await ask(nc, "request", {"owner": "ann"}))["lease"]
    host = lease["grants"][0]["host"]
    other = "node1" if host == "node0" else "node0"
    drained = await ask(nc, "drain", {"drain": True, "hosts": [other], "reason": "fan", "operator": "op"})
    assert drained["drains"] == {f"host:{other}": "fan (by op)"}
    no = await ask(nc, "request", {"owner": "bob", "hosts": [other]})
    assert "drained" in no["message"]
    status = await ask(nc, "devices", {"hosts": [other]})
    assert {entry["drain_reason"] for entry in status["devices"]} == {"fan (by op)"}
    waiting = asyncio.create_task(ask(nc, "request", {"owner": "bob", "hosts": [other], "wait_seconds": 5}, timeout=6))
    await asyncio.sleep(0.1)
    assert (await ask(nc, "drain", {"drain": False, "hosts": [other]}))["drains"] == {}
    assert (await waiting)["type"] == "assignment"
    evicted = await ask(nc, "evict", {"lease_id": lease["lease_id"], "reason": "maintenance", "operator": "op"})
    assert (evicted["state"], evicted["reason"]) == ("evicted", "maintenance (by op)")
    gone = await ask(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]})
    assert gone["code"] == "ended"
    assert "maintenance" in gone["message"]


async def test_several_hosts_are_of_one_rack(server: EmbeddedServer, nc: Client) -> None:
    racks = [FakeHosts(nc, prefix=f"{rack}-", labels={"rack": rack}) for rack in ("r1", "r2")]
    for hosts in racks:
        await hosts.start()
    async with running(server.url):
        await until_ready(nc, 16)
        want = {"owner": "ann", "gpus": 5, "placement": "fewest_hosts", "within": "rack"}
        for _ in racks:
            lease = (await ask(nc, "request", want))["lease"]
            assert len({grant["host"][:2] for grant in lease["grants"]}) == 1
        # Six devices are free, three in each rack.
        refused = await ask(nc, "request", want)
        assert "the request needs 5 within one rack (nearest: rack r1 with 3)" in refused["message"]
        told = await ask(nc, "explain", {"request": want})
        assert told["rejection"]["nearest"] == refused["nearest"]
        waiting = asyncio.create_task(ask(nc, "request", {**want, "request_id": "w", "wait_seconds": 60}, timeout=60))
        while True:
            queue = (await ask(nc, "queue"))["entries"]
            if queue and queue[0]["reserved_hosts"]:
                break
            await asyncio.sleep(0.05)
        assert len({name[:2] for name in queue[0]["reserved_hosts"]}) == 1
        soft = await ask(nc, "request", {**want, "owner": "bob", "within": None, "prefer_within": "rack", "gpus": 3})
        assert len({grant["host"][:2] for grant in soft["lease"]["grants"]}) == 1
        await ask(nc, "release", {"owner": "ann", "lease_id": lease["lease_id"]})
        granted = await waiting
        assert {grant["host"][:2] for grant in granted["lease"]["grants"]} == {lease["grants"][0]["host"][:2]}
        wrong = await ask(nc, "request", {"owner": "ann", "gpus": 2, "within": "rack"})
        assert (wrong["code"], wrong["field"]) == ("invalid", "$.within")
    for hosts in racks:
        await hosts.stop()


async def test_foreign_memory_and_silence_keep_devices_away(server: EmbeddedServer, nc: Client) -> None:
    hosts = FakeHosts(nc, hosts=2, devices=1)
    hosts.used["GPU-node0-0"] = 70 * GIB
    await hosts.start(0.2)
    async with running(server.url, stale_after_seconds=1.0, lost_after_seconds=2.0):
        await until_ready(nc, 2)
        lease = (await ask(nc, "request", {"owner": "ann", "gpu_memory_bytes": 20 * GIB}))["lease"]
        assert lease["grants"][0]["host"] == "node1"
        assert "memory" in (await ask(nc, "request", {"owner": "ann", "gpu_memory_bytes": 20 * GIB}))["message"]
        lost = await nc.subscribe(f"corral.v1.leases.lost.{lease['lease_id']}")
        hosts.silent.add("node1")
        event = json.loads((await lost.next_msg(timeout=5)).data)
        assert event["lease"]["state"] == "lost"
        assert "node1" in event["lease"]["reason"]
        status = {entry["host"]: entry for entry in (await ask(nc, "devices"))["devices"]}
        assert status["node1"]["why_not"] == ["host_lost", "stale"]
        hosts.silent.clear()
        await until_ready(nc, 2)
    await hosts.stop()


async def test_a_bus_that_lets_large_messages_through_floods_no_planner(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "nats", max_payload_bytes=16 * 2**20)
    server.start()
    nc = await bus_connect(server.url)
    async with running(server.url):
        await until_ready(nc)
        body = {"owner": "a", "distribution": {"items": ["x" * 100] * 100_000}}
        large = await ask(nc, "request", body, timeout=10)
        assert (large["type"], large["code"]) == ("error", "too_large")
        assert "1048576" in large["message"]
    await nc.close()
    server.kill()


async def test_more_leases_than_fit_in_a_message_are_listed(server: EmbeddedServer, nc: Client) -> None:
    hosts = FakeHosts(nc, hosts=2, devices=8)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 16)
        body = {"owner": "ann", "gpu_share": 0.005, "labels": {"note": "x" * 200}}
        ids: list[str] = []
        for _ in range(16):  # fewer at a time than a planner on a busy machine puts off
            granted = await asyncio.gather(*(ask(nc, "request", body, timeout=60) for _ in range(100)))
            ids += [answer["lease"]["lease_id"] for answer in granted]
        whole = await ask(nc, "leases", {})
        assert (whole["type"], whole["code"]) == ("error", "too_large")
        part = await ask(nc, "leases", {"offset": 3, "limit": 2})
        async with connect(server.url, owner="ann") as client:
            listed = [lease.lease_id for lease in await client.leases()]
        assert sorted(listed) == sorted(ids)
        assert [lease["lease_id"] for lease in part["leases"]] == listed[3:5]
    await hosts.stop()


async def test_an_inventory_that_no_table_could_hold_is_ignored(nc: Client, fleet: FakeHosts) -> None:
    good = fleet.inventory("node0")
    for field, value in (("index", 2**31), ("index", -1), ("memory_bytes", 2**63)):
        device = msgspec.structs.replace(good.devices[0], uuid="GPU-odd", **{field: value})
        bad = msgspec.structs.replace(good, time_ns=good.time_ns + 10**9, devices=[device])
        await nc.publish(subjects.inventory_subject("node0"), codec.encode(bad))
    await nc.flush()
    await asyncio.sleep(0.3)
    assert {entry["uuid"] for entry in (await ask(nc, "devices", {"hosts": ["node0"]}))["devices"]} == {
        device.uuid for device in good.devices
    }
