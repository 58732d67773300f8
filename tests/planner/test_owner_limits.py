"""One owner's flood is answered with when to ask again, and others do not notice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from corral.cli.server import EmbeddedServer
from corral.client import Client, TooManyRequests
from corral.client.errors import CorralError, InvalidRequest
from corral.planner.limits import Limits, TokenBuckets
from corral.planner.service import Settings, plan
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Nats

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
            other = TokenBuckets(rate, burst)
            other._buckets = dict(buckets._buckets)
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
