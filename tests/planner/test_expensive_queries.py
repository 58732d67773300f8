"""Expensive queries are answered in forked copies: no renewal waits for them, and no client takes all turns."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.broker.waiting import query_costs
from corral.planner.broker.waiting.fork_pool import ForkLimits, ForkPool, QueryFailed, QueueFull
from corral.schemas import codec
from nats.aio.client import Client as Nats
from support.planner_rig import FakeHosts, ask, running, until_ready

WHAT_IF = {"request": {"owner": "viewer", "gpus": 4}, "with_more": [{"model": "NVIDIA H100", "devices": 8_000}]}


def once_there(path: Path, answer: bytes) -> Callable[[], bytes]:
    """Work that ends when a file is there."""

    def work() -> bytes:
        while not path.exists():
            time.sleep(0.005)
        return answer

    return work


async def test_a_copy_answers_from_the_state_of_its_moment_and_changes_nothing() -> None:
    pool, state = ForkPool(), {"known": b"before"}

    def work() -> bytes:
        seen, state["known"] = state["known"], b"changed in the copy"
        return seen

    assert await pool.run("ann", work) == b"before"
    assert state == {"known": b"before"}
    state["known"] = b"after"
    assert await pool.run("ann", work) == b"after"
    large = bytes(3 * 2**20)
    assert await pool.run("ann", lambda: large) == large
    assert pool.outcomes == {"answered": 3}


async def test_a_copy_closes_what_is_open_and_not_all_that_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the limit may be a thousand million, which a loop over all numbers takes minutes for."""

    def all_numbers(*_: int) -> None:
        time.sleep(60)

    monkeypatch.setattr(os, "closerange", all_numbers)
    opened = os.open(os.devnull, os.O_RDONLY)
    try:
        pool = ForkPool(ForkLimits(seconds=30))
        left = await pool.run("ann", lambda: " ".join(os.listdir("/proc/self/fd")).encode())
    finally:
        os.close(opened)
    # Its pipe, and the folder that is read.
    assert len([number for number in map(int, left.split()) if number > 2]) == 2


