"""What is in the bucket, or is not any more, keeps no planner from leading; what is on its way there is answered."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from corral.planner.durable.store import lease_key
from corral.planner.leases import lifecycle
from corral.planner.service import Planner, Settings
from corral.schemas import codec, subjects
from corral.schemas.requests import Distributed, Grant, Method, WorkRequest
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, ask, lease_events, persist, stream, until_ready

KEYS = "$KV.corral_planner."


@pytest.fixture
def planner(server: EmbeddedServer, tmp_path: Path) -> Iterator[PlannerProcess]:
    """A planner, not started yet, that does not outlive the test."""
    process = PlannerProcess(server.url, tmp_path / "planner.log")
    yield process
    process.kill()


def record(name: str, distribution: Distributed | None = None) -> bytes:
    granted = lifecycle.grant(
        WorkRequest(owner="ann", request_id=f"r-{name}", ttl_seconds=100),
        [Grant(host="node0", device=f"GPU-node0-{name}")],
        lease_id=name,
        now=datetime.now(UTC),
        digest="",
        planner="gone",
        environment={},
        distribution=distribution,
    )
    return codec.encode(granted, codec.JSON)


async def test_records_that_cannot_be_read_keep_no_planner_from_leading(nc: Client, planner: PlannerProcess) -> None:
    js = nc.jetstream()
    infinite = Distributed(method=Method.BALANCED, weights=[1e-320], makespan=float("inf"), bound=0.0)
    entries = {
        lease_key("0"): record("0"),
        lease_key("1"): record("1", infinite),
        lease_key("2"): b'{"lease":null}',
        lease_key("3"): b"",
        "answer.x": b"{",
        "drains": b"[]",
        "groups": b'{"tree":{"groups":[{"name":"lab","weight":2,"quantum":1}]},"revision":7}',
        "told": b"",
        "health": b"\xff",
        "leader": b'{"planner":""}',
    }
    for key, value in entries.items():
        await js.publish(f"{KEYS}{key}", value)
    hosts = FakeHosts(nc, hosts=1)
    await hosts.start()
    planner.start()
    await until_ready(nc, 4)
    assert [lease["lease_id"] for lease in (await ask(nc, "leases", {}))["leases"]] == ["0", "1"]
    groups = await ask(nc, "groups")
    assert (groups["revision"], groups["groups"][1]["group"]) == (7, {"name": "lab", "weight": 2.0})
    # The one whose distribution can't be read goes on holding its device.
    more = (await ask(nc, "request", {"owner": "bob", "gpus": 2}))["lease"]
    assert {grant["device"] for grant in more["grants"]} == {"GPU-node0-2", "GPU-node0-3"}
    assert (await ask(nc, "request", {"owner": "bob"}))["type"] == "rejection"
    for lease_id in ("0", "1"):
        assert (await ask(nc, "release", {"owner": "ann", "lease_id": lease_id}))["state"] == "released"
    said = await asyncio.to_thread(Path(planner.log).read_text)
    assert "lease 2 can't be read" in said
    assert "lease 1 is read without" in said
    await hosts.stop()


async def test_a_deleted_leader_key_is_a_place_to_take(nc: Client, planner: PlannerProcess) -> None:
    planner.start()
    await until_ready(nc)
    bucket = await nc.jetstream().key_value(subjects.PLANNER_BUCKET)
    for deleted in (b"", b"\xff{", b"7"):
        await nc.jetstream().publish(f"{KEYS}heartbeat", deleted)
        await bucket.delete("leader") if not deleted else await bucket.put("leader", deleted)
        await asyncio.sleep(0.7)
        assert (await persist(nc, "fleet", {}))["type"] == "fleet"


async def test_whoever_is_told_that_nothing_was_done_holds_nothing(server: EmbeddedServer, nc: Client) -> None:
    """A planner stops while grants are on their way: they are answered as they land; those in line stay in it."""
    hosts = FakeHosts(nc)
    await hosts.start()
    own = [await connect(server.url, name=name) for name in ("planner", "telemetry", "leader")]
    planner = Planner(*own, Settings())
    await planner.start()
    await until_ready(nc, 8)
    await ask(nc, "request", {"owner": "all", "gpus": 4, "hosts": ["node0"], "request_id": "all"})
    line = {"owner": "eve", "gpus": 4, "hosts": ["node0"], "wait_seconds": 60, "request_id": "line"}
    waiting = asyncio.create_task(ask(nc, "request", line, timeout=10))
    while not (await ask(nc, "queue"))["entries"]:
        pass
    few = {"owner": "ann", "gpus": 0, "cpus": 0.001}
    asked = [asyncio.create_task(ask(nc, "request", {**few, "request_id": f"r{number}"})) for number in range(200)]
    broker = planner._broker  # pyright: ignore[reportPrivateUsage]
    assert broker is not None
    while len(broker._pending) < 2:  # noqa: ASYNC110  # pyright: ignore[reportPrivateUsage]
        await asyncio.sleep(0)
    await planner.stop()
    assert not waiting.done()
    kept = [message async for message in stream(nc, "KV_corral_planner", f"{KEYS}queue.>")]
    assert [json.loads(message.data)["request"]["request_id"] for message in kept if message.data] == ["line"]
    waiting.cancel()
    answers = [answer for answer in await asyncio.gather(*asked, return_exceptions=True) if isinstance(answer, dict)]
    assert answers
    entries = stream(nc, "KV_corral_planner", f"{KEYS}lease.>")
    granted = {json.loads(message.data)["lease"]["request_id"] async for message in entries}
    assert {answer["lease"]["request_id"] for answer in answers} == granted - {"all"}
    for connection in own:
        await connection.close()
    await hosts.stop()


async def test_drains_that_are_too_many_are_refused_and_others_go_on(nc: Client, planner: PlannerProcess) -> None:
    planner.start()
    await until_ready(nc)
    labels = {f"k{number}": "v" for number in range(20_000)}
    refused = await ask(nc, "drain", {"drain": True, "host_labels": labels, "reason": "x" * 100})
    assert refused["type"] == "error"
    assert "max_payload" in refused["message"]
    drained = await ask(nc, "drain", {"drain": True, "host_labels": {"k": "v"}, "reason": "fan"})
    assert drained["drains"] == {"label:k=v": "fan"}


async def test_nobody_else_can_use_up_the_ids_of_events(nc: Client, planner: PlannerProcess) -> None:
    js = nc.jetstream()
    hosts = FakeHosts(nc)
    await hosts.start()
    planner.start()
    await until_ready(nc, 8)
    first = (await ask(nc, "request", {"owner": "ann", "request_id": "a"}))["lease"]["lease_id"]
    start, _, number = first.rpartition("-")
    second = f"{start}-{int(number, 16) + 1:x}"
    await js.publish(subjects.events_subject("node0"), b"x", headers={"Nats-Msg-Id": f"{second}.1"})
    assert (await ask(nc, "request", {"owner": "ann", "request_id": "b"}))["lease"]["lease_id"] == second
    await asyncio.sleep(0.3)
    assert [event["lease"]["lease_id"] for _, event in await lease_events(nc)] == [first, second]
    key = await js.get_last_msg("KV_corral_planner", f"{KEYS}event_key")

    # Whoever leads next sends events under the same ids.
    planner.kill()
    planner.start()
    await persist(nc, "renew", {"owner": "ann", "lease_id": second})
    await asyncio.sleep(0.3)
    again = await js.get_last_msg("KV_corral_planner", f"{KEYS}event_key")
    assert (again.seq, again.data) == (key.seq, key.data)
    found = [message async for message in stream(nc, subjects.FACTS_STREAM, f"{subjects.LEASE_EVENTS}.>")]
    names = [f"{first}.1", f"{second}.1", f"{second}.2"]
    ids = [hashlib.blake2b(name.encode(), key=key.data or b"", digest_size=16).hexdigest() for name in names]
    assert [message.headers["Nats-Msg-Id"] for message in found] == ids
    await hosts.stop()
