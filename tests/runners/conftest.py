"""A runner as a process, on a real bus, and the planner's side of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, planner_of_runs


@pytest.fixture
def runner(server: EmbeddedServer, tmp_path: Path) -> Iterator[RunnerProcess]:
    process = RunnerProcess(server.url, tmp_path / "state")
    yield process
    process.stop()
    process.end_runs()


@pytest.fixture
async def planner(nc: Client) -> AsyncIterator[PlannerOfRuns]:
    async with planner_of_runs(nc) as made:
        yield made
