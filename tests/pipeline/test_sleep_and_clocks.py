"""A machine that sleeps and wakes, and a host whose clock jumps: one gap or none in the history, and no storm after.

All processes of a cluster are stopped together (SIGSTOP) and go on together, as after a laptop's sleep; unlike there,
the clock of elapsed time goes on meanwhile. A subscriber of everything on the bus, which never sleeps, counts messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from corral.client.health import ask_health
from corral.schemas import codec, subjects
from corral.schemas.telemetry import SampleBatch
from nats.aio.client import Client
from nats.aio.msg import Msg
from support.history import Asking
from support.local_cluster import CORRAL, LocalCluster, environment, wait_for

SLEEP_SECONDS = 25.0
"""Longer than a lease of the test lives, than the bus may stay silent, and than a planner's term lasts unrenewed."""
TICKS = 20
HOUR_SECONDS = 3600
FLEET = ("--source", "simulated", "--hosts", "2", "--devices", "2", "--interval", "200ms")

MOVED_CLOCK = """
import sys, time
real_ns, path = time.time_ns, sys.argv.pop(1)
def moved_ns():
    with open(path) as file:
        return real_ns() + int(file.read()) * 10**9
time.time_ns, time.time = moved_ns, lambda: moved_ns() * 1e-9
from corral.cli.main import main
main()
"""
"""A command of Corral whose clock is ahead by the seconds that a file names."""


NOT_ROLLED_UP = """
WITH raw AS (
    SELECT device, time_bucket(INTERVAL 1 MINUTE, time) AS minute, count(*) AS samples, max(power_watts) AS most
    FROM samples GROUP BY ALL)
SELECT count(*) FROM raw FULL JOIN rollup_1m r ON r.device = raw.device AND r.time = raw.minute
WHERE (raw.samples, raw.most) IS DISTINCT FROM (r.samples, r.power_watts_max)
"""
"""Number of the buckets of 1 min that differ from what raw samples say."""


class Traffic:
    """All messages on a bus, answers and acknowledgements included, and the samples among them."""

    def __init__(self) -> None:
        self.messages = 0
        self.ticks = 0
        """Ticks of one of the hosts."""
        self.ahead_seconds = 0.0
        """By how much the newest sample is dated ahead."""
        self.samples = 0

    async def take(self, message: Msg) -> None:
        self.messages += 1
        # A stream's delivery to a consumer has the subject of the message, too.
        if message.subject.startswith(subjects.SAMPLES + ".") and not message.reply.startswith("$JS.ACK."):
            batch = codec.decode(message.data, SampleBatch)
            times_ns = memoryview(batch.times_ns).cast("q")
            self.samples += len(times_ns)
            self.ahead_seconds = max(times_ns) * 1e-9 - time.time()
            self.ticks += message.subject.endswith("1")

    async def of_ticks(self, number: int = TICKS) -> int:
        """Messages while so many ticks come."""
        messages, wanted = self.messages, self.ticks + number
        await self.until(lambda: self.ticks >= wanted)
        return self.messages - messages

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def watched(url: str) -> AsyncGenerator[tuple[Client, Traffic]]:
    nc, traffic = await connect(url, name="watch"), Traffic()
    await nc.subscribe(">", cb=traffic.take)
    try:
        yield nc, traffic
    finally:
        await nc.close()


