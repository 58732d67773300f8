"""What has ended holds no devices again, though a killed server brings replaced values of the bucket back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.leases import ledger, reappeared
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from support.planner_rig import FakeHosts, ask, lease_events, persist, running, until_ready

BUCKET = "KV_corral_planner"
KEYS = "$KV.corral_planner."


async def value(nc: Client, key: str) -> dict[str, Any] | None:
    """Value of a key of the bucket; None if there is none."""
    while True:
        try:
            found = await nc.jetstream().get_last_msg(BUCKET, f"{KEYS}{key}", direct=False)
        except NotFoundError:
            return None
        except Exception:  # the server is starting
            await asyncio.sleep(0.05)
            continue
        return json.loads(found.data or b"null")


async def gone(nc: Client, key: str) -> None:
    """Wait until a key of the bucket has expired."""
    while await value(nc, key) is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def waiting_in(js: JetStreamContext) -> list[str]:
    """Subjects of the waiting requests that the bucket has."""
    return list((await js.stream_info(BUCKET, subjects_filter=f"{KEYS}queue.>")).state.subjects or {})


async def test_a_lease_whose_end_has_expired_is_not_active_again(
    server: EmbeddedServer, nc: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was renewed or not, how ever it ended, and however often the server is killed."""
    for module in (ledger, reappeared):
        monkeypatch.setattr(module, "RETAIN_SECONDS", 1.0)
        monkeypatch.setattr(module, "RETAIN_AT_LEAST_SECONDS", 1.0)
    hosts, js = FakeHosts(nc, hosts=1), nc.jetstream()
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 4)
        asked = [
            {"owner": "ann", "gpus": 1, "ttl_seconds": 3600, "request_id": name}
            for name in ("released", "renewed", "evicted", "stays")
        ]
        ids = {body["request_id"]: (await ask(nc, "request", body))["lease"]["lease_id"] for body in asked}
        for lease_id in (ids["renewed"], ids["renewed"], ids["stays"]):
            assert (await ask(nc, "renew", {"owner": "ann", "lease_id": lease_id}))["state"] == "active"
        for name in ("released", "renewed"):
            assert (await ask(nc, "release", {"owner": "ann", "lease_id": ids[name]}))["state"] == "released"
        await ask(nc, "evict", {"lease_id": ids["evicted"], "reason": "test"})
        ended = [ids[name] for name in ("released", "renewed", "evicted")]
        line = {"owner": "eve", "gpus": 4, "wait_seconds": 3600, "request_id": "line"}
        waiting = asyncio.create_task(ask(nc, "request", line, timeout=30))
        while not await waiting_in(js):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await ask(nc, "withdraw", {"owner": "eve", "request_id": "line"})
        assert (await waiting)["code"] == "withdrawn"
        while await waiting_in(js):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for lease_id in ended:
            await gone(nc, f"lease.{lease_id}")
    for turn in range(2):
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        came_back = [found for lease_id in ended if (found := await value(nc, f"lease.{lease_id}")) is not None]
        assert not await waiting_in(js)  # it was written once, and purged
        assert {found["lease"]["state"] for found in came_back} == {"active"}, "this server does not do it any more"
        async with running(server.url):
            await until_ready(nc, 4)
            listed = (await persist(nc, "leases", {}))["leases"]
            assert [lease["lease_id"] for lease in listed if lease["state"] == "active"] == [ids["stays"]]
            # Its end is durable again, so that earlier planners know of it, too.
            for lease_id in ended:
                await gone(nc, f"lease.{lease_id}")
            more = await ask(
                nc, "request", {"owner": "bob", "gpus": 3, "request_id": f"again{turn}", "ttl_seconds": 3600}
            )
            assert more["type"] == "assignment"
            told = [event["lease"]["lease_id"] for _, event in await lease_events(nc) if event["lease"]["ended_at"]]
            assert sorted(told) == sorted(ended)
            ended.append(more["lease"]["lease_id"])
            await ask(nc, "release", {"owner": "bob", "lease_id": ended[-1]})
            await gone(nc, f"lease.{ended[-1]}")
    await hosts.stop()
