"""The faults: each breaks a cluster that has load on it, and says what it did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from chaos_load import Account
from chaos_parts import partition
from chaos_world import HOSTS, World, world

Fault = Callable[[Path, Account, float], Awaitable[None]]

FAULTS: dict[str, Fault] = {}
NEEDS_NAMESPACES: set[str] = set()


def fault(*, namespaces: bool = False) -> Callable[[Fault], Fault]:
    """Enter a fault by its function's name."""

    def enter(function: Fault) -> Fault:
        name = function.__name__
        FAULTS[name] = function
        if namespaces:
            NEEDS_NAMESPACES.add(name)
        return function

    return enter


async def kill_at_random(made: World, seconds: float) -> int:
    """Kill -9 a part at random, again and again, and start it again."""
    until, kills = time.monotonic() + seconds, 0
    victims = [*made.bus.servers, *made.parts]
    made.random.shuffle(victims)
    while time.monotonic() < until or kills < len(victims):
        victim = victims[kills % len(victims)]
        victim.kill()
        await asyncio.sleep(made.random.uniform(0.0, 0.5))
        victim.start()
        await asyncio.sleep(made.random.uniform(0.5, 1.5))
        kills += 1
    return kills


@fault()
async def processes_killed(folder: Path, account: Account, seconds: float) -> None:
    async with world(folder, account) as made:
        kills = await kill_at_random(made, seconds)
        account.what = f"kill -9 of each process in turn, {kills} times"


@fault()
async def server_lost(folder: Path, account: Account, seconds: float) -> None:
    async with world(folder, account, servers=3) as made:
        victim = made.bus.servers[0]
        victim.kill()
        await asyncio.sleep(seconds)
        victim.start()
        await asyncio.sleep(2)
        account.what = f"kill -9 of one NATS server of three for {seconds:g} s"


@fault()
async def server_disk_lost(folder: Path, account: Account, seconds: float) -> None:
    async with world(folder, account, servers=3) as made:
        made.bus.servers[1].kill()
        made.bus.forget(1)
        await asyncio.sleep(seconds / 2)
        made.bus.servers[1].start()
        await asyncio.sleep(seconds / 2)
        # What came back empty has all of it again: another one may go.
        made.bus.servers[2].kill()
        await asyncio.sleep(seconds / 2)
        made.bus.servers[2].start()
        account.what = "one NATS server of three comes back without its disk, then another one is killed"


@fault()
async def servers_restarted(folder: Path, account: Account, seconds: float) -> None:
    async with world(folder, account, servers=3) as made:
        for server in made.bus.servers:
            await asyncio.to_thread(server.stop)
            server.start()
            await asyncio.sleep(seconds / 2)
        account.what = "each NATS server of three restarted in turn"


@fault(namespaces=True)
async def network_cut(folder: Path, account: Account, seconds: float) -> None:
    """Every pair of parts that talk, one pair after the other."""
    async with world(folder, account, servers=3, spread=True) as made:
        servers = [made.host(server) for server in made.bus.servers]
        pairs = [
            ([made.host(made.collectors[0])], servers),
            ([made.host(made.processor)], servers),
            ([made.host(planner) for planner in made.planners[:1]], servers),
            ([servers[0]], servers[1:]),
        ]
        for some, others in pairs:
            partition(some, others, True)
            await asyncio.sleep(seconds)
            partition(some, others, False)
            await made.load.until_served()
        account.what = (
            f"no packets for {seconds:g} s between the servers and a collector, the processor, a planner, "
            "and between one server and the other two, in turn"
        )


@fault(namespaces=True)
async def host_vanishes(folder: Path, account: Account, seconds: float) -> None:
    """A host of GPUs is unplugged for longer than the planner waits for it."""
    async with world(folder, account, servers=1, spread=True, planner=("--lost-after", "4s")) as made:
        made.lost_hosts = {f"c0-{number + 1:04d}" for number in range(HOSTS)}
        made.host(made.collectors[0]).vanish(True)
        await asyncio.sleep(max(seconds, 8))
        made.host(made.collectors[0]).vanish(False)
        await asyncio.sleep(5)
        account.what = "a host of GPUs is unplugged for 8 s, twice as long as the planner waits for it"
