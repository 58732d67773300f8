"""The planner's bucket stays such that leases can be renewed, released and led by: its settings, and the room in it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from corral.bus.connect import BusUnavailable
from corral.bus.layout import bucket_config, ensure_layout, stream_config
from corral.cli.local.server import EmbeddedServer
from corral.client.health import ask_health
from corral.planner.broker.idempotency import CachedRejection, RejectionCache
from corral.planner.broker.stored_rejections import OWNER_PART, StoredRejections
from corral.planner.durable.bucket import BUCKET, FACTS, READ, RECORD_PART, correct_settings
from corral.planner.durable.election import heartbeat
from corral.planner.service import Settings, plan
from corral.schemas import subjects
from corral.schemas.requests import Rejection, RejectionCode
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.js import api
from nats.js.errors import APIError
from support.planner_rig import FakeHosts, ask, running, until_ready

KV = f"KV_{subjects.PLANNER_BUCKET}"
KEYS = f"$KV.{subjects.PLANNER_BUCKET}."


@given(
    st.lists(
        st.tuples(st.integers(0, 400), st.sampled_from("abc"), st.integers(0, 4000), st.sampled_from("aaad")),
        max_size=300,
    )
)
def test_refusals_take_a_bounded_part_and_the_oldest_go_first(steps: list[tuple[int, str, int, str]]) -> None:
    written, there = StoredRejections(400_000), dict[str, tuple[str, int]]()
    for number, owner, size, step in steps:
        key = f"{owner}{number}"
        if step == "d":
            written.drop(key)
            there.pop(key, None)
            continue
        gone = written.add(key, owner, size)
        there.pop(key, None)
        there[key] = (owner, size)
        for old in gone:
            before = list(there)[: list(there).index(old)]
            # Those that are older and stay are of owners within their part, and nobody had to go for all.
            assert all(there[other][0] != there[old][0] for other in before if other not in gone)
            del there[old]
        assert key in there
        sizes = {name: sum(there[k][1] for k in there if there[k][0] == name) for name in "abc"}
        assert sum(sizes.values()) <= written.bytes <= 400_000 / 16
        assert all(sizes[name] <= 400_000 / 16 * OWNER_PART for name in sizes) or len(there) == 1
    for key in list(there):
        written.drop(key)
    assert written.bytes == 0


def test_refusals_of_two_owners_under_one_id_are_both_let_go() -> None:
    store: Any = SimpleNamespace(max_bytes=0)
    refusal = Rejection(code=RejectionCode.NO_CAPACITY, message="")
    known = {
        "x": CachedRejection(digest="1", rejection=refusal, until=10.0, owner="a", request_id="x"),
        "x.0123": CachedRejection(digest="2", rejection=refusal, until=20.0, owner="b", request_id="x"),
    }
    answers = RejectionCache(store, 1, known, lambda: None)
    written = answers._written  # pyright: ignore[reportPrivateUsage]
    assert written.bytes
    answers.evict_expired(15.0)
    answers.evict_expired(25.0)
    assert written.bytes == 0


@pytest.mark.parametrize(
    ("field", "value", "after"),
    [
        ("max_age", 60.0, 0),
        ("discard", api.DiscardPolicy.OLD, api.DiscardPolicy.NEW),
        ("max_msgs", 100, -1),
        ("max_msgs_per_subject", 5, 1),
        ("max_msgs_per_subject", -1, 1),
        ("max_msg_size", 1024, -1),
        ("retention", api.RetentionPolicy.INTEREST, None),
        ("mirror", api.StreamSource(name="x"), None),
        ("max_bytes", 2**20, None),
    ],
)
def test_a_setting_by_which_leases_are_forgotten_is_mended_or_refused(field: str, value: Any, after: Any) -> None:
    config = bucket_config(subjects.BUCKETS[0])
    assert correct_settings(config, BUCKET) == []
    setattr(config, field, value)
    if after is None:
        with pytest.raises(BusUnavailable, match=f"{KV} was made with {field}="):
            correct_settings(config, BUCKET)
    else:
        assert [field in sentence for sentence in correct_settings(config, BUCKET)] == [True]
        assert getattr(config, field) == after
        assert correct_settings(config, BUCKET) == []


def test_streams_as_corral_makes_them_need_no_mending() -> None:
    for stream in subjects.STREAMS:
        assert correct_settings(stream_config(stream), FACTS if stream.name == subjects.FACTS_STREAM else READ) == []


async def test_a_bucket_that_was_made_with_an_age_forgets_no_lease(server: EmbeddedServer, nc: Client) -> None:
    js = nc.jetstream()
    await js.delete_stream(KV)
    config = bucket_config(subjects.BUCKETS[0])
    config.duplicate_window = 2.0
    config.max_age, config.discard, config.max_msgs_per_subject = 2.0, api.DiscardPolicy.OLD, 3
    await js.add_stream(config)
    async with running(server.url):
        await until_ready(nc)
        now = (await js.stream_info(KV)).config
        assert (now.max_age or 0, now.discard, now.max_msgs_per_subject) == (0, api.DiscardPolicy.NEW, 1)
    await js.delete_stream(KV)
    config.max_age, config.retention = None, api.RetentionPolicy.WORK_QUEUE
    await js.add_stream(config)
    with pytest.raises(BusUnavailable, match="retention=workqueue"):
        await plan(server.url, Settings(), stop=asyncio.Event())


async def small(nc: Client) -> int:
    """The bucket as CORRAL_STREAMS_SCALE=0.01 makes it; returns its bytes."""
    js = nc.jetstream()
    await js.delete_stream(KV)
    await ensure_layout(js, max_bytes_scale=0.01)
    return (await js.stream_info(KV)).config.max_bytes or 0


async def test_a_flood_of_refusals_takes_no_room_from_leases(server: EmbeddedServer, nc: Client) -> None:
    most = await small(nc)
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        lease = (await ask(nc, "request", {"owner": "ann", "gpus": 1}))["lease"]

        async def refused(number: int) -> dict[str, Any]:
            body = {"owner": f"o{number % 9}", "gpus": 4000, "request_id": f"r{number}", "labels": {"k": "v" * 200}}
            return await ask(nc, "request", body, timeout=30)

        for turn in range(4):
            answers = await asyncio.gather(*(refused(turn * 300 + number) for number in range(300)))
            assert {answer["type"] for answer in answers} == {"rejection"}
        # The youngest are in the bucket, the oldest in memory alone: both are answered alike.
        state = (await nc.jetstream().stream_info(KV, subjects_filter=f"{KEYS}answer.>")).state
        assert state.bytes < most * RECORD_PART * 1.6
        assert f"{KEYS}answer.r1199" in (state.subjects or {})
        assert (await refused(0))["type"] == "rejection"
        mine = {"owner": "ann", "lease_id": lease["lease_id"]}
        assert (await ask(nc, "renew", mine))["state"] == "active"
        assert (await ask(nc, "release", mine))["state"] == "released"
        fat = await ask(nc, "request", {"owner": "ann", "gpus": 1, "distribution": {"items": 100_000}}, timeout=30)
        assert (fat["code"], fat["field"]) == ("too_large", "$.distribution")
        await hosts.stop()


async def fill(nc: Client, key: str = "answer.old") -> None:
    """As an earlier version may have left it: not one byte is left."""
    size, number = 50_000, 0
    while size:
        try:
            await nc.jetstream().publish(f"{KEYS}{key}{number}", b"x" * size)
            number += 1
        except APIError:
            size //= 2


async def test_a_bucket_full_of_refusals_is_led_from_all_the_same(server: EmbeddedServer, nc: Client) -> None:
    await small(nc)
    await fill(nc)
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        lease = (await ask(nc, "request", {"owner": "ann", "gpus": 1}))["lease"]
        await fill(nc)
        # It makes room by itself, before anybody's time is over.
        while (await ask(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]}))["type"] != "lease":  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await hosts.stop()


async def test_a_bucket_that_is_full_of_what_must_stay_grants_nothing_and_ends_nothing(
    server: EmbeddedServer, nc: Client
) -> None:
    most = await small(nc)
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        lease = (await ask(nc, "request", {"owner": "ann", "gpus": 1}))["lease"]
        for number in range(int(most * 0.9) // 100_000):
            await nc.jetstream().publish(f"{KEYS}lease.of-others-{number}", b"x" * 100_000)
        async with asyncio.timeout(60):  # it measures the bucket every second
            while not any("nearly full" in reason for one in await ask_health(nc, "planner") for reason in one.reasons):
                pass
        refused = await ask(nc, "request", {"owner": "bob", "gpus": 1})
        assert (refused["code"], "nearly full" in refused["message"]) == ("unavailable", True)
        mine = {"owner": "ann", "lease_id": lease["lease_id"]}
        assert (await ask(nc, "renew", mine))["state"] == "active"
        assert (await ask(nc, "release", mine))["state"] == "released"
        await hosts.stop()


def test_heartbeats_are_of_one_width() -> None:
    times = (1.6e9, 1_700_000_000.25, 1_764_429_412.123456, 9_999_999_999.999_999)
    assert len({len(heartbeat(now)) for now in times[:3]}) == 1
