"""Jobs with real processes: time from submitting to a process that runs, starts a second of an array, CPU by part.

A server, a planner and a runner, which has the hosts of a small simulated fleet, each as a process; each task of the
array is `/bin/true`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from job_requests import children_of, cpu_seconds_of, memory_of, submit, until_ended
from nats.aio.client import Client

IDLE_SECONDS = 20.0
PAUSE_SECONDS = 0.05
SUBMITTED = 100


class RunnerProcess:
    """`corral runner` for some hosts.

    Args:
        url: of the server.
        hosts: number of hosts, named as `granting.feed` does.
        folder: for its state.
    """

    def __init__(self, url: str, hosts: int, folder: Path) -> None:
        words = [sys.executable, "-m", "corral.cli.main", "runner", "--own-account", "--executor", "process"]
        words += ["--host", f"node[00000-{hosts - 1:05d}]", "--state", str(folder)]
        environment = {key: value for key, value in os.environ.items() if key != "CORRAL_NATS_URL"}
        self._process = subprocess.Popen(words, env=environment | {"CORRAL_NATS_URL": url}, stderr=subprocess.DEVNULL)
        self.pid = self._process.pid

    @property
    def zygote(self) -> int | None:
        """Process id of the zygote; None before the first start."""
        return next(iter(children_of(self.pid)), None)

    async def until_unused(self) -> None:
        """Wait until all supervisors have ended: some wait for further runs, and only then their CPU time counts."""
        while (zygote := self.zygote) and children_of(zygote):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of the runner, of its zygote, and of the supervisors and commands that have ended."""
        zygote = self.zygote
        return {
            "runner": cpu_seconds_of(self.pid),
            "zygote": cpu_seconds_of(zygote) if zygote else 0.0,
            "supervisors and commands": cpu_seconds_of(zygote, children=True) if zygote else 0.0,
        }

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


@contextlib.contextmanager
def runner_process(url: str, hosts: int, folder: Path) -> Iterator[RunnerProcess]:
    """A runner that is ended at the end."""
    runner = RunnerProcess(url, hosts, folder)
    try:
        yield runner
    finally:
        runner.stop()


class Pipe:
    """A named pipe in which processes of jobs say that they run, and when they said so.

    Args:
        path: of the pipe.
    """

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.said_at = asyncio.Queue[float]()
        self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._file, self._read)

    def _read(self) -> None:
        os.read(self._file, 65536)
        self.said_at.put_nowait(time.perf_counter())

    def close(self) -> None:
        """Close the pipe."""
        asyncio.get_running_loop().remove_reader(self._file)
        os.close(self._file)


async def measure_idle(runner: RunnerProcess) -> None:
    """CPU time and memory of a runner that has nothing to do."""
    before = cpu_seconds_of(runner.pid)
    await asyncio.sleep(IDLE_SECONDS)
    share = (cpu_seconds_of(runner.pid) - before) / IDLE_SECONDS
    print(f"idle runner: {share:.2%} of a core, {memory_of(runner.pid):.0f} MiB")


async def measure_latency(nc: Client, folder: Path) -> None:
    """Time from submitting to a process that runs, on an idle fleet."""
    pipe = Pipe(folder / "pipe")
    took: list[float] = []
    for _ in range(SUBMITTED):
        began = time.perf_counter()
        job_id = await submit(nc, command=["/bin/sh", "-c", f"echo > {pipe.path}"])
        took.append(await pipe.said_at.get() - began)
        await until_ended(nc, job_id)
        await asyncio.sleep(PAUSE_SECONDS)
    pipe.close()
    cuts = statistics.quantiles(took, n=100)
    print(f"submit to process running: p50 {cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms")


async def measure_starts(nc: Client, runner: RunnerProcess, parts: dict[str, int], tasks: int) -> None:
    """Starts a second of an array, and the CPU time that each part has spent on a task."""

    def spent() -> dict[str, float]:
        return {name: cpu_seconds_of(pid) for name, pid in parts.items()} | runner.cpu_seconds()

    await runner.until_unused()
    before, began = spent(), time.perf_counter()
    await until_ended(nc, await submit(nc, command=["/bin/true"], array=f"0-{tasks - 1}"))
    seconds = time.perf_counter() - began
    after = spent()
    await runner.until_unused()
    after |= runner.cpu_seconds()
    print(f"array of {tasks} × /bin/true: {tasks / seconds:.0f} started and ended a second")
    each = {name: (after[name] - before[name]) / tasks for name in after}
    words = ", ".join(f"{name} {value * 1000:.2f}" for name, value in each.items())
    print(f"CPU time for each task: {sum(each.values()) * 1000:.2f} ms ({words})")
