"""Jobs over the bus: a real server and planner, and runners without processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client as Bus
from support.fake_runner import FakeRunner
from support.planner_rig import FakeHosts, ask, running, until_ready


@pytest.fixture
async def hosts(nc: Bus) -> AsyncIterator[FakeHosts]:
    made = FakeHosts(nc, hosts=2, devices=2)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def runners(nc: Bus, hosts: FakeHosts) -> AsyncIterator[list[FakeRunner]]:
    made = [FakeRunner(nc, name) for name in hosts.names]
    for runner in made:
        await runner.start()
    yield made
    for runner in made:
        await runner.stop()


async def submit(nc: Bus, command: str, gpus: int = 1, **fields: Any) -> dict[str, Any]:
    """Submit a job of ann's, and return it."""
    request = {"owner": "ann", "gpus": gpus, **fields.pop("request", {})}
    answer = await ask(nc, "submit", {"request": request, "command": command.split(), **fields})
    assert answer["type"] == "job", answer
    return answer


async def listed(nc: Bus, job_id: str, tasks: bool = True) -> dict[str, Any]:
    """A job with its tasks."""
    return (await ask(nc, "jobs", {"job_ids": [job_id], "tasks": tasks}))["jobs"][0]


async def until_state(nc: Bus, job_id: str, *states: str) -> dict[str, Any]:
    """The job with its tasks, once it is in one of some states."""
    found: dict[str, Any] = {}
    for _ in range(600):
        found = await listed(nc, job_id)
        if found["job"]["state"] in states:
            return found
        await asyncio.sleep(0.02)
    raise TimeoutError(f"job {job_id} was never {states}: {found}")


async def act(nc: Bus, job_id: str, verb: str, **fields: Any) -> dict[str, Any]:
    """A command of ann's about a job."""
    return await ask(nc, "job", {"job_id": job_id, "owner": "ann", "verb": verb, **fields})


async def no_leases(nc: Bus) -> None:
    """Wait until no lease is active."""
    for _ in range(600):
        if not (await ask(nc, "leases", {"states": ["active"]}))["leases"]:
            return
        await asyncio.sleep(0.02)
    raise TimeoutError("leases stay")


async def test_tasks_run_and_end_as_their_processes_do(
    server: EmbeddedServer, nc: Bus, runners: list[FakeRunner]
) -> None:
    async with running(server.url):
        await until_ready(nc, 4)
        done = await submit(nc, "true", array="0-9")
        failed = await submit(nc, "exit 3")
        kept = await submit(nc, "forever", request={"name": "kept"})
        found = await until_state(nc, done["job_id"], "done")
        assert found["job"]["counts"] == {"done": 10}
        assert [task["attempt"] for task in found["tasks"]] == [1] * 10
        task = (await until_state(nc, failed["job_id"], "failed"))["tasks"][0]
        assert (task["exit_code"], task["message"]) == (3, "exit code 3")
        await until_state(nc, kept["job_id"], "running")
        cancelled = await act(nc, kept["job_id"], "cancel", reason="enough")
        assert cancelled["changed"] == 1
        found = await until_state(nc, kept["job_id"], "cancelled")
        assert found["job"]["message"] == "cancelled by ann: enough"
        assert found["tasks"][0]["parts"][0]["signal"] == 15
        await no_leases(nc)
        assert set(sum((runner.starts for runner in runners), start=type(runners[0].starts)()).values()) == {1}
        newest = await ask(nc, "jobs", {"owner": "ann"})
        assert [each["job"]["job_id"] for each in newest["jobs"]] == [
            kept["job_id"],
            failed["job_id"],
            done["job_id"],
        ]