def start(log: Path, *command: str, **values: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment(**values), stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def no_storm(usual: int) -> int:
    """Most messages for as many ticks on a busy machine; those of the ticks that were missed would be far more."""
    return 2 * usual + 100


async def transactions(nc: Client) -> int:
    [processor] = await ask_health(nc, "processor")
    return sum(sum(each.counts or ()) for each in processor.measures if each.name == "commit_seconds")


async def until_ready(nc: Client, service: str | None = None) -> None:
    async with asyncio.timeout(60):
        while not (found := await ask_health(nc, service)) or not all(health.ready for health in found):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def processes_below(pid: int) -> list[int]:
    found = [pid]
    for at in found:
        for task in Path(f"/proc/{at}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.long
async def test_a_sleep_is_one_gap_and_nothing_is_made_up_for(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "data", *FLEET)
    command = (*CORRAL, "run", "--host", "any", "--gpus", "1", "--ttl", "10s", "--", "sleep", "1000")
    run = start(tmp_path / "run.log", *command, CORRAL_NATS_URL=cluster.url)
    try:
        await asyncio.to_thread(wait_for, lambda: cluster.rows("SELECT count(*) FROM lease_events")[0][0])
        async with watched(cluster.url) as (nc, traffic):
            await traffic.of_ticks()
            stored, lines = await transactions(nc), len(cluster.output().splitlines())
            assert stored > 0
            usual = await traffic.of_ticks()
            stored_usually = await transactions(nc) - stored

            asleep = [*processes_below(cluster.process.pid), *processes_below(run.pid)]
            for pid in asleep:
                os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(SLEEP_SECONDS)
            before = traffic.messages
            for pid in asleep:
                os.kill(pid, signal.SIGCONT)
            stored = await transactions(nc)
            await traffic.of_ticks()
            assert traffic.messages - before <= no_storm(usual)
            assert await transactions(nc) - stored <= 2 * stored_usually + 5
            assert len(cluster.output().splitlines()) - lines <= 5, cluster.output()
            await until_ready(nc)  # a runner says so once its next report is answered
        gaps = await asyncio.to_thread(
            cluster.rows,
            "SELECT count(*) FILTER (gap > 5), max(gap) FROM (SELECT device, "
            "epoch(time - lag(time) OVER (PARTITION BY device ORDER BY time)) AS gap FROM samples) GROUP BY device",
        )
        assert [number for number, _ in gaps] == [1] * 4, gaps
        assert all(longest >= SLEEP_SECONDS - 1 for _, longest in gaps), gaps
        assert run.poll() is None, (tmp_path / "run.log").read_text()
        leases = await asyncio.to_thread(cluster.json, "leases")
        assert [lease["state"] for lease in leases["leases"]] == ["active"]
    finally:
        run.kill()
        run.wait()
        cluster.stop()


@pytest.mark.long
async def test_a_clock_that_jumps_changes_times_alone(nc: Client, server: EmbeddedServer, tmp_path: Path) -> None:
    moved = tmp_path / "ahead_seconds"

    def move(seconds: int) -> None:
        moved.with_suffix(".new").write_text(str(seconds))
        moved.with_suffix(".new").rename(moved)

    move(0)
    values = {"CORRAL_NATS_URL": server.url, "CORRAL_STATE_DIR": str(tmp_path / "state")}
    command = (*CORRAL, "process", "--db", str(tmp_path / "history.duckdb"))
    processor = start(tmp_path / "processor.log", *command, **values)
    command = (sys.executable, "-c", MOVED_CLOCK, str(moved), "collect", *FLEET, "--batch", "0")
    collector = start(tmp_path / "collector.log", *command, **values)
    try:
        async with watched(server.url) as (_, traffic):
            await until_ready(nc, "processor")  # what it catches up with at its start is no storm
            await traffic.of_ticks(5)
            usual = await traffic.of_ticks()
            for ahead_seconds in (HOUR_SECONDS, -HOUR_SECONDS, 0):
                move(ahead_seconds)
                await traffic.until(lambda wanted=ahead_seconds: abs(traffic.ahead_seconds - wanted) < HOUR_SECONDS / 2)
                assert await traffic.of_ticks() <= no_storm(usual)
            collector.terminate()
            assert collector.wait(30) == 0
            history = Asking(nc)
            await history.until("SELECT count(*) FROM samples", traffic.samples)
            await history.until(NOT_ROLLED_UP, 0)
            assert await history.rows(
                "SELECT count(DISTINCT (device, time)), count(*) FILTER (epoch(time - now()) > 10) FROM samples"
            ) == [[traffic.samples, 0]]
            # A clock that is ahead is set right; one that is behind is not, and leaves an hour without samples.
            assert await history.rows(
                "SELECT count(*) FILTER (gap > 1800), count(*) FILTER (gap BETWEEN 30 AND 1800) FROM (SELECT "
                "epoch(time - lag(time) OVER (PARTITION BY device ORDER BY time)) AS gap FROM samples)"
            ) == [[4, 0]]
        logs = {name: (tmp_path / f"{name}.log").read_text().splitlines() for name in ("processor", "collector")}
        assert all(len(lines) < 30 for lines in logs.values()), logs
    finally:
        for process in (collector, processor):
            process.kill()
            process.wait()
