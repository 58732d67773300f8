"""`corral doctor` on services that a fleet may do without, and what Prometheus is told of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from unittest import mock

from corral.bus.credentials import Identity
from corral.cli.local.server import EmbeddedServer
from corral.cli.operate.doctor_services import login
from corral.client import Client
from corral.exporter import pipeline
from corral.notifier import service
from nats.aio.client import Client as NatsClient
from support.local_cluster import invoke
from support.notifier_rig import Place, ended, publish, running, until


async def doctor(url: str) -> dict[str, dict[str, str]]:
    done = await asyncio.to_thread(invoke, "doctor", "--json", url=url)
    return {one["what"]: one for one in json.loads(done.stdout)["findings"]}


async def test_it_says_what_the_notifier_can_not_do(server: EmbeddedServer, nc: NatsClient, tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write('hook = "json://127.0.0.1:9/hook"', '[[rule]]\nname = "all"\non = ["ended"]\nto = ["hook"]\n')
    assert (await doctor(server.url))["notifier"]["level"] == "ok"  # none is needed
    with mock.patch.object(service, "FAILING_SECONDS", 0.0):
        async with running(server.url, place.files) as notifier:
            await publish(nc, ended("l-1"))
            await until(lambda: any("hook" in reason for reason in notifier._judge().reasons))
            found = (await doctor(server.url))["notifier"]
            answers = await pipeline.ask(Client(nc))
    assert (found["level"], "nothing could be sent to hook" in found["detail"]) == ("problem", True)
    assert "9/hook" not in str(found)
    values = {(m.name, m.labels.get("target")): m.value for each in answers.services for m in each.measures}
    assert values["active", None] == 1
    assert ("failing_seconds", "hook") in values


async def test_it_says_that_nobody_can_log_in() -> None:
    assert await login(Identity()) is None
    found = await login(Identity(login="http://127.0.0.1:9", expires="2030-01-01T00:00:00+00:00"))
    assert found is not None
    assert (found.level, "until 2030-01-01 00:00 UTC" in found.detail) == ("note", True)
