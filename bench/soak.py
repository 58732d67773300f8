"""Does anything grow? A large fleet and a stream of requests on real services, for as long as it is given.

    python bench/soak.py                                     2,000 hosts × 8 devices at 1 Hz, 50 requests/s, 3 minutes
    python bench/soak.py --seconds 3600 --csv soak.csv --svg docs/images/soak.svg

A nats-server, a planner, a processor and a collector of a simulated fleet run as processes of their own, as operators
start them; the requests come from this one, at their times whatever the answers take. Every ten seconds it is written
down what each process holds of memory, what lies on the disk, what an answer took, and how old the newest sample in
the history is. In the end the collector's own count of what it has read is held against the rows in the history, and
no device may have been promised to two at a time.

The stream of telemetry and the bucket are bounded by their limits (`schemas/subjects.py`); the history grows by what
comes until raw samples are two days old.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop
from corral.bus.connect import URL_VARIABLE, connect
from corral.cli.local.server import EmbeddedServer, die_with_parent
from corral.schemas import codec, subjects
from corral.schemas.query import ProcessorStatus
from corral.schemas.telemetry import AgentReport
from nats.aio.client import Client
from soak_chart import draw

COLUMNS = (
    "seconds", "nats_rss", "planner_rss", "processor_rss", "collector_rss", "bus_bytes", "history_bytes", "p50_ms",
    "p99_ms", "answers", "granted", "rejected", "failed", "held", "lag_seconds", "lag_messages", "rows",
)  # fmt: skip

TTL_SECONDS = 120


class Requester:
    """Asks at a steady rate, holds what it is granted for a while, and gives it back."""

    def __init__(self, nc: Client, rate: float, hold_seconds: float) -> None:
        self.nc, self.rate, self.hold_seconds = nc, rate, hold_seconds
        self.random = random.Random(1)
        self.latencies: list[float] = []
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.held: dict[str, str] = {}
        self.promised_twice = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.over = asyncio.Event()

    async def run(self) -> None:
        started = time.monotonic()
        number = 0
        while True:
            number += 1
            await asyncio.sleep(max(0.0, started + number / self.rate - time.monotonic()))
            task = asyncio.create_task(self.live(number))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def live(self, number: int) -> None:
        owner = f"team{number % 40}"
        body: dict[str, Any] = {
            "owner": owner, "request_id": f"soak-{os.getpid()}-{number}", "ttl_seconds": TTL_SECONDS,
            "gpus": self.random.choice((1, 1, 1, 2, 4, 8)),
        }  # fmt: skip
        if number % 20 == 0:
            body["models"] = ["no such model"]  # what can never fit is turned down, and remembered
        began = time.perf_counter()
        answer = await self.ask("request", body)
        if answer is None:
            return
        self.latencies.append(time.perf_counter() - began)
        self.counts[answer["type"]] += 1
        if answer["type"] != "assignment":
            if answer["type"] == "error":
                self.failures[f"{answer['code']}: {answer['message'][:80]}"] += 1
            return
        lease = answer["lease"]
        for grant in lease["grants"]:
            self.promised_twice += grant["device"] in self.held
            self.held[grant["device"]] = lease["lease_id"]
        with contextlib.suppress(TimeoutError):
            # Nobody renews: who holds longer than the lease would take its next holder for a second one.
            async with asyncio.timeout(min(self.random.expovariate(1 / self.hold_seconds), TTL_SECONDS / 2)):
                await self.over.wait()
        for grant in lease["grants"]:
            del self.held[grant["device"]]
        await self.ask("release", {"owner": owner, "lease_id": lease["lease_id"]})

    async def ask(self, verb: str, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            reply = await self.nc.request(f"corral.v1.plan.{verb}", json.dumps(body).encode(), timeout=10)
        except Exception as error:  # whatever it is, it is counted
            self.counts["failed"] += 1
            self.failures[f"{verb}: {type(error).__name__}"] += 1
            return None
        return json.loads(reply.data)

    async def finish(self) -> None:
        """Give everything back."""
        self.over.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Soak:
    """The cluster, and the record of it."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.server = EmbeddedServer(folder / "bus")
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.rows: list[dict[str, Any]] = []
        self.db = folder / "history" / "history.duckdb"

    def spawn(self, name: str, *arguments: str) -> None:
        parent = os.getpid()
        with (self.folder / f"{name}.log").open("wb") as log:
            self.parts[name] = subprocess.Popen(
                [sys.executable, "-m", "corral.cli.main", *arguments],
                env={**os.environ, URL_VARIABLE: self.server.url, "CORRAL_CONFIG": os.devnull},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent, signal.SIGKILL),
            )

    async def run(self) -> int:
        args = self.args
        self.server.start()
        self.db.parent.mkdir()
        # Without a limit DuckDB keeps of its file in memory what the machine has room for.
        self.spawn("processor", "process", "--db", str(self.db), "--memory", args.memory)
        self.spawn("planner", "plan")
        self.spawn(
            "collector", "collect", "--source", "simulated", "--hosts", str(args.hosts), "--devices", str(args.devices),
            "--interval", "1s", "--batch", "1s", "--state", str(self.folder / "state"),
        )  # fmt: skip
        nc = await connect(self.server.url, name="soak")
        asking = await connect(self.server.url, name="soak-requests", pending_size=64 * 2**20)
        await self.until_ready(nc)
        requester = Requester(asking, args.requests, args.hold)
        running = asyncio.create_task(requester.run())
        started = time.monotonic()
        with open(args.csv, "w", newline="") as file:  # noqa: ASYNC230  # a line every ten seconds
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            while (elapsed := time.monotonic() - started) < args.seconds:
                await asyncio.sleep(min(args.every, args.seconds - elapsed))
                row = await self.measure(nc, requester, time.monotonic() - started)
                self.rows.append(row)
                writer.writerow(row)
                file.flush()
                print(line(row), flush=True)
                dead = [name for name, part in self.parts.items() if part.poll() is not None]
                if dead:
                    print(f"{', '.join(dead)} ended by itself: see {self.folder}")
                    return 1
        running.cancel()
        await requester.finish()
        wrong = await self.account(nc, requester)
        draw(
            Path(args.csv),
            Path(args.svg),
            f"{args.hosts:,} hosts × {args.devices} devices at 1 Hz, {args.requests:g} requests/s",
        )
        for client in (nc, asking):
            await client.close()
        return wrong

    async def until_ready(self, nc: Client) -> None:
        wanted = self.args.hosts * self.args.devices
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                fleet = json.loads((await nc.request("corral.v1.plan.fleet", b"", timeout=2)).data)
                await nc.request(subjects.HISTORY_STATUS, b"", timeout=2)
                if fleet["usable_devices"] > 0.9 * wanted:
                    return
            await asyncio.sleep(0.5)
        raise SystemExit(f"the cluster did not come up: see {self.folder}")

    async def measure(self, nc: Client, requester: Requester, seconds: float) -> dict[str, Any]:
        latencies, requester.latencies = sorted(requester.latencies), []
        counts, requester.counts = requester.counts, Counter()
        lag: float | None = None
        status: ProcessorStatus | None = None
        with contextlib.suppress(Exception):
            sql = "SELECT epoch(max(time)) FROM samples WHERE time > now() - INTERVAL 2 MINUTE"
            answer = json.loads((await nc.request(subjects.QUERY, json.dumps({"sql": sql}).encode(), timeout=10)).data)
            lag = round(time.time() - answer["rows"][0][0], 2)
            reply = await nc.request(subjects.HISTORY_STATUS, b"", timeout=5)
            status = codec.decode(reply.data, ProcessorStatus, codec.JSON)
        assert self.server.process is not None
        return {
            "seconds": round(seconds, 1),
            "nats_rss": resident(self.server.process.pid),
            **{f"{name}_rss": resident(part.pid) for name, part in self.parts.items()},
            "bus_bytes": on_disk(self.server.data),
            "history_bytes": on_disk(self.db.parent),
            "p50_ms": round(at(latencies, 0.5) * 1e3, 2),
            "p99_ms": round(at(latencies, 0.99) * 1e3, 2),
            "answers": len(latencies),
            "granted": counts["assignment"],
            "rejected": counts["rejection"],
            "failed": counts["failed"] + counts["error"],
            "held": len(requester.held),
            "lag_seconds": lag if lag is not None else "",
            "lag_messages": sum(status.lag_messages.values()) if status else "",
            "rows": status.samples if status else "",
        }

    async def account(self, nc: Client, requester: Requester) -> int:
        """Hold what was read against what is stored, and the beginning against the end."""
        self.parts["collector"].terminate()
        await asyncio.to_thread(self.parts["collector"].wait, 60)
        last = await nc.jetstream().get_last_msg(subjects.TELEMETRY_STREAM, subjects.agent_subject("sim"))
        report = codec.decode(last.data or b"", AgentReport)
        expected = report.samples - report.dropped_samples
        found = distinct = 0
        for _ in range(60):
            with contextlib.suppress(Exception):
                sql = "SELECT count(*) FROM samples"
                answer = json.loads(
                    (await nc.request(subjects.QUERY, json.dumps({"sql": sql}).encode(), timeout=60)).data
                )
                found = answer["rows"][0][0]
                if found >= expected:
                    break
            await asyncio.sleep(1)
        # Of one host in each hundred, so that the check does not take more memory than what it checks.
        sql = "SELECT count(*) - count(DISTINCT (device, time)) FROM samples WHERE host LIKE '%07'"
        with contextlib.suppress(Exception):
            answer = json.loads((await nc.request(subjects.QUERY, json.dumps({"sql": sql}).encode(), timeout=120)).data)
            distinct = answer["rows"][0][0]
        print(f"\nrows: {expected:,} expected, {found:,} found, {distinct} doubled (of every hundredth host)")
        print(f"dropped by the collector: {report.dropped_samples:,}; late ticks: {report.late_ticks}")
        print(f"devices promised twice at a time: {requester.promised_twice}")
        print(f"failures: {dict(requester.failures) or 'none'}")
        wrong = int(found != expected or distinct != 0 or requester.promised_twice != 0)
        quarter = max(1, len(self.rows) // 4)
        for name in ("nats_rss", "planner_rss", "processor_rss", "collector_rss", "p50_ms", "p99_ms", "lag_seconds"):
            second = [float(row[name]) for row in self.rows[quarter : 2 * quarter] if row[name] != ""]
            fourth = [float(row[name]) for row in self.rows[-quarter:] if row[name] != ""]
            if second and fourth:
                a, b = statistics.median(second), statistics.median(fourth)
                scale, unit = (2**20, " MiB") if name.endswith("rss") else (1, "")
                print(f"{name:16} second quarter {a / scale:10.2f}{unit}, last quarter {b / scale:10.2f}{unit}")
        return wrong

    def stop(self) -> None:
        for part in self.parts.values():
            if part.poll() is None:
                part.terminate()
        for part in self.parts.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.wait(20)
            part.kill()
        self.server.kill()


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def line(row: dict[str, Any]) -> str:
    """A row of the record for people."""
    return (
        f"{row['seconds']:6.0f} s  nats {mib(row['nats_rss'])}  planner {mib(row['planner_rss'])}  processor "
        f"{mib(row['processor_rss'])}  collector {mib(row['collector_rss'])} MiB  p50 {row['p50_ms']} p99 "
        f"{row['p99_ms']} ms  lag {row['lag_seconds']} s  held {row['held']}  bus {mib(row['bus_bytes'])} "
        f"history {mib(row['history_bytes'])} MiB"
    )


def mib(value: Any) -> str:
    return f"{float(value) / 2**20:.0f}"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hosts", type=int, default=2000)
    options.add_argument("--devices", type=int, default=8)
    options.add_argument("--requests", type=float, default=50.0, help="a second")
    options.add_argument("--hold", type=float, default=60.0, help="seconds that a lease is held, on average")
    options.add_argument("--seconds", type=float, default=180.0)
    options.add_argument("--every", type=float, default=10.0, help="seconds between two lines of the record")
    options.add_argument("--csv", default="soak.csv")
    options.add_argument("--svg", default="soak.svg")
    options.add_argument("--memory", default="2GiB", help="that the processor's database may take")
    options.add_argument("--keep", default="", help="leave everything in this folder")
    args = options.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="corral-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, args)
        stack.callback(soak.stop)
        return uvloop.run(soak.run())


if __name__ == "__main__":
    sys.exit(main())
