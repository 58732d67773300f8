"""What does a processor cost while nobody asks? CPU time and memory of `corral process` over a live simulated fleet.

    python bench/idle.py                          32 GPUs at 1 Hz, for two minutes
    python bench/idle.py --hosts 1 --devices 1    one GPU
    python bench/idle.py --against ../other       another build's checkout (with its `.venv`), at the same time

A real nats-server, a collector of a simulated fleet and the processors run as processes of their own, as operators run
them. All processors read the same streams at the same time, each into its own new database, so what else the machine
does affects all of them. CPU time is that of the process and its children, from the kernel (/proc/PID/stat), after a
warm-up in which tables are created. Memory is the resident size of the process at the end, and its private part with
that of its children. The limit: `limit` is a process that reads the same stream with nats-py and throws it away.

With `--freshness` another process asks the first processor for its newest sample, and reports how old it is; this costs
the processor CPU time, so measure it in a run of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from corral.bus.connect import URL_VARIABLE, connect
from corral.cli.local.server import EmbeddedServer, die_with_parent
from corral.client import connect as client_of
from corral.schemas import subjects

TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
READY_SECONDS: Final = 60.0
NEWEST: Final = "SELECT epoch_us(max(time)) FROM samples WHERE time > now() - INTERVAL 1 MINUTE"


class Part:
    """A process that is measured."""

    def __init__(self, name: str, command: list[str], folder: Path, url: str) -> None:
        self.name = name
        parent = os.getpid()
        with (folder / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, URL_VARIABLE: url, "CORRAL_CONFIG": os.devnull},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent, signal.SIGKILL),
            )
        self.began_cpu = 0.0
        self.began = 0.0

    def begin(self) -> None:
        """Start counting."""
        self.began_cpu, self.began = self.cpu_seconds(), time.monotonic()

    def cpu_seconds(self) -> float:
        """User and system time of the process and its children."""
        return sum(_cpu_seconds(pid) for pid in _tree(self.process.pid))

    def cpu_seconds_a_minute(self) -> float:
        """CPU time since `begin`, for each minute."""
        return 60 * (self.cpu_seconds() - self.began_cpu) / (time.monotonic() - self.began)

    def resident_mib(self) -> float:
        """Resident memory of the process, in MiB."""
        return _memory_mib(self.process.pid, "Rss:")

    def private_mib(self) -> float:
        """Memory of the process and its children that they share with no other, in MiB."""
        return sum(_memory_mib(pid, "Private_") for pid in _tree(self.process.pid))

    def stop(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _tree(pid: int) -> list[int]:
    found = [pid]
    for at in found:
        for task in Path(f"/proc/{at}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_SECOND


def _memory_mib(pid: int, prefix: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(prefix)) / 1024


async def discard(url: str) -> None:
    """The limit: receive all messages of telemetry, and do nothing."""
    nc = await connect(url, name="limit")

    async def nothing(_message: object) -> None:
        pass

    await nc.subscribe(subjects.SAMPLES + ".>", cb=nothing)
    await asyncio.Event().wait()


async def ages(url: str, seconds: float) -> list[float]:
    """Ask for the newest sample at uneven intervals; return how old it was when the answer was there, in seconds."""
    found: list[float] = []
    async with client_of(url) as client:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = await client.query(
                "SELECT epoch_us(max(time)) FROM samples WHERE time > now() - INTERVAL 1 MINUTE"
            )
            newest = answer.rows[0][0]
            if newest is not None:
                found.append(time.time() - newest / 1e6)
            await asyncio.sleep(0.37)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--devices", type=int, default=8, help="of each host")
    parser.add_argument("--interval", default="1s")
    parser.add_argument("--batch", default="250ms", help="as of `corral collect`")
    parser.add_argument("--warm-up", type=float, default=25.0, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--against", type=Path, action="append", default=[], metavar="CHECKOUT")
    parser.add_argument("--freshness", action="store_true")
    parser.add_argument("--option", action="append", default=[], metavar="OPTION", help="for this `corral process`")
    parser.add_argument("--discard", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.discard:
        asyncio.run(discard(args.discard))
        return
    builds = {"this": Path(sys.executable)}
    builds |= {path.resolve().name: path.resolve() / ".venv/bin/python" for path in args.against}
    folder = Path(tempfile.mkdtemp(prefix="bench-idle-"))
    server = EmbeddedServer(folder / "nats")
    server.start()
    parts: list[Part] = []
    try:
        fleet = ["--source", "simulated", "--hosts", str(args.hosts), "--devices", str(args.devices)]
        fleet += ["--interval", args.interval, "--batch", args.batch, "--state", str(folder / "state")]
        corral = ["-m", "corral.cli.main"]
        processors = [
            Part(
                name,
                [str(python), *corral, "process", "--db", str(folder / name / "history.duckdb")]
                + (args.option if name == "this" else []),
                folder,
                server.url,
            )
            for name, python in builds.items()
        ]
        parts += processors
        limit = Part("limit", [sys.executable, __file__, "--discard", server.url], folder, server.url)
        collector = Part("collector", [sys.executable, *corral, "collect", *fleet], folder, server.url)
        parts += [limit, collector]
        until(lambda: all((folder / name / "history.duckdb").exists() for name in builds))
        time.sleep(args.warm_up)
        for part in parts:
            part.begin()
        print(f"{args.hosts} hosts × {args.devices} GPUs, {args.interval}, load {os.getloadavg()[0]:.1f}", flush=True)
        fresh: list[float] = []
        if args.freshness:
            fresh = sorted(asyncio.run(ages(server.url, args.seconds)))
        else:
            time.sleep(args.seconds)
        ended = [part.name for part in parts if part.process.poll() is not None]
        if ended:
            logs = "\n".join((folder / f"{name}.log").read_text()[-2000:] for name in ended)
            raise SystemExit(f"ended by itself: {', '.join(ended)}\n{logs}")
        print(f"{'':>12}  CPU-seconds a minute  resident MiB  private MiB, with children")
        for part in parts:
            print(
                f"{part.name:>12}  {part.cpu_seconds_a_minute():20.2f}  {part.resident_mib():12.0f}  "
                f"{part.private_mib():12.0f}",
                flush=True,
            )
        if fresh:
            percentiles = statistics.quantiles(fresh, n=100)
            print(f"age of the newest sample in an answer: median {percentiles[49]:.2f} s, p99 {percentiles[98]:.2f} s")
    finally:
        for part in reversed(parts):
            part.stop()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; `TimeoutError` after a minute."""
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a process did not start in time")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
