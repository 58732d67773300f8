"""What it costs that hosts and people enter the bus through accounts of their own, beside one account for all.

    python bench/accounts.py

Each way is measured on a server of its own with the configuration of `corral auth`, from one process on the same
machine: samples that are published and acknowledged, as a collector does, and questions to a service that answers at
once, as the planner does. «One account» is an administrator of the same server, who is beside the streams.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import uvloop
from corral.bus.access.folder import Authority
from corral.bus.access.roles import Role
from corral.bus.connect import connect as bus_connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.schemas import subjects
from nats.aio.client import Client
from nats.aio.msg import Msg

MESSAGES = 20_000
WINDOW = 512
QUESTIONS = 2_000
SAMPLE = b"x" * 1_500
"""About what a batch of 8 devices takes."""


async def publish(nc: Client) -> float:
    """Messages a second that the stream acknowledges, with a window of them under way."""
    inbox = nc.new_inbox()
    gate = asyncio.Semaphore(WINDOW)
    done = asyncio.Event()
    left = MESSAGES

    async def acknowledged(_: Msg) -> None:
        nonlocal left
        left -= 1
        gate.release()
        if not left:
            done.set()

    subscription = await nc.subscribe(f"{inbox}.*", cb=acknowledged, pending_msgs_limit=-1)
    began = time.perf_counter()
    for number in range(MESSAGES):
        await gate.acquire()
        await nc.publish(subjects.samples_subject("node-7"), SAMPLE, reply=f"{inbox}.{number}")
    await done.wait()
    took = time.perf_counter() - began
    await subscription.unsubscribe()
    return MESSAGES / took


async def ask(nc: Client) -> tuple[float, float]:
    """Median and 99th percentile of the time to an answer, in microseconds, one question at a time."""
    times: list[float] = []
    for _ in range(QUESTIONS):
        began = time.perf_counter()
        await nc.request(subjects.PlanSubject.FLEET, b"{}", timeout=5)
        times.append((time.perf_counter() - began) * 1e6)
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.99)]


async def run(server: EmbeddedServer, authority: Authority) -> None:
    """Measure both ways, in turns, so that a busy machine is busy for both."""

    async def connect(name: str) -> Client:
        return await bus_connect(server.url, credentials=str(authority.credentials(name)))

    admin, planner, host, person = [await connect(name) for name in ("admin", "planner", "node-7", "vera")]
    await ensure_layout(planner.jetstream())

    async def answer(message: Msg) -> None:
        await planner.publish(message.reply, b'{"type":"fleet"}')

    await planner.subscribe(subjects.PlanSubject.FLEET, cb=answer)
    await planner.flush()
    print("samples acknowledged a second, question answered in µs (median, p99)")
    for turn in range(3):
        for words, publisher, asker in (("one account", admin, admin), ("accounts", host, person)):
            rate = await publish(publisher)
            median, worst = await ask(asker)
            print(f"{turn + 1}  {words:<12} {rate:>8,.0f}/s   {median:>6.0f} µs  {worst:>6.0f} µs", flush=True)
    for nc in (admin, planner, host, person):
        await nc.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder) / "nats")
        authority = Authority.create(Path(folder) / "auth")
        for role, name in (
            (Role.ADMIN, "admin"),
            (Role.PLANNER, "planner"),
            (Role.COLLECTOR, "node-7"),
            (Role.VIEWER, "vera"),
        ):
            authority.add(role, name)
        server.include = authority.config
        server.start()
        try:
            uvloop.run(run(server, authority))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
