"""How services begin and end with their server: it dies while they start, or turns them away for good."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corral.bus.connect import URL_VARIABLE, connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer, server_binary
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, persist, until_ready


@pytest.mark.parametrize(
    "pauses", [(0.6,), pytest.param((0.45, 0.8), marks=pytest.mark.long)], ids=["one moment", "other moments"]
)
async def test_a_server_that_dies_while_a_planner_starts_is_waited_for(
    server: EmbeddedServer, tmp_path: Path, pauses: tuple[float, ...]
) -> None:
    """At another moment of its start each time."""
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    try:
        for pause in pauses:
            planner.start()
            await asyncio.sleep(pause)
            server.kill()
            await asyncio.sleep(0.5)
            server.start()
            nc = await connect(server.url, name="test")
            await ensure_layout(nc.jetstream())
            hosts = FakeHosts(nc)
            await hosts.start()
            await until_ready(nc, 1, timeout=30)
            assert planner.process is not None
            assert planner.process.poll() is None
            await hosts.stop()
            await nc.close()
            planner.stop()
    finally:
        planner.kill()


async def test_a_planner_whose_bucket_is_gone_ends_and_one_that_is_started_anew_grants(
    server: EmbeddedServer, nc: Client, tmp_path: Path
) -> None:
    hosts = FakeHosts(nc)
    await hosts.start()
    log = tmp_path / "planner.log"
    planner = PlannerProcess(server.url, log)
    try:
        planner.start()
        await until_ready(nc, 1)
        server.kill()
        shutil.rmtree(server.data / "jetstream")
        server.start()
        assert planner.process is not None
        assert await asyncio.to_thread(planner.process.wait, 20) == 1
        assert "has the bus lost its disk?" in log.read_text()
        planner.start()
        await until_ready(nc, 0, timeout=30)
        # Collectors say again every minute what they have.
        await hosts.stop()
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 1, timeout=30)
        assert (await persist(nc, "request", {"owner": "ann", "gpus": 1}))["type"] == "assignment"
    finally:
        planner.kill()
        await hosts.stop()


@pytest.mark.long
def test_a_service_that_the_server_turns_away_ends(tmp_path: Path) -> None:
    """Its key is gone: it ends with a line that says so, instead of going on deaf."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "server.conf"
    text = f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{tmp_path}/store" }}\n'
    config.write_text(text + 'authorization { user: corral, password: "first" }\n')
    processes: list[subprocess.Popen[bytes]] = []
    try:
        server = subprocess.Popen([server_binary(), "-c", str(config)], stderr=subprocess.DEVNULL)
        processes.append(server)
        environment = {
            **os.environ,
            URL_VARIABLE: f"nats://corral:first@127.0.0.1:{port}",
            "CORRAL_CONFIG": os.devnull,
        }
        log = tmp_path / "services.log"
        services: list[subprocess.Popen[bytes]] = []
        for arguments in (["plan"], ["process", "--db", str(tmp_path / "history.duckdb")]):
            with log.open("ab") as out:
                service = subprocess.Popen(
                    [sys.executable, "-m", "corral.cli.main", *arguments], env=environment, stdout=out, stderr=out
                )
            services.append(service)
        processes += services
        deadline = time.monotonic() + 40
        while not ("is ready after" in log.read_text() and "writes" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        config.write_text(text + 'authorization { user: corral, password: "second" }\n')
        server.send_signal(signal.SIGHUP)
        for service in services:
            assert service.wait(30) not in (0, -9)
        assert log.read_text().count("closed the connection for good") >= 2, log.read_text()[-2000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
