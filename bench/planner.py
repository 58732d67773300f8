"""How fast does the planner grant over the bus, durably, and what bounds it?

    python bench/planner.py                   # all of it, about a minute
    python bench/planner.py --gpus 10000 --seconds 5 --clients 1,16,256
    python bench/planner.py --servers 3       # streams with three copies

One machine runs everything: nats-server, the planner process, and the clients, which are raw sockets speaking NATS in
this process, so that they cost next to nothing beside what they measure. Each client sends its next request when it
has its answer. Limits measured in the same run: a bus round trip (request to an echo in a process of its own), and a
bare write to the planner's bucket, one at a time and pipelined (without the fence that the planner's writes have).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from corral.bus.connect import connect
from corral.bus.layout import until_laid_out
from corral.cli.local.server import EmbeddedServer
from corral.schemas import subjects
from granting import HEADER, drive, grant_and_release, grants_only, start_planner, until_usable
from servers import cpu_seconds, start


def run_echo(url: str) -> None:
    async def echo() -> None:
        nc = await connect(url)

        async def answer(message: Any) -> None:
            await message.respond(message.data)

        await nc.subscribe("bench.echo", cb=answer)
        await asyncio.Event().wait()

    uvloop.run(echo())


async def bare_writes(url: str, seconds: float) -> None:
    """What the bucket takes: writes of an assignment's size, one at a time and pipelined."""
    nc = await connect(url)
    await until_laid_out(nc.jetstream())
    await nc.close()
    value = b"x" * 900

    def client(number: int) -> Callable[[int, bytes], Any]:
        def body(count: int, answer: bytes) -> tuple[str, bytes]:
            return f"$KV.{subjects.PLANNER_BUCKET}.bench.{number}x{count}", value

        return body

    for clients in (1, 64):
        await drive("limit: bare write to the bucket", url, clients, seconds, client)


async def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gpus", type=int, default=10_000)
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--clients", default="1,16,256")
    options.add_argument("--profile", default="", help="write a cProfile of the planner there")
    options.add_argument("--policy", default=None, help="ranks; the planner's default where it is not given")
    options.add_argument(
        "--servers", type=int, default=1, help="NATS servers; streams have a copy on each, up to three"
    )
    options.add_argument("--only", default="", help="limits, grants or cycles")
    args = options.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        servers = start(Path(folder), args.servers)
        url = servers[0].url
        stop = context.Event()
        parts: list[Any] = []
        try:
            print(
                f"{args.gpus:,} GPUs, {os.cpu_count()} cores for {args.servers} of NATS, planner and clients\n{HEADER}"
            )
            if args.only in ("", "limits"):
                echo = context.Process(target=run_echo, args=(url,))
                echo.start()
                await asyncio.sleep(1.0)
                for clients in (1, 64):
                    await drive(
                        "limit: bus round trip", url, clients, 2.0, lambda _: lambda c, a: ("bench.echo", b"x" * 200)
                    )
                echo.kill()
                await bare_writes(url, 2.0)
            if args.only == "limits":
                return
            nc = await connect(url)
            await until_laid_out(nc.jetstream())
            parts += start_planner(url, args.gpus, stop, args.profile, args.policy)
            await until_usable(nc, args.gpus)
            print(f"  planner ready, {resident_mebibytes(parts[0].pid):.0f} MiB")
            for clients in [int(part) for part in args.clients.split(",")]:
                before = cpu_seconds(parts[0].pid), servers_cpu_seconds(servers)
                if args.only in ("", "grants"):
                    rate, *_ = await drive("durable grants", url, clients, args.seconds, grants_only(50))
                    after = cpu_seconds(parts[0].pid), servers_cpu_seconds(servers)
                    spent = [(b - a) / args.seconds / rate * 1e6 for a, b in zip(before, after, strict=True)]
                    print(f"  CPU per grant: planner {spent[0]:.0f} µs, servers {spent[1]:.0f} µs")
                if args.only in ("", "cycles"):
                    await drive("grant and release, each", url, clients, args.seconds, grant_and_release)
            await nc.close()
        finally:
            stop.set()
            for part in parts:
                part.terminate()
                part.join(10)
            for server in servers:
                server.kill()


def servers_cpu_seconds(servers: list[EmbeddedServer]) -> float:
    """Of all servers together."""
    return sum(cpu_seconds(server.process.pid) for server in servers if server.process is not None)


def resident_mebibytes(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
