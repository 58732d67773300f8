"""One door for several: no asker fills the line or the slots, and who reads slowly holds no turn."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from corral.client import client as aio
from corral.processors.query.execution import SET_BACK, Execution
from corral.processors.query.fairqueue import FairQueue
from corral.processors.query.guard.errors import QueryError
from corral.processors.query.service import Limits, QueryService, asker_of
from corral.processors.query.spool import Room, Spool, SpoolRoom
from corral.processors.storage import hardening
from corral.schemas import subjects
from corral.schemas.query import END_HEADER
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.subscription import Subscription

FOREVER = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"
BILLION = "SELECT a.range * b.range AS n FROM range(100000) a, range(10000) b"


@given(st.lists(st.sampled_from("abcdefgh"), max_size=200))
def test_a_newcomer_is_let_in_and_runs_whoever_came_before(askers: list[str]) -> None:
    queue: FairQueue[int] = FairQueue(slots=4, per_asker=2, waiting=16, express=1)
    waiting: Counter[str] = Counter()
    owner: dict[int, str] = {}
    running: Counter[str] = Counter()
    for number, asker in enumerate(askers):
        left = queue.put(asker, number)
        owner[number] = asker
        if left is not None:
            waiting[asker] += 1
            for one in left:
                waiting[owner[one]] -= 1
        # Whoever is refused has no less in line than anybody who is not.
        else:
            assert waiting[asker] >= 8 or waiting[asker] + 1 >= max(waiting.values())
        while (turn := queue.take()) is not None:
            waiting[turn.asker] -= 1
            running[turn.asker] += 1
        assert len(queue) == waiting.total() <= 16
        assert queue.running == running.total() <= 5
        assert all(count <= 2 for count in running.values())
    # Two askers never hold all of it.
    held = sorted(running.values(), reverse=True)
    assert sum(held[:2]) < 5
    if sum(held[:2]) == running.total():
        assert queue.put("newcomer", -1) is not None
        turn = queue.take()
        assert turn is not None
        assert turn.asker == "newcomer"


def test_what_is_long_is_set_back_and_runs_before_its_asker_s_others() -> None:
    queue: FairQueue[str] = FairQueue(slots=1, per_asker=1, waiting=8, express=1)
    for asker, entry in (("a", "a1"), ("b", "b1"), ("b", "b2"), ("c", "c1")):
        queue.put(asker, entry)
    taken = [queue.take(), queue.take(), queue.take()]
    assert [turn and (turn.entry, turn.express) for turn in taken] == [("a1", False), ("b1", True), None]
    assert queue.newcomers
    queue.done("b", express=True)
    queue.set_back("b", "b1")
    turn = queue.take()
    assert turn is not None
    assert (turn.entry, turn.express) == ("c1", True)
    assert not queue.newcomers
    queue.done("a")
    turn = queue.take()
    assert turn is not None
    assert (turn.entry, turn.express) == ("b1", False)
    assert queue.remove("b2")
    assert not queue.remove("b2")
    assert len(queue) == 0


@given(st.lists(st.one_of(st.integers(1, 40), st.none()), max_size=60))
def test_a_spool_gives_back_what_it_was_given_in_bounded_memory(steps: list[int | None]) -> None:
    room = SpoolRoom(Room(bytes=200, asker_bytes=120, memory_bytes=50))
    spool, other = Spool(room, "a"), Spool(room, "b")
    assert other.put(b"x" * 90)
    kept: list[bytes] = []
    for number, step in enumerate(steps):
        if step is None:
            if kept:
                assert spool.take() == kept.pop(0)
            continue
        part = bytes([number]) * step
        held = sum(map(len, kept))
        if spool.put(part):
            kept.append(part)
        else:
            assert held + step > 110, "there was room"
        assert room.held_bytes == 90 + sum(map(len, kept))
    assert len(spool) == len(kept)
    spool.close()
    other.close()
    assert room.held_bytes == 0
    assert spool.put(b"late")
    assert room.held_bytes == 0


@pytest.fixture
async def database() -> AsyncIterator[duckdb.DuckDBPyConnection]:
    connection = duckdb.connect()
    hardening.lock(connection, memory_bytes=512 * 2**20, spill_bytes=64 * 2**20)
    yield connection
    connection.close()


async def ask(nc: Client, user: str, sql: str, **fields: object) -> Subscription:
    inbox = nc.new_inbox()
    answers = await nc.subscribe(inbox, pending_bytes_limit=0)
    await nc.publish(
        f"{subjects.QUERY}.{user}", json.dumps({"sql": sql, "timeout_seconds": 300, **fields}).encode(), reply=inbox
    )
    return answers


async def end_of(nc: Client, answers: Subscription) -> tuple[bytes, dict[str, object]]:
    """Take all parts."""
    body = b""
    while True:
        message = await answers.next_msg(timeout=300)
        assert message.headers is not None
        body += message.data
        if message.reply:
            await nc.publish(message.reply, b"")
        if END_HEADER in message.headers:
            return body, json.loads(message.headers[END_HEADER])


async def test_who_takes_no_part_holds_no_turn_and_loses_nothing(
    nc: Client, database: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    room = Room(bytes=2**24, asker_bytes=2**23, memory_bytes=2**21)
    limits = Limits(slots=1, per_asker=1, express=0, blocked_seconds=0.2, room=room)
    service = QueryService(nc, database.cursor, limits=limits, spool=spool)
    await service.start()
    try:
        large = {"format": "arrow", "limit": 100_000_000, "window": 1}
        slow = await ask(nc, "slow", "FROM range(600000)", **large)
        async with asyncio.timeout(300):
            # Its answer is computed, and waits without a turn: the one slot is free.
            _, end = await end_of(nc, await ask(nc, "other", "SELECT 42 AS n", window=1))
            assert end["rows"] == 1
            # More than there is room for holds the slot for no longer than it may.
            stuck = await ask(nc, "stuck", BILLION, **large)
            _, end = await end_of(nc, await ask(nc, "other", "SELECT 42 AS n", window=1))
            assert end["rows"] == 1
            body, end = await end_of(nc, slow)
            assert pa.ipc.open_stream(body).read_all().column(0).to_pylist() == list(range(600_000))
            _, end = await end_of(nc, stuck)
            assert (end["code"], "read more slowly" in str(end["error"])) == ("cancelled", True)
        assert os.listdir(spool) == [], "files have no name"
    finally:
        await service.stop()


async def test_a_short_question_is_tried_while_long_ones_run_and_a_long_one_ends_all_the_same(
    nc: Client, database: duckdb.DuckDBPyConnection
) -> None:
    limits = Limits(slots=2, per_asker=1, express=1, express_seconds=0.1)
    service = QueryService(nc, database.cursor, limits=limits)
    await service.start()
    try:
        heavy = [await ask(nc, name, FOREVER, query_id=name) for name in ("ann", "bob", "carl")]
        async with asyncio.timeout(300):
            for name in ("dora", "emil"):
                _, end = await end_of(nc, await ask(nc, name, "SELECT 42"))
                assert end["rows"] == 1
            for name in ("ann", "bob", "carl"):
                await nc.request(subjects.QUERY_CANCEL, json.dumps({"query_id": name}).encode(), timeout=20)
            assert [(await end_of(nc, answers))[1]["code"] for answers in heavy] == ["cancelled"] * 3
    finally:
        await service.stop()


async def test_what_is_cancelled_while_it_is_set_back_does_not_run_again(
    nc: Client, database: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, go_on = threading.Event(), threading.Event()

    def run(execution: Execution, *_: object) -> None:
        if execution.express:
            execution.stop(SET_BACK, "it is long")
            tried.set()
        assert go_on.wait(60)
        execution.check_stopped()
        raise QueryError("internal", "it has run")

    monkeypatch.setattr(Execution, "run", run)
    service = QueryService(nc, database.cursor, limits=Limits(slots=1, per_asker=1, express=1))
    await service.start()
    try:
        for name in ("ann", "bob"):
            answers = await ask(nc, name, "SELECT 42", query_id=name)
        assert await asyncio.to_thread(tried.wait, 60)
        await nc.request(subjects.QUERY_CANCEL, json.dumps({"query_id": "bob"}).encode(), timeout=20)
        go_on.set()
        async with asyncio.timeout(60):
            assert (await end_of(nc, answers))[1]["code"] == "cancelled"
    finally:
        go_on.set()
        await service.stop()


async def test_people_behind_a_service_are_askers_of_their_own(nc: Client, database: duckdb.DuckDBPyConnection) -> None:
    service = QueryService(nc, database.cursor, limits=Limits(slots=2, per_asker=1, express=0, waiting=4))
    await service.start()
    try:
        client = aio.Client(nc)
        vera = [
            asyncio.create_task(client.speaking_for("vera@lab").query(FOREVER, query_id=f"v{number}", timeout=300))
            for number in range(2)
        ]
        # Both have come before what is asked next over the same connection.
        assert (await client.speaking_for("rita").query("SELECT 42", timeout=300)).scalar() == 42
        assert (service.running, service.waiting) == (1, 1)
        for number, task in enumerate(vera):
            await client.cancel(f"v{number}")
            with pytest.raises(Exception, match="cancelled"):
                await task
    finally:
        await service.stop()


def test_each_person_is_another_asker() -> None:
    names = ("vera", "vera.b", "vera b", "vera*", "vera>", "véra", "")
    named = {f"{subjects.QUERY}.dashboard.{subjects.person_token(name)}" for name in names}
    assert len(named) == len(names)
    assert all(len(subject.split(".")) == 5 and not set(subject) & set(" *>") for subject in named)
    assert len({asker_of(subject, "_R_.x") for subject in named}) == len(names)
