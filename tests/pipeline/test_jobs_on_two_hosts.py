"""Tasks on two hosts, with a real planner, real runners and real processes: all start or none, whatever is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client as Bus
from support.planner_of_runs import RunnerProcess
from support.planner_rig import FakeHosts, PlannerProcess, ask, until_ready

pytestmark = pytest.mark.long

# Notes each of its executions on each host, and ends with 0 once there is a file `go`.
COUNTED = 'echo "$CORRAL_ATTEMPT $NODE_RANK" >> "$0/started"; until [ -e "$0/go" ]; do sleep 0.02; done'


async def answered(nc: Bus, verb: str, body: Any, met: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The planner's answer, once it meets a condition."""
    found: dict[str, Any] = {}
    try:
        async with asyncio.timeout(60):
            while True:
                found = await ask(nc, verb, body)
                if met(found):
                    return found
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TimeoutError(f"{verb} never was as expected: {found}") from None


class World:
    """Two hosts with their runners, and a planner.

    Attributes:
        runners: by host.
        planner: can be killed.
        folder: where commands note their executions.
    """

    def __init__(self, nc: Bus, runners: dict[str, RunnerProcess], planner: PlannerProcess, folder: Path) -> None:
        self.nc = nc
        self.runners = runners
        self.planner = planner
        self.folder = folder

    def halt(self, host: str) -> None:
        """Have a runner do nothing more, as one that hangs: its host can't be prepared."""
        os.kill(self.runners[host].process.pid, signal.SIGSTOP)

    def go_on(self, host: str) -> None:
        os.kill(self.runners[host].process.pid, signal.SIGCONT)

    def go(self) -> None:
        """Have the commands end."""
        (self.folder / "go").touch()

    @property
    def started(self) -> Counter[str]:
        """How often each attempt was started on each host, as `attempt rank`."""
        file = self.folder / "started"
        return Counter(file.read_text().splitlines()) if file.exists() else Counter()

    async def submit(self, **fields: Any) -> str:
        """Submit a job of two hosts."""
        request = {"owner": "ann", "gpus": 2, **fields.pop("request", {})}
        command = ["sh", "-c", COUNTED, str(self.folder)]
        answer = await ask(
            self.nc,
            "submit",
            {"request": request, "command": command, "hosts": 2, "grace_seconds": 1, "directory": "/", **fields},
        )
        assert answer["type"] == "job", answer
        return answer["job_id"]

    async def until(self, job_id: str, met: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The task, once it meets a condition."""
        wanted = {"job_ids": [job_id], "tasks": True}
        answer = await answered(self.nc, "jobs", wanted, lambda found: met(found["jobs"][0]["tasks"][0]))
        return answer["jobs"][0]["tasks"][0]

    async def until_state(self, job_id: str, state: str, attempt: int = 1) -> dict[str, Any]:
        return await self.until(
            job_id, lambda task: (task.get("state", "pending"), task.get("attempt", 0)) == (state, attempt)
        )

    async def until_prepared(self, job_id: str, host: str) -> dict[str, Any]:
        """Wait until a host has said that it could start its part."""

        def prepared(task: dict[str, Any]) -> bool:
            return any(part["host"] == host and part.get("executor") for part in task.get("parts", []))

        return await self.until(job_id, prepared)

    async def no_leases(self) -> None:
        await answered(self.nc, "leases", {"states": ["active"]}, lambda found: not found["leases"])


@pytest.fixture
def runners(server: EmbeddedServer, tmp_path: Path) -> Iterator[dict[str, RunnerProcess]]:
    made = {name: RunnerProcess(server.url, tmp_path / name, host=name) for name in ("node0", "node1")}
    yield made
    for runner in made.values():
        if runner.process.poll() is None:
            os.kill(runner.process.pid, signal.SIGCONT)
        runner.stop()
        runner.end_runs()


@pytest.fixture
async def world(
    server: EmbeddedServer, nc: Bus, runners: dict[str, RunnerProcess], tmp_path: Path
) -> AsyncIterator[World]:
    hosts = FakeHosts(nc, hosts=2, devices=1)
    await hosts.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 2)
    await answered(nc, "fleet", {}, lambda found: found["runner_hosts"] == 2)
    folder = tmp_path / "work"
    folder.mkdir()
    yield World(nc, runners, planner, folder)
    planner.stop()
    await hosts.stop()


async def test_a_task_that_is_cancelled_or_preempted_while_it_is_prepared_starts_nowhere(world: World) -> None:
    world.halt("node1")
    cancelled = await world.submit()
    await world.until_prepared(cancelled, "node0")
    assert (await ask(world.nc, "job", {"job_id": cancelled, "owner": "ann", "verb": "cancel"}))["changed"] == 1
    task = await world.until_state(cancelled, "cancelled")
    assert {part["state"] for part in task["parts"]} == {"cancelled"}
    await world.no_leases()
    # The next one waits for the same hosts; its notice comes while one is not prepared, and the other is killed.
    request = {"preemptible": True, "grace_seconds": 0.5}
    preempted = await world.submit(request=request, requeue=True)
    lease = (await world.until_prepared(preempted, "node0"))["lease_id"]
    world.runners["node0"].kill()
    await ask(world.nc, "preempt", {"lease_id": lease, "reason": "for a test"})
    task = await world.until(preempted, lambda task: task.get("lease_id") not in ("", None, lease))
    assert task["attempt"] == 2
    assert not world.started
    world.runners["node0"].start()
    world.go_on("node1")
    await world.until_state(preempted, "running", attempt=2)
    world.go()
    await world.until_state(preempted, "done", attempt=2)
    await world.no_leases()
    assert world.started == {"2 0": 1, "2 1": 1}


@pytest.mark.parametrize("killed", ["planner", "prepared", "unprepared"])
async def test_all_hosts_start_once_whatever_is_killed_while_one_is_prepared(world: World, killed: str) -> None:
    world.halt("node1")
    job_id = await world.submit()
    await world.until_prepared(job_id, "node0")
    if killed == "planner":
        world.planner.kill()
        world.planner.start()
        world.go_on("node1")
        await until_ready(world.nc, 2)
    else:
        runner = world.runners["node0" if killed == "prepared" else "node1"]
        runner.kill()
        world.go_on("node1") if killed == "prepared" else None
        runner.start()
    await world.until_state(job_id, "running")
    for name in world.runners:
        world.runners[name].kill()
        world.runners[name].start()
    world.go()
    await world.until_state(job_id, "done")
    await world.no_leases()
    assert world.started == {"1 0": 1, "1 1": 1}
