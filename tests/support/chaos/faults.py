"""The faults: each breaks a cluster that has load on it, and says what it did."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import nats
from corral.schemas import codec, subjects
from support.chaos.load import Account
from support.chaos.messages import FROZEN, another_version, batch, inventory, poison, requests
from support.chaos.parts import faketime, partition
from support.chaos.world import HOSTS, World, world

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
        account.what = "a host of GPUs is unplugged for 8 s, twice as long as the planner waits until it is lost"


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own, where it may be mounted (in this process's own mount namespace)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """Leave no room."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 65536)
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    return ballast


@fault(namespaces=True)
async def history_disk_full(folder: Path, account: Account, seconds: float) -> None:
    with small_disk(folder / "disk", 64) as disk:
        async with world(folder, account, history=disk / "history.duckdb") as made:
            ballast = fill(disk)
            # While nobody reads the history, messages wait up to 15 s for a transaction.
            deadline = time.monotonic() + 90
            while not (await made.load.status()).paused and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            if not (await made.load.status()).paused:
                account.wrong.append("the processor did not say that its disk is full")
            await asyncio.sleep(seconds)
            during = made.load.placement.outage(made.fault_at)
            if during > 2:
                account.wrong.append(f"placement stood still for {during:.1f} s meanwhile")
            ballast.unlink()
            account.what = f"no room on the history's disk for {seconds:g} s"


@fault(namespaces=True)
async def bus_disk_full(folder: Path, account: Account, seconds: float) -> None:
    """The server gives JetStream up on a full disk; with room again it has to be started anew."""
    with small_disk(folder / "disk", 64) as disk:
        async with world(folder, account, bus_store=[disk], bus_options="max_file_store: 8GB") as made:
            ballast = fill(disk)
            await asyncio.sleep(seconds)
            ballast.unlink()
            await asyncio.to_thread(made.bus.servers[0].stop)
            made.bus.servers[0].start()
            account.what = f"no room on the bus's disk for {seconds:g} s, then room and a restart of the server"


@fault()
async def clock_behind(folder: Path, account: Account, seconds: float) -> None:
    """The clock of one host is set back by an hour while it runs, and later put right: its samples are late."""
    await set_clock(folder, account, seconds, hours=-1)
    account.what = f"the clock of one host an hour behind for {seconds:g} s, then corrected"


@fault()
async def clock_ahead(folder: Path, account: Account, seconds: float) -> None:
    """The other way: what it sends meanwhile is set right."""
    await set_clock(folder, account, seconds, hours=1)
    account.what = f"the clock of one host an hour ahead for {seconds:g} s, then corrected"


async def set_clock(folder: Path, account: Account, seconds: float, *, hours: int) -> None:
    library = faketime()
    assert library is not None, "libfaketime is not installed (apt-get install libfaketime)"
    clock = folder / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
    }  # fmt: skip
    async with world(folder, account, clock=environment) as made:
        made.load.gone = {f"c1-{number + 1:04d}" for number in range(HOSTS)}
        for hours_off, pause in ((hours, seconds), (0, 2.0)):
            clock.write_text(f"{3600 * hours_off:+d}")
            await asyncio.sleep(pause)
            devices = json.loads((await made.load.nc.request("corral.v1.plan.fleet", b"", timeout=2)).data)
            if devices["usable_devices"] < 2 * HOSTS * 4:
                what = "while a clock is wrong" if hours_off else "once it is right again"
                account.wrong.append(f"only {devices['usable_devices']} devices are usable {what}")
        made.load.gone = set()


@fault()
async def collector_floods(folder: Path, account: Account, seconds: float) -> None:
    """A client publishes samples of a host as fast as it can."""
    async with world(folder, account) as made:
        nc = await nats.connect(made.bus.urls)
        # It does not wait for acknowledgements, and so is promised nothing.
        made.load.gone.add("flood")
        made.load.unnumbered.add("agent-flood")
        await nc.publish(subjects.inventory_subject("flood"), codec.encode(inventory("flood")))
        until, sent, now = time.monotonic() + seconds, 0, time.time_ns()
        while time.monotonic() < until:
            for _ in range(200):
                sent += 1
                message = batch("flood", sent, time_ns=now + sent * 1000)
                await nc.publish(subjects.samples_subject("flood"), codec.encode(message))
            await nc.flush()
        await nc.close()
        account.what = f"one client published {sent:,} messages of a host in {seconds:g} s"


@fault()
async def slow_consumer(folder: Path, account: Account, seconds: float) -> None:
    """A subscriber of everything stops to read, and the processor is frozen."""
    async with world(folder, account) as made:
        code = (
            "import asyncio, nats, sys\nasync def main():\n    nc = await nats.connect(sys.argv[1])\n"
            "    await nc.subscribe('>')\n    await asyncio.Event().wait()\nasyncio.run(main())"
        )
        reader = subprocess.Popen([sys.executable, "-c", code, made.bus.urls[0]])  # noqa: ASYNC220
        try:
            await asyncio.sleep(1)
            os.kill(reader.pid, 19)
            made.processor.pause(True)
            await asyncio.sleep(seconds)
            made.processor.pause(False)
        finally:
            reader.kill()
            reader.wait()
        account.what = f"a subscriber of all subjects and the processor are frozen for {seconds:g} s"