async def test_no_asker_takes_the_turns_of_others(tmp_path: Path) -> None:
    pool = ForkPool(ForkLimits(running=2, waiting_of_one=3, waiting=5))
    go = tmp_path / "go"
    greedy = [asyncio.create_task(pool.run("greedy", once_there(go, b"late"))) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await pool.run("greedy", bytes)
    # Whoever comes later has the other place at once, again and again.
    for name in ("ann", "bob", "ann"):
        assert await pool.run(name, lambda: b"soon") == b"soon"
    assert not any(task.done() for task in greedy)
    # Many askers that take all of the line keep out those who are in it already, and no newcomer.
    crowd = [asyncio.create_task(pool.run(f"c{number}", once_there(go, b"late"))) for number in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await pool.run("c3", bytes)
    newcomer = asyncio.create_task(pool.run("dan", lambda: b"too"))
    go.touch()
    assert await asyncio.gather(*greedy, *crowd, newcomer) == [b"late"] * 8 + [b"too"]
    assert (pool.running, pool.waiting) == (0, 0)


async def test_a_question_without_end_is_given_up(tmp_path: Path) -> None:
    """Too long, too much memory, an end by a signal: each is told, and no process is left."""
    pool = ForkPool(ForkLimits(seconds=0.2, memory_bytes=64 * 2**20))
    pids = tmp_path / "pids"

    def noted(work: Callable[[], bytes]) -> Callable[[], bytes]:
        def noting() -> bytes:
            with pids.open("a") as file:
                file.write(f"{os.getpid()}\n")
            return work()

        return noting

    with pytest.raises(QueryFailed, match="took longer than"):
        await pool.run("ann", noted(once_there(tmp_path / "never", b"")))
    patient = ForkPool(ForkLimits(memory_bytes=64 * 2**20))
    with pytest.raises(QueryFailed, match="memory"):
        await patient.run("ann", noted(lambda: bytes(2**30)))
    with pytest.raises(QueryFailed, match="ended"):
        await patient.run("ann", noted(lambda: str(os.kill(os.getpid(), 9)).encode()))
    with pytest.raises(QueryFailed, match="ZeroDivisionError"):
        await patient.run("ann", noted(lambda: bytes(1 // 0)))
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert await patient.run("ann", lambda: b"well") == b"well"


async def test_renewals_and_grants_pass_dear_questions(server: EmbeddedServer, nc: Nats) -> None:
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        lease = (await ask(nc, "request", {"owner": "ann", "gpus": 1}))["lease"]
        viewers = [
            asyncio.create_task(ask(nc, f"explain.{name}", WHAT_IF, timeout=60))
            for name in ["greedy"] * 16 + ["modest"]
        ]
        for _ in range(4):
            assert (await ask(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]}))["state"] == "active"
            other = (await ask(nc, "request", {"owner": "bob", "gpus": 1}))["lease"]
            assert (await ask(nc, "release", {"owner": "bob", "lease_id": other["lease_id"]}))["state"] == "released"
        early = [task.result() for task in viewers if task.done()]
        assert early
        assert {(answer["type"], answer.get("code")) for answer in early} == {("error", "too_many_requests")}
        # The modest one has its turn while the greedy one waits, and the answer is the planner's own.
        answer = await viewers[-1]
        assert answer["granted"]
        assert len(answer["verdicts"]) == 1000
        assert not all(task.done() for task in viewers)
        for task in viewers:
            task.cancel()
        await hosts.stop()


@pytest.mark.parametrize("cheap_seconds", [0.0, 10.0])
async def test_answers_beside_the_loop_are_those_of_the_loop(
    server: EmbeddedServer, nc: Nats, monkeypatch: pytest.MonkeyPatch, cheap_seconds: float
) -> None:
    monkeypatch.setattr(query_costs, "CHEAP_SECONDS", cheap_seconds)
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        lease = (await ask(nc, "request", {"owner": "ann", "gpus": 3}))["lease"]
        assert (await ask(nc, "fleet"))["leased_devices"] == 3
        listed = (await ask(nc, "devices", {"hosts": ["node0"]}))["devices"]
        assert [device["leases"] for device in listed].count([lease["lease_id"]]) in (3, 0)
        assert [found["lease_id"] for found in (await ask(nc, "leases"))["leases"]] == [lease["lease_id"]]
        assert (await ask(nc, "queue"))["entries"] == []
        told = await ask(nc, "explain", {"request": {"owner": "bob", "gpus": 4}})
        assert (told["granted"], len(told["grants"])) == (True, 4)
        refused = await ask(nc, "explain", {"request": {"owner": "bob", "gpus": 4, "policy": "none-such"}})
        assert (refused["code"], refused["field"]) == ("invalid", "$.policy")
        await hosts.stop()


def much_work(count: int, method: str = "balanced") -> dict[str, Any]:
    items = [{"id": f"item-{number:05d}", "cost": 1 + number * 7919 % 997} for number in range(count)]
    return {"owner": "ann", "gpus": 4, "request_id": "much", "distribution": {"items": items, "method": method}}


def items_of(lease: dict[str, Any]) -> list[str]:
    return sorted(item for grant in lease["grants"] for item in grant["items"])


async def test_much_work_is_read_and_distributed_beside_the_loop(server: EmbeddedServer, nc: Nats) -> None:
    """Its answer is the one that it would have had in the loop, in either format, and under its id again."""
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        held = (await ask(nc, "request", {"owner": "bob", "gpus": 1}))["lease"]
        body = much_work(9000)
        ids = [item["id"] for item in body["distribution"]["items"]]
        asked = asyncio.create_task(ask(nc, "request.ann", body, timeout=60))
        for _ in range(4):
            assert (await ask(nc, "renew", {"owner": "bob", "lease_id": held["lease_id"]}))["state"] == "active"
        assert not asked.done()
        lease = (await asked)["lease"]
        assert items_of(lease) == ids
        assert lease["distribution"]["method"] == "balanced"
        assert lease["unassigned"] == []
        assert (await ask(nc, "request", body, timeout=60))["lease"] == lease
        other = await ask(nc, "request", {**body, "gpus": 3}, timeout=60)
        assert (other["code"], other["field"]) == ("conflict", "$.request_id")
        renewal = {"owner": "ann", "lease_id": lease["lease_id"]}
        assert items_of(await ask(nc, "renew", renewal)) == ids
        packed = await nc.request(
            "corral.v1.plan.release",
            msgspec.msgpack.encode(renewal),
            timeout=20,
            headers={"Content-Type": codec.MSGPACK},
        )
        assert items_of(msgspec.msgpack.decode(packed.data)) == ids
        # What is wrong with it is told as ever.
        twice = much_work(3000)
        twice["distribution"]["items"][7]["id"] = "item-00000"
        told = await ask(nc, "request", {**twice, "request_id": "twice"}, timeout=60)
        assert (told["code"], told["field"]) == ("invalid", "$.distribution.items")
        told = await ask(nc, "request.eve", {**body, "request_id": "eve"}, timeout=60)
        assert (told["code"], told["field"]) == ("refused", "$.owner")
        told = await ask(nc, "renew.bob", {"lease_id": held["lease_id"], "noise": "x" * 100_000})
        assert told["code"] == "too_large"
        # A count is little to read, and much to distribute; one that no answer holds is refused at once.
        count = {"owner": "ann", "gpus": 4, "distribution": {"items": 50_000}}
        lease = (await ask(nc, "request", count, timeout=60))["lease"]
        assert sorted(item for grant in lease["grants"] for item in grant["items"]) == list(range(50_000))
        assert (await ask(nc, "request", {**count, "distribution": {"items": 400_000}}))["code"] == "too_large"
        await hosts.stop()


async def test_devices_are_kept_while_work_is_distributed_and_freed_where_that_fails(
    server: EmbeddedServer, nc: Nats
) -> None:
    async with running(server.url, query_limits=ForkLimits(seconds=0.001)):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        given_up = await ask(nc, "request", {"owner": "ann", "gpus": 4, "distribution": {"items": 100_000}}, timeout=60)
        assert given_up["code"] == "too_large"
        assert (await ask(nc, "request", {"owner": "ann", "gpus": 4}))["type"] == "assignment"
        assert (await ask(nc, "request", {"owner": "ann", "gpus": 4}))["type"] == "assignment"
        await hosts.stop()
