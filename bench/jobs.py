"""Jobs: time from submitting to the order to start, starts a second of an array, and memory of tasks that wait.

First of the planner alone, in a process of its own: the runners of all hosts are one other process, without any
processes of jobs. Each run ends as soon as it is started, and is reported with the others of 10 ms. Then with a real
runner and real processes (`job_processes.py`).

    python bench/jobs.py [--tasks 3000] [--hosts 20] [--only planner|runner] [--profile FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import job_processes
import uvloop
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.bus.tasks import BackgroundTasks
from corral.cli.local.server import EmbeddedServer
from corral.schemas import codec, subjects
from corral.schemas.work.jobs import JobState, TaskPart
from corral.schemas.work.runs import RunnerReport, RunOrders, RunReport, RunVerb
from granting import PER_HOST, start_planner, until_usable
from job_requests import ask, cpu_seconds_of, memory_of, submit, until_ended
from nats.aio.client import Client
from nats.aio.msg import Msg

BATCH_SECONDS = 0.01
REPORT_SECONDS = 5.0
MIB = 2**20


class Runners:
    """The runners of all hosts: a run ends as soon as it is started."""

    def __init__(self, nc: Client, hosts: list[str]) -> None:
        self.nc = nc
        self.hosts = hosts
        self.ordered_at: dict[str, float] = {}
        self._ended: dict[str, list[RunReport]] = {host: [] for host in hosts}
        self._tasks = BackgroundTasks()

    async def start(self) -> None:
        await self.nc.subscribe(f"{subjects.RUNS}.*", cb=self._pushed)
        for host in self.hosts:
            self._tasks.start(self._report_on(host))

    async def _pushed(self, message: Msg) -> None:
        now = time.perf_counter()
        host = message.subject.rpartition(".")[2]
        self._take(host, codec.decode(message.data, RunOrders, codec.content_type(message.headers)), now)

    def _take(self, host: str, orders: RunOrders, now: float) -> None:
        time_now = datetime.now(UTC)
        for run in orders.runs:
            if run.verb is RunVerb.START and run.run_id not in self.ordered_at:
                self.ordered_at[run.run_id] = now
                part = TaskPart(
                    host=host, state=JobState.DONE, exit_code=0, started_at=time_now, ended_at=time_now, executor="none"
                )
                self._ended[host].append(RunReport(run_id=run.run_id, lease_id=run.lease_id, part=part))

    async def _report_on(self, host: str) -> None:
        reported_at = -REPORT_SECONDS
        while True:
            now = time.monotonic()
            complete = now - reported_at >= REPORT_SECONDS
            if complete or self._ended[host]:
                reported_at = now if complete else reported_at
                runs, self._ended[host] = self._ended[host], []
                report = RunnerReport(host=host, runner="bench", executors=["none"], runs=runs, complete=complete)
                headers = {codec.CONTENT_TYPE_HEADER: codec.MSGPACK}
                subject = subjects.runner_subject(host)
                reply = await self.nc.request(subject, codec.encode(report), timeout=30, headers=headers)
                orders = codec.decode(reply.data, RunOrders, codec.content_type(reply.headers))
                self._take(host, orders, time.perf_counter())
            await asyncio.sleep(BATCH_SECONDS)


async def measure(url: str, hosts: int, tasks: int, pid: int) -> None:
    """All measurements, printed."""
    nc = await connect(url, name="bench")
    await until_usable(nc, hosts * PER_HOST)
    names = [f"node{number:05d}" for number in range(hosts)]
    runners_nc = await connect(url, name="bench-runners")
    runners = Runners(runners_nc, names)
    await runners.start()
    await until_ended(nc, await submit(nc))
    took: list[float] = []
    for _ in range(200):
        began = time.perf_counter()
        job_id = await submit(nc)
        while f"{job_id}_0.1" not in runners.ordered_at:  # noqa: ASYNC110
            await asyncio.sleep(0)
        took.append(runners.ordered_at[f"{job_id}_0.1"] - began)
        await asyncio.sleep(0.01)
    cuts = statistics.quantiles(took, n=100)
    print(f"submit to order to start: p50 {cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms")
    began, spent = time.perf_counter(), cpu_seconds_of(pid)
    job_id = await submit(nc, array=f"0-{tasks - 1}")
    await until_ended(nc, job_id)
    starts = sorted(at for name, at in runners.ordered_at.items() if name.startswith(f"{job_id}_"))
    print(f"array of {tasks} tasks on {hosts * PER_HOST} GPUs: {len(starts) / (starts[-1] - began):.0f} starts/s")
    each = (cpu_seconds_of(pid) - spent) / tasks
    print(f"CPU time of the planner: {each * 1000:.2f} ms for each task, from the queue to its end")
    before = memory_of(pid)
    request = {"owner": "bench", "gpus": PER_HOST, "hosts": names[:1], "ttl_seconds": 600, "wait_seconds": 30}
    held = await ask(nc, "request", request)
    job_id = await submit(nc, array="0-9999", request={"owner": "bench", "gpus": 1, "hosts": names[:1]})
    await asyncio.sleep(3)
    listed = (await ask(nc, "jobs", {"job_ids": [job_id]}))["jobs"][0]["job"]
    print(f"{listed['counts']['pending']} tasks wait: {memory_of(pid) - before:.1f} MiB more than {before:.1f} MiB")
    await ask(nc, "job", {"owner": "bench", "job_id": job_id, "verb": "cancel"})
    await ask(nc, "release", {"owner": "bench", "lease_id": held["lease"]["lease_id"]})


async def measure_processes(url: str, hosts: int, tasks: int, parts: dict[str, int], folder: Path) -> None:
    """All measurements with a real runner, printed."""
    nc = await connect(url, name="bench")
    await until_usable(nc, hosts * PER_HOST)
    with job_processes.runner_process(url, hosts, folder / "runner") as runner:
        await until_ended(nc, await submit(nc))
        await job_processes.measure_idle(runner)
        await job_processes.measure_latency(nc, folder)
        await job_processes.measure_starts(nc, runner, parts, tasks)
    await nc.close()


def main() -> None:
    """Start a server and a planner, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--only", choices=("planner", "runner"), default="", help="only this part")
    parser.add_argument("--profile", default="", help="file for a profile of the planner")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder))
        server.start()
        try:
            uvloop.run(_lay_out(server.url))
            stop = multiprocessing.get_context("spawn").Event()
            parts = start_planner(server.url, args.hosts * PER_HOST, stop, args.profile)
            assert parts[0].pid
            assert server.process
            try:
                if args.only != "runner":
                    uvloop.run(measure(server.url, args.hosts, args.tasks, parts[0].pid))
                if args.only != "planner":
                    pids = {"planner": parts[0].pid, "server": server.process.pid}
                    uvloop.run(measure_processes(server.url, args.hosts, args.tasks, pids, Path(folder)))
            finally:
                stop.set()
                for part in parts:
                    part.terminate()
                    part.join(10)
        finally:
            server.kill()


async def _lay_out(url: str) -> None:
    nc = await connect(url, name="bench")
    await ensure_layout(nc.jetstream())
    await nc.close()


if __name__ == "__main__":
    main()