@fault()
async def poison_messages(folder: Path, account: Account, seconds: float) -> None:
    async with world(folder, account) as made:
        made.load.broken.add("bad")
        made.load.gone |= {"bad", "someone-else"}
        nc = await nats.connect(made.bus.urls)
        until, sent = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            for subject, payload in poison():
                await nc.publish(subject, payload)
                sent += 1
            for body in requests():
                await nc.publish("corral.v1.plan.request", body, reply=nc.new_inbox())
                await nc.publish(subjects.QUERY, body, reply=nc.new_inbox())
            await nc.flush()
            await asyncio.sleep(0.3)
        status = await made.load.status()
        if not status.dead_letters:
            account.wrong.append("nothing became a dead letter")
        await nc.close()
        account.what = f"{sent} malformed messages, on every subject"


@fault()
async def duplicates_and_disorder(folder: Path, account: Account, seconds: float) -> None:
    """Each message twice or thrice, without the id by which the stream would know it, and out of order."""
    async with world(folder, account) as made:
        js = made.load.nc.jetstream()
        await js.publish(subjects.inventory_subject("again"), codec.encode(inventory("again")))
        made_at = time.time_ns() - 60 * 10**9
        waiting = list(range(1, int(40 * seconds) + 1))
        made.load.gone.add("again")
        while waiting:
            window, waiting = waiting[:30], waiting[30:]
            window += made.random.choices(window, k=20)
            made.random.shuffle(window)
            for number in window:
                message = batch("again", number, time_ns=made_at + number * 10**6)
                await js.publish(subjects.samples_subject("again"), codec.encode(message))
        account.what = "messages repeated without an id, and shuffled 30 at a time"


@fault()
async def versions_side_by_side(folder: Path, account: Account, seconds: float) -> None:
    """Collectors of an earlier and of a later version beside those of this one."""
    async with world(folder, account) as made:
        js = made.load.nc.jetstream()
        made.load.gone |= {"old", "new", "frozen"}
        for path in sorted(FROZEN.glob("*.msgpack")):
            kind = path.stem.partition("-")[2]
            await js.publish(f"{subjects.PREFIX}.{kind}.frozen", path.read_bytes())
        for host in ("old", "new"):
            await js.publish(subjects.inventory_subject(host), codec.encode(inventory(host)))
        start = time.time_ns()
        for number in range(1, int(10 * seconds) + 1):
            for host in ("old", "new"):
                message = batch(host, number, time_ns=start + number * 10**6)
                await js.publish(subjects.samples_subject(host), another_version(message, newer=host == "new"))
            await asyncio.sleep(0.1)
        await made.load.until_served()
        [[found]] = await made.load.rows(
            "SELECT count(DISTINCT host) FROM samples WHERE host IN ('old', 'new', 'frozen')", 5
        )
        if found != 3:
            account.wrong.append(f"only {found} of the three other versions are in the history")
        usable = json.loads((await made.load.nc.request("corral.v1.plan.devices", b'{"hosts": ["old", "new"]}')).data)
        if sum(not device.get("why_not") for device in usable["devices"]) != 8:
            account.wrong.append("devices of the other versions take no work")
        account.what = "messages of the first version, with more and fewer fields, together with this version's"


@fault()
async def planners_stopped(folder: Path, account: Account, seconds: float) -> None:
    async with world(folder, account) as made:
        began = time.monotonic()
        for planner in made.planners:
            planner.kill()
        await asyncio.sleep(seconds)
        during = made.load.records.outage(began)
        for planner in made.planners:
            planner.start()
        if during > seconds / 2:
            account.wrong.append(f"the history stood still for {during:.1f} s while there was no planner")
        account.what = f"no planner for {seconds:g} s"


@fault()
async def history_file_spoilt(folder: Path, account: Account, seconds: float) -> None:
    """The processor is killed, and its file comes back with a block that is not what was written."""
    async with world(folder, account) as made:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(made.processor.stop)
        size = made.db.stat().st_size
        with made.db.open("r+b") as file:
            for at in range(3 * 4096 + 131_072, size, 262_144):
                file.seek(at)
                found = file.read(64)
                file.seek(at)
                file.write(bytes((byte + 37 * number + 11) % 256 for number, byte in enumerate(found)))
        made.processor.start()
        await made.load.until_served()
        if not list(made.db.parent.glob("*.damaged-*")):
            account.wrong.append("the damage was not found")
        account.what = "every block of the history's file is corrupted: it is set aside, and rebuilt from the streams"
