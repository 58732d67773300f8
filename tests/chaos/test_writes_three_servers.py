"""The planner's bucket on three servers: writes go in groups, and each is told what became of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from corral.bus.layout import ensure_layout, until_laid_out
from corral.planner.durable.bucket import MIN_BYTES
from corral.planner.durable.store import HEARTBEAT, Deposed, Entry, Store, WriteFailed
from corral.schemas import subjects
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError, ServiceUnavailableError
from support.chaos.load import connect
from support.chaos.parts import Bus, Place

pytestmark = pytest.mark.long

KV = f"KV_{subjects.PLANNER_BUCKET}"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Bus]:
    made = Bus(tmp_path, [Place()] * 3)
    made.start()
    yield made
    for server in made.servers:
        server.kill()


@pytest.fixture
async def nc(servers: Bus) -> AsyncIterator[Client]:
    client = await connect(servers.urls)
    async with asyncio.timeout(30):
        await until_laid_out(client.jetstream())
    yield client
    await client.close()


async def opened(nc: Client) -> Store:
    store = Store(nc)
    await store.open()
    return store


async def lead(store: Store, revision: int = 0) -> int:
    term = await store.claim(b"planner", revision)
    assert term is not None
    return term


class Writes:
    """Many at once, each with its outcome."""

    def __init__(self, store: Store, term: int) -> None:
        self.store, self.term = store, term
        self.outcomes: dict[str, int | BaseException] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def send(self, *keys: str, size: int = 200) -> None:
        async def write(key: str) -> None:
            put = self.store.put(f"lease.{key}", key.encode() * size, self.term, message_id=key)
            [self.outcomes[key]] = await asyncio.gather(put, return_exceptions=True)

        self._tasks += [asyncio.create_task(write(key)) for key in keys]
        await asyncio.sleep(0)  # all of them begin

    async def settled(self, seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while self.store.in_flight:
                await self.store.maintain()
                await asyncio.sleep(0.05)
            await asyncio.gather(*self._tasks)

    async def _stored(self, key: str) -> Entry | None:
        """What the bucket holds; servers of which one has died may be without a leader for a moment."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(ServiceUnavailableError):
                    return await self.store.get(key)
                await asyncio.sleep(0.1)

    async def check(self) -> None:
        """What was told is so: stored at that revision, or not stored."""
        for key, outcome in self.outcomes.items():
            entry = await self._stored(f"lease.{key}")
            if isinstance(outcome, int):
                assert entry is not None, key
                assert entry.revision == outcome, key
            else:
                assert entry is None, key


async def test_what_waits_goes_together_and_a_deposed_leader_lands_nothing(nc: Client) -> None:
    store = await opened(nc)
    term = await lead(store)
    batches: list[str] = []

    async def seen(message: Msg) -> None:
        batches.append((message.headers or {}).get("Nats-Batch-Id", ""))

    await nc.subscribe(f"$KV.{subjects.PLANNER_BUCKET}.lease.*", cb=seen)
    writes = Writes(store, term)
    await writes.send(*(f"k{number}" for number in range(700)))
    beat = asyncio.create_task(store.put(HEARTBEAT, b"1", term))
    await writes.settled()
    await writes.check()
    assert len(writes.outcomes) == 700
    # The first went alone, and all that waited for it in as few batches as hold so many; the heartbeat before most.
    assert batches[0] == ""
    assert len(set(batches[1:])) == 3
    assert await beat < sorted(outcome for outcome in writes.outcomes.values() if isinstance(outcome, int))[300]
    found = await nc.jetstream().stream_info(KV)
    assert found.state.last_seq == 702

    other = await opened(nc)
    await lead(other, term)
    late = Writes(store, term)
    await late.send(*(f"late{number}" for number in range(300)))
    await late.settled()
    assert all(isinstance(outcome, Deposed) for outcome in late.outcomes.values())
    await late.check()


async def test_a_batch_that_does_not_fit_is_taken_apart(nc: Client) -> None:
    config = (await nc.jetstream().stream_info(KV)).config
    config.max_bytes = MIN_BYTES
    await nc.jetstream().update_stream(config)
    store = await opened(nc)
    writes = Writes(store, await lead(store))
    await writes.send(*(f"key-{number:03}" for number in range(3200)))
    await writes.settled()
    await writes.check()
    stored = [key for key, outcome in writes.outcomes.items() if isinstance(outcome, int)]
    assert 2000 < len(stored) < 2800
    assert all(isinstance(outcome, int | WriteFailed) for outcome in writes.outcomes.values())


async def test_a_server_that_dies_with_a_batch_on_its_way_stores_each_write_once(nc: Client, servers: Bus) -> None:
    store = await opened(nc)
    term = await lead(store)
    writes = Writes(store, term)
    found = await nc.jetstream().stream_info(KV)
    assert found.cluster is not None
    leader = next(server for server in servers.servers if server.name == found.cluster.leader)
    tending = asyncio.create_task(tend(store))
    for number in range(60):
        await writes.send(*(f"k{number}-{place}" for place in range(40)))
        if number == 20:
            leader.kill()
        await asyncio.sleep(0.01)
    await writes.settled(60)
    tending.cancel()
    leader.start()
    assert len(writes.outcomes) == 2400
    assert all(isinstance(outcome, int) for outcome in writes.outcomes.values())
    await writes.check()
    # Nothing was stored a second time: each revision but the leader's is a write's.
    info = await nc.jetstream().stream_info(KV)
    assert info.state.last_seq == 2401


async def tend(store: Store) -> None:
    """As the service does it."""
    while True:
        with contextlib.suppress(Exception):
            await asyncio.sleep(await store.maintain())


async def test_a_full_bucket_is_led_from(nc: Client) -> None:
    """With three copies it takes no write any more, not even one in place of another, and still deletes refusals."""
    js = nc.jetstream()
    await js.delete_stream(KV)
    await ensure_layout(js, max_bytes_scale=0.01)
    term = await lead(await opened(nc))
    size, number = 50_000, 0
    while size:
        try:
            await js.publish(f"$KV.{subjects.PLANNER_BUCKET}.answer.{number}", b"x" * size)
            number += 1
        except APIError:
            size //= 2
    store = await opened(nc)
    with pytest.raises(WriteFailed):
        await store.put(HEARTBEAT, b"1", term)
    assert not store.has_room
    term = await lead(store, term)
    await store.put(HEARTBEAT, b"1", term)
    await store.measure()
    assert store.has_room
