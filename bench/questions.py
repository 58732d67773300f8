"""What do dear questions cost those who ask for devices meanwhile?

    python bench/questions.py
    python bench/questions.py --gpus 10000 --seconds 5 --askers 4

Grants are measured three times in one run: alone, which is the limit; beside askers who each want to know, again and
again, where a request would go if the fleet had 20,000 more devices; and beside askers who list a tenth of the devices.
Each asker has a connection and a user of its own. The line below each says how many questions were answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvloop
from corral.bus.connect import connect
from corral.bus.layout import until_laid_out
from granting import HEADER, drive, grant_and_release, start_planner, until_usable
from servers import start

WHAT_IF = {
    "request": {"owner": "asker", "gpus": 4},
    "with_more": [{"model": "NVIDIA L40S", "devices": 20_000, "per_host": 8}],
}


async def ask(url: str, number: int, subject: str, body: dict[str, Any], stop: asyncio.Event) -> int:
    """Ask until told to stop; how many were answered."""
    nc = await connect(url)
    answered = 0
    payload = json.dumps(body).encode()
    with contextlib.suppress(asyncio.CancelledError):
        while not stop.is_set():
            with contextlib.suppress(Exception):
                answer = await nc.request(f"{subject}.user{number}" if body else subject, payload, timeout=30)
                answered += not (answer.headers or {}).get("Nats-Service-Error-Code")
    await nc.close()
    return answered


async def beside(label: str, url: str, args: argparse.Namespace, subject: str, body: dict[str, Any]) -> None:
    """Grants while so many ask."""
    stop = asyncio.Event()
    askers = [asyncio.create_task(ask(url, number, subject, body, stop)) for number in range(args.askers)]
    await asyncio.sleep(1.0)
    await drive(label, url, args.clients, args.seconds, grant_and_release)
    stop.set()
    for asker in askers:
        asker.cancel()
    print(f"  {sum(await asyncio.gather(*askers))} questions answered meanwhile", flush=True)


async def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gpus", type=int, default=10_000)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--clients", type=int, default=4)
    options.add_argument("--askers", type=int, default=4)
    args = options.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        servers = start(Path(folder), 1)
        url = servers[0].url
        stop = context.Event()
        parts: list[Any] = []
        try:
            nc = await connect(url)
            await until_laid_out(nc.jetstream())
            parts += start_planner(url, args.gpus, stop)
            await until_usable(nc, args.gpus)
            print(f"{args.gpus:,} GPUs, {args.askers} askers, {os.cpu_count()} cores for everything\n{HEADER}")
            await drive("limit: grants and releases alone", url, args.clients, args.seconds, grant_and_release)
            await beside("beside what-ifs of 20,000 more", url, args, "corral.v1.plan.explain", WHAT_IF)
            await beside("beside lists of a tenth of them", url, args, "corral.v1.plan.devices", {"hosts": ["*7"]})
            await nc.close()
        finally:
            stop.set()
            for part in parts:
                part.terminate()
                part.join(10)
            for server in servers:
                server.kill()


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
