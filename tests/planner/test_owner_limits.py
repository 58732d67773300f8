"""One owner's flood is answered with when to ask again, and others do not notice."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import Client, TooManyRequests
from corral.client.errors import CorralError, InvalidRequest
from corral.planner.leases.usage import OwnerUsage, UsageByOwner
from corral.planner.limits import Limiter, Limits, TokenBuckets
from corral.planner.service import Settings, plan
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Nats
from support.planner_rig import FakeHosts, ask, running, until_ready

RATE, BURST = 5.0, 10.0
STEPS = st.lists(st.tuples(st.floats(0, 3), st.sampled_from("abc")), max_size=200)


@given(STEPS, st.floats(0.5, 50), st.floats(1, 20))
def test_a_bucket_lets_through_what_its_rate_and_burst_say(
    steps: list[tuple[float, str]], rate: float, burst: float
) -> None:
    buckets = TokenBuckets(rate, burst)
    now, passed = 0.0, dict.fromkeys("abc", 0)
    for pause, key in steps:
        now += pause
        after = buckets.take(key, now)
        if after == 0:
            passed[key] += 1
        else:
            # Who waits as long as it was told is let through, and who waits less is not.
            assert 0 < after <= 1 / rate + 1e-9
            other = copy.deepcopy(buckets)
            assert other.take(key, now + after / 2) > 0
            assert other.take(key, now + after + 1e-6) == 0
        assert passed[key] <= burst + now * rate + 1e-6
    assert len(buckets) <= 3


def test_names_that_are_made_up_take_no_more_memory_than_others() -> None:
    buckets = TokenBuckets(1.0, 2.0)
    for number in range(25_000):
        assert buckets.take(number, number * 1e-6) == 0
    assert len(buckets) <= 10_000
    assert TokenBuckets(0.0, 1.0).take("anyone", 0.0) == 0


def test_names_that_are_made_up_let_nobody_ask_more_often() -> None:
    buckets = TokenBuckets(1.0, 2.0)
    for _ in range(2):
        assert buckets.take("flood", 0.0) == 0
    for number in range(15_000):
        buckets.take(number, 0.0)
        if number % 5000 == 0:
            assert buckets.take("flood", 0.0) > 0
    assert buckets.take("flood", 0.0) > 0
    assert len(buckets) <= 10_000


@pytest.fixture
async def limited(server: EmbeddedServer, nc: Nats) -> AsyncIterator[Nats]:
    """A planner that lets one owner ask five times a second, with two requests in line."""
    stop = asyncio.Event()
    limits = Limits(requests_per_second=RATE, burst=BURST, waiting=2, request_bytes=4096)
    running = asyncio.create_task(plan(server.url, Settings(limits=limits), stop=stop))
    client = Client(nc, owner="someone", patience=20)
    await client.fleet()
    yield nc
    stop.set()
    await running


async def asked(nc: Nats, owner: str, **fields: Any) -> dict[str, Any]:
    body = json.dumps({"owner": owner, **fields}).encode()
    return json.loads((await nc.request("corral.v1.plan.request", body, timeout=20)).data)


async def refusal(client: Client) -> TooManyRequests:
    for _ in range(200):
        try:
            await client.explain(gpus=1)
        except TooManyRequests as error:
            return error
        except CorralError:
            pass
    raise AssertionError("nobody minds")


async def in_line(client: Client, count: int) -> None:
    for _ in range(500):
        if len(await client.queue()) >= count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("they are not in line")


async def test_a_flood_is_told_when_to_ask_again(limited: Nats) -> None:
    answers = await asyncio.gather(*(asked(limited, "flood") for _ in range(60)))
    refused = [answer for answer in answers if answer.get("code") == "too_many_requests"]
    assert len(answers) - len(refused) >= BURST
    assert len(refused) > 20
    assert all(0 < answer["retry_after_seconds"] <= 1 / RATE + 0.001 for answer in refused)
    # Nobody else notices.
    assert (await asked(limited, "quiet"))["type"] == "rejection"
    client = Client(limited, owner="flood")
    told = await refusal(client)
    assert told.retry_after_seconds is not None
    # What one holds is kept: leases have a bucket of their own.
    with pytest.raises(LookupError):
        await client.renew("no-such-lease")


async def test_explanations_take_no_requests_from_the_owner_that_they_name(limited: Nats) -> None:
    """A viewer may explain what anyone would get. Where the subject says who asks, that one is counted."""

    async def explained(verb: str, owner: str) -> str:
        body = json.dumps({"request": {"owner": owner}}).encode()
        reply = json.loads((await limited.request(f"corral.v1.plan.{verb}", body, timeout=20)).data)
        return reply.get("code", reply["type"])

    codes = await asyncio.gather(*(explained("explain.viewer", "victim") for _ in range(30)))
    assert "too_many_requests" in codes
    assert await explained("explain.other", "victim") != "too_many_requests"
    codes = await asyncio.gather(*(explained("explain", "victim") for _ in range(30)))
    assert "too_many_requests" in codes
    assert (await asked(limited, "victim"))["type"] == "rejection"


async def test_the_count_comes_before_the_reading(limited: Nats) -> None:
    """What is not even JSON is counted for the owner that the subject names."""

    async def garbage(owner: str) -> str:
        reply = await limited.request(f"corral.v1.plan.request.{owner}", b"\xff" * 1000, timeout=20)
        return json.loads(reply.data)["code"]

    codes = await asyncio.gather(*(garbage("noise") for _ in range(30)))
    assert set(codes) == {"undecodable", "too_many_requests"}
    assert await garbage("quiet") == "undecodable"


async def test_one_owner_has_so_many_in_line_and_no_more(limited: Nats) -> None:
    waiting = [asyncio.create_task(asked(limited, "patient", wait_seconds=30)) for _ in range(2)]
    client = Client(limited, owner="patient")
    await in_line(client, 2)
    third = await asked(limited, "patient", wait_seconds=30)
    assert third["code"] == "too_many_requests"
    assert "2 requests in line" in third["message"]
    other = asyncio.create_task(asked(limited, "another", wait_seconds=30))
    await in_line(client, 3)
    for task in (*waiting, other):
        task.cancel()


async def test_a_message_that_is_too_large_is_refused_unread(limited: Nats) -> None:
    client = Client(limited, owner="large")
    with pytest.raises(InvalidRequest, match="4096 are the most"):
        await client.request(gpus=1, name="x", labels={str(n): "y" * 200 for n in range(30)})


async def test_labels_are_few_and_short(server: EmbeddedServer, nc: Nats) -> None:
    async with running(server.url):
        await until_ready(nc)
        many = await asked(nc, "chatty", labels={str(n): "" for n in range(65)})
        assert (many["code"], many["field"]) == ("invalid", "$.labels")
        assert "64" in many["message"]
        long = {str(n): "y" * 256 for n in range(64)}
        told = await asked(nc, "chatty", labels=long)
        assert (told["code"], told["field"]) == ("too_large", "$.labels")
        assert "16384 are the most" in told["message"]
        assert (await asked(nc, "chatty", labels={**long, **{str(n): "" for n in range(3)}}))["type"] == "rejection"


async def test_one_owner_holds_so_many_leases_and_no_more(server: EmbeddedServer, nc: Nats) -> None:
    async with running(server.url, limits=Limits(leases=3)):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        body = {"owner": "greedy", "gpus": 0, "host_memory_bytes": 1}
        answers = await asyncio.gather(*(ask(nc, "request", body) for _ in range(6)))
        held = [answer["lease"] for answer in answers if answer["type"] == "assignment"]
        refused = [answer for answer in answers if answer["type"] == "error"]
        assert (len(held), len(refused)) == (3, 3)
        assert all(answer["code"] == "too_many_requests" for answer in refused)
        assert "release some" in refused[0]["message"]
        assert (await ask(nc, "request", {**body, "owner": "modest"}))["type"] == "assignment"
        mine = {"owner": "greedy", "lease_id": held[0]["lease_id"]}
        assert (await ask(nc, "renew", mine))["state"] == "active"
        assert (await ask(nc, "release", mine))["state"] == "released"
        assert (await ask(nc, "request", body))["type"] == "assignment"
        assert (await ask(nc, "request", body))["code"] == "too_many_requests"
        # What was refused holds nothing.
        assert (await ask(nc, "fleet"))["active_leases"] == 4
        await hosts.stop()


async def test_the_bucket_is_no_owners_alone(server: EmbeddedServer, nc: Nats) -> None:
    """Leases that have ended stay in it for an hour: they count."""
    async with running(server.url, limits=Limits(lease_bytes=80_000)):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        body = {"owner": "wordy", "distribution": {"items": 6000}}
        for _ in range(2):
            lease = (await ask(nc, "request", body))["lease"]
            await ask(nc, "release", {"owner": "wordy", "lease_id": lease["lease_id"]})
        third = await ask(nc, "request", body)
        assert third["code"] == "too_many_requests"
        assert "KiB" in third["message"]
        assert (await ask(nc, "request", {**body, "owner": "another"}))["type"] == "assignment"
        await hosts.stop()


def test_a_bucket_that_is_nearly_full_takes_no_new_leases() -> None:
    owners = UsageByOwner()
    limiter = Limiter(Limits())
    for number in range(70):
        assert limiter.lease_quota(f"o{number}", owners, 1000, 100_000) is None
        owners.add(f"o{number}", 1, 1000)
    owners.add("o70", 1, 14_500)
    refused = limiter.lease_quota("o71", owners, 1000, 100_000)
    assert refused is not None
    assert refused.code == "unavailable"
    assert limiter.lease_quota("o71", owners, 1000, 0) is None
    for number in range(70):
        owners.add(f"o{number}", -1, -1000)
    assert owners.bytes == 14_500
    assert owners.of("o1") == OwnerUsage()
