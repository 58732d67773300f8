"""Users of the history are known across accounts: one takes neither all slots nor the whole queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.bus.access.roles import Role
from corral.client import client
from corral.client.query import collect
from corral.processors.query.service import Limits, QueryService
from corral.processors.storage import hardening
from corral.schemas import subjects
from corral.schemas.query import QueryRequest
from nats.aio.client import Client
from support.secured_bus import SecuredBus

FOREVER = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[SecuredBus]:
    made = SecuredBus(tmp_path)
    for role, name in ((Role.PROCESSOR, "processor"), (Role.VIEWER, "vera"), (Role.REQUESTER, "alice")):
        made.add(role, name)
    made.server.start()
    yield made
    made.server.kill()


@pytest.fixture
async def service(secured: SecuredBus) -> AsyncIterator[QueryService]:
    nc = await secured.connect("processor")
    connection = duckdb.connect()
    hardening.lock(connection, memory_bytes=256 * 2**20, spill_bytes=2**20)
    service = QueryService(nc, connection.cursor, limits=Limits(slots=3, per_asker=1, waiting=8))
    await service.start()
    yield service
    await service.stop()
    await nc.close()
    connection.close()


async def flood(nc: Client, queries: int) -> list[dict[str, Any]]:
    """Ask for ever, each time for an answer elsewhere; returns what was refused at once."""
    inbox = f"{nc.new_inbox()}.*"
    answers = await nc.subscribe(inbox)
    for number in range(queries):
        body = json.dumps({"sql": FOREVER, "timeout_seconds": 20, "query_id": f"v{number}"}).encode()
        await nc.publish(f"{subjects.QUERY}.vera", body, reply=inbox.replace("*", str(number)))
    await nc.flush()
    refused: list[dict[str, Any]] = []
    while True:
        try:
            refused.append(json.loads((await answers.next_msg(timeout=1)).data))
        except TimeoutError:
            return refused


async def test_one_user_of_another_account_has_one_turn(secured: SecuredBus, service: QueryService) -> None:
    vera, alice = await secured.connect("vera"), await secured.connect("alice")
    try:
        refused = await flood(vera, 12)
        assert service.running == 1
        assert service.waiting == 4
        assert [answer["code"] for answer in refused] == ["busy"] * 7
        result = await collect(alice, QueryRequest(sql="SELECT 42", window=8), margin_seconds=5)
        assert result.scalar() == 42
        await client.Client(vera).cancel("v0")
    finally:
        await vera.close()
        await alice.close()


async def test_nobody_asks_without_or_in_anothers_name(secured: SecuredBus, service: QueryService) -> None:
    refused: list[str] = []
    all_were = asyncio.Event()

    async def see(error: Exception) -> None:
        refused.append(str(error).lower())
        if len(refused) == 2:
            all_were.set()

    alice = await secured.connect("alice", error_cb=see)
    try:
        for subject in (f"{subjects.QUERY}.vera", f"{subjects.PlanSubject.EXPLAIN}.vera"):
            await alice.publish(subject, b'{"sql": "SELECT 1"}', reply=alice.new_inbox())
        async with asyncio.timeout(10):
            await all_were.wait()
        # Without a name nothing is done, and one is told where to ask.
        told = await alice.request(subjects.QUERY, b'{"sql": "SELECT 1"}', timeout=10)
        assert json.loads(told.data)["code"] == "refused"
        assert f"ask on {subjects.QUERY}.<user>" in json.loads(told.data)["message"]
        assert service.running == service.waiting == 0
    finally:
        await alice.close()
