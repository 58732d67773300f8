"""Hundreds of clients against planners and a bus that are killed with -9 all the time: what is promised holds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import nats
import pytest
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.schemas import subjects
from nats.aio.client import Client
from support.elastic_model import (
    FLEX,
    FLEX_DEVICES,
    FLEX_MODEL,
    GROW,
    GROW_DEVICES,
    GROW_MODEL,
    ElasticHistory,
    check_elastic,
    crowd_of,
)
from support.groups_model import (
    MODEL,
    OWNERS,
    POOL,
    POOL_DEVICES,
    PRICE,
    GroupClient,
    GroupHistory,
    check_groups,
    configured,
)
from support.planner_model import (
    CPUS,
    ENDS,
    RECOVERY_SECONDS,
    History,
    RandomBooker,
    RandomClient,
    check,
    close,
    connect_clients,
    stamp,
)
from support.planner_rig import GIB, FakeHosts, PlannerProcess, ask, lease_events, persist, stream, until_ready
from support.queue_model import (
    OVERDUE_SECONDS,
    SILENCE_SECONDS,
    SLACK_SECONDS,
    SLOTS,
    Blocker,
    Outage,
    QueueHistory,
    StoredEntries,
    WaitingClient,
    ask_and_go,
    check_queue,
    left_over,
    left_silent,
    request_events,
    seconds_away,
    watch_outages,
)
from support.stalling_proxy import StallingProxy

ROUNDS_MOST = 6
CALM_SECONDS = 8.0
USAGE_SECONDS = 3.0


async def torment(
    server: EmbeddedServer,
    planners: list[PlannerProcess],
    proxy: StallingProxy,
    outages: list[Outage],
    rng: random.Random,
    until: float,
    pause: float,
) -> list[str]:
    """Kill, pause, cut off and restart until a time; everything is up again afterwards."""
    done: list[str] = []
    while time.time() < until:
        # Elastic leases change in calm times: they are offered devices while nobody waits for them.
        await asyncio.sleep(rng.uniform(0.3, pause if rng.random() < 0.5 else 4 * pause))
        dice = rng.random()
        began = time.time()
        if dice < 0.25:
            done.append("bus killed")
            server.kill()
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            server.start()
        elif dice < 0.4:
            done.append("planner paused")
            planner = rng.choice(planners)
            planner.pause(True)
            await asyncio.sleep(rng.uniform(1.0, 4.5))
            planner.pause(False)
        elif dice < 0.55:
            done.append("planner cut off")
            await proxy.stall(rng.uniform(1.0, 4.5), cut=rng.random() < 0.5)
        else:
            done.append("planner killed")
            planner = rng.choice(planners)
            planner.kill()
            await asyncio.sleep(rng.uniform(0.0, 0.8))
            planner.start()
        outages.append(Outage(began, time.time()))
    return done


def waiting_clients(
    connections: list[Client], histories: tuple[History, QueueHistory], entries: StoredEntries, rng: random.Random
) -> list[WaitingClient]:
    """Some that wait for one slot with several requests each, and one with long work among many with short work."""
    kinds = [(f"racer{number}", SLOTS[0], None, 3) for number in range(3)]
    kinds += [(f"short{number}", SLOTS[1], 1.0, 1) for number in range(5)]
    kinds.append(("long", SLOTS[1], 1e6, 1))
    return [
        WaitingClient(
            connections[number % len(connections)],
            name,
            histories,
            entries,
            rng.getrandbits(32),
            slot=slot,
            expected_seconds=expected_seconds,
            at_once=at_once,
        )
        for number, (name, slot, expected_seconds, at_once) in enumerate(kinds)
    ]


async def leave_one_by_one(
    url: str, name: str, waits: QueueHistory, entries: StoredEntries, rng: random.Random, until: float
) -> None:
    """Clients that ask and go away while they wait."""
    going: list[asyncio.Task[None]] = []
    while time.time() < until:
        slot = SLOTS[len(going) % len(SLOTS)]
        one = ask_and_go(url, f"{name}-{len(going)}", waits, entries, slot, rng.uniform(0.0, 2.0))
        going.append(asyncio.create_task(one))
        await asyncio.sleep(rng.uniform(3.0, 9.0))
    await asyncio.gather(*going)


def in_order(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events by their times, each end behind the other events of its lease.

    One that was lost with the bus is sent again, and is behind later ones of its lease on the stream. The time of an
    end is when it was due: another change may have been written first.
    """
    last: dict[str, float] = {}
    for event in events:
        lease_id = event["lease"]["lease_id"]
        last[lease_id] = max(last.get(lease_id, 0.0), stamp(event["time"]))
    return sorted(
        events,
        key=lambda event: (last[event["lease"]["lease_id"]], 1) if event["kind"] in ENDS else (stamp(event["time"]), 0),
    )


async def ask_usage(nc: Client, groups: GroupHistory) -> None:
    """Ask for the use of groups, again and again, for ever."""
    while True:
        await asyncio.sleep(USAGE_SECONDS)
        asked_at = time.time()
        with contextlib.suppress(nats.errors.Error, OSError):
            answer = await ask(nc, "groups", {}, timeout=1.0)
            if answer["type"] == "groups":
                groups.usage.append((asked_at, time.time(), answer))


async def model_check(
    server: EmbeddedServer, folder: Path, *, clients: int, seconds: float, seed: int, to_the_end: bool
) -> None:
    rng = random.Random(seed)
    nc, *rest = connections = await connect_clients(server.url, 9)
    await ensure_layout(nc.jetstream())
    hosts = FakeHosts(nc, hosts=6, devices=4)
    slots = FakeHosts(nc, hosts=len(SLOTS), devices=1, prefix="slot")
    pool = FakeHosts(nc, hosts=len(POOL), devices=POOL_DEVICES, prefix="pool", model=MODEL)
    flex = FakeHosts(nc, hosts=len(FLEX), devices=FLEX_DEVICES, prefix="flex", model=FLEX_MODEL)
    grow = FakeHosts(nc, hosts=len(GROW), devices=GROW_DEVICES, prefix="grow", model=GROW_MODEL)
    for each in (hosts, slots, pool, flex, grow):
        await each.start()
    proxy = StallingProxy(server.port)
    await proxy.start()
    settings = {"stale_after_seconds": 60, "silence_seconds": SILENCE_SECONDS, "overdue_seconds": OVERDUE_SECONDS}
    planners = [
        PlannerProcess(url, folder / f"planner{number}.log", json.dumps(settings))
        for number, url in enumerate((proxy.url, server.url))
    ]
    history, waits, groups, elastic = History(), QueueHistory(), GroupHistory(), ElasticHistory()
    entries = StoredEntries(nc)
    await entries.start()
    try:
        for planner in planners:
            planner.start()
        await until_ready(nc, 34 + len(FLEX) * FLEX_DEVICES + GROW_DEVICES)
        assert (await persist(nc, "set_groups", {"replace": configured()}))["type"] == "groups"
        groups.set_at = time.time()
        crowd = [
            RandomClient(rest[number % len(rest)], f"c{number}", history, rng.getrandbits(32))
            for number in range(clients)
        ]
        queue = waiting_clients(rest, (history, waits), entries, rng)
        crowd.append(RandomBooker(rest[0], "booker", history, rng.getrandbits(32)))
        crowd += crowd_of(rest, (history, elastic), flex.devices, rng)
        members = [
            GroupClient(rest[number % len(rest)], owner, (history, groups), entries, rng.getrandbits(32))
            for number, owner in enumerate(OWNERS)
        ]
        watching = [
            asyncio.create_task(each) for each in (watch_outages(nc, waits.outages), ask_usage(rest[0], groups))
        ]
        done: list[str] = []
        # Faults can take most of a short round, and more of it on a slow machine: then there is another.
        for turn in range(ROUNDS_MOST):
            until = time.time() + seconds
            faults = asyncio.create_task(torment(server, planners, proxy, waits.outages, rng, until, pause=2.0))
            gone = asyncio.create_task(leave_one_by_one(server.url, f"gone{turn}", waits, entries, rng, until))
            # Guarantees are due within a time that leaves out faults: so there is some without any.
            lending = [asyncio.create_task(member.run(until + CALM_SECONDS)) for member in members]
            await asyncio.gather(*(client.run(until) for client in [*crowd, *queue]))
            await gone
            done += await faults
            asked_at = time.time()
            answer = await persist(nc, "groups", {})
            groups.usage.append((asked_at, time.time(), answer))
            await asyncio.gather(*lending)
            if history.granted() > clients and history.windows:
                break
        active = (await persist(nc, "leases", {}))["leases"]
        # Whoever was forgotten ends in time; then nothing is held, and nothing is left to tell.
        deadline = time.time() + (25 if to_the_end else 0)
        while active and time.time() < deadline:
            await asyncio.sleep(0.25)
            active = (await persist(nc, "leases", {}))["leases"]
        left = await left_over(nc, 3 * SILENCE_SECONDS)
        await asyncio.sleep(1.0)
        for each in watching:
            each.cancel()
        for planner in planners:
            planner.stop()
        bucket = [json.loads(kept.data) async for kept in stream(nc, f"KV_{subjects.PLANNER_BUCKET}", "$KV.*.lease.*")]
        active = [record["lease"] for record in bucket if record["lease"]["state"] == "active"]
        events = in_order([event for _, event in await lease_events(nc)])

        def disturbed(since: float, until: float) -> bool:
            return seconds_away(waits.outages, since, until, RECOVERY_SECONDS) > 0

        wrong = check(history, events, active, left=elastic.left, disturbed=disturbed)
        ends = await request_events(nc)
        wrong += check_queue(waits, events, ends, left)
        wrong += check_elastic(elastic, events, active, waits.outages)
        devices = 26 + len(FLEX) * FLEX_DEVICES + GROW_DEVICES + len(POOL) * POOL_DEVICES * PRICE
        count = 6 + len(SLOTS) + len(POOL) + len(FLEX) + len(GROW)
        wrong += check_groups(
            groups, events, waits.outages, (devices, count * CPUS, count * 512.0 * GIB), left_silent(ends)
        )
        (folder / "history.json").write_text(
            json.dumps(
                {
                    "wrong": wrong,
                    "answers": history.answers,
                    "windows": history.windows,
                    "events": events,
                    "outages": [[one.since, one.until] for one in waits.outages],
                    "asked": {name: dataclasses.asdict(one) for name, one in (groups.asked | waits.asked).items()},
                    "left_silent": left_silent(ends),
                }
            )
        )
        assert not wrong, f"seed {seed}, {done}: {len(wrong)} problems, such as {wrong[:5]} (see {folder})"
        assert not (to_the_end and active)
        assert history.windows, "no window was booked: the check says little"
        granted = history.granted()
        assert granted > clients, f"only {granted} grants: the check says little"
        print(
            f"seed {seed}: {len(history.answers)} requests, {granted} grants, {len(events)} events, "
            f"{len(history.windows)} windows, {len(done)} faults, {dict(history.errors)}, "
            f"{sum(event['kind'] == 'preempting' for event in events)} notices for "
            f"{len({event['lease']['preemption']['claimant'] for event in events if event['kind'] == 'preempting'})}, "
            f"{sum(event['lease']['owner'] in OWNERS for event in events if event['kind'] == 'granted')} grants to "
            f"groups, {len(groups.usage)} times asked for usage, "
            f"{sum(event['kind'].startswith('resize_') for event in events)} notices of a resize, "
            f"{sum(event['kind'] == 'resized' for event in events)} resizes, {len(elastic.closed)} times closed, "
            f"{len(waits.asked)} in the queue, {sum(one.excused for one in waits.asked.values())} of them unheard"
        )
    except (TimeoutError, subprocess.TimeoutExpired):
        (folder / "bus.json").write_text(json.dumps(await bus_state(nc)))
        for planner in planners:
            planner.print_stacks()
        raise
    finally:
        for planner in planners:
            planner.kill()
        for each in (hosts, slots, pool, flex, grow):
            await each.stop()
        await proxy.stop()
        await close(connections)


async def bus_state(nc: Client) -> dict[str, Any]:
    """What JetStream says of itself, and who answers pings, for the diagnosis of what hangs."""
    found: dict[str, Any] = {}
    for subject in ("$JS.API.INFO", "$JS.API.STREAM.INFO.KV_corral_planner", "$SRV.STATS.corral_planner"):
        try:
            found[subject] = json.loads((await nc.request(subject, b"", timeout=5.0)).data)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            found[subject] = repr(error)
    found["tcp"] = await asyncio.to_thread(lambda: Path("/proc/net/tcp").read_text().splitlines())
    return found


def seed() -> int:
    """Another one each time; it is in the message of a failure."""
    return int(os.environ.get("CORRAL_MODEL_CHECK_SEED", 0)) or random.SystemRandom().getrandbits(32)


@pytest.mark.long
async def test_model_check_in_seconds(server: EmbeddedServer, tmp_path: Path) -> None:
    await model_check(server, tmp_path, clients=80, seconds=5, seed=seed(), to_the_end=False)


@pytest.mark.slow
@pytest.mark.timeout(0)
async def test_model_check_in_minutes(server: EmbeddedServer, tmp_path: Path) -> None:
    seconds = float(os.environ.get("CORRAL_MODEL_CHECK_SECONDS", "180"))
    clients = int(os.environ.get("CORRAL_MODEL_CHECK_CLIENTS", "300"))
    await model_check(server, tmp_path, clients=clients, seconds=seconds, seed=seed(), to_the_end=True)


@pytest.mark.long
async def test_nothing_is_granted_to_a_client_that_has_gone(server: EmbeddedServer, tmp_path: Path) -> None:
    """A device comes free for a client that is in the queue, and has been gone for longer than it may be."""
    silence_seconds = 6 * SLACK_SECONDS
    nc, own = connections = await connect_clients(server.url, 2)
    await ensure_layout(nc.jetstream())
    slots = FakeHosts(nc, hosts=1, devices=1, prefix="slot")
    await slots.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log", json.dumps({"silence_seconds": silence_seconds}))
    history, waits, entries = History(), QueueHistory(), StoredEntries(nc)
    await entries.start()
    try:
        planner.start()
        await until_ready(nc, 1)
        blocker = Blocker(own, "blocker", (history, waits), entries, seed(), silence_seconds)
        for _ in range(2):
            await blocker.live_once(math.inf)
        left = await left_over(nc, 2 * silence_seconds)
        events = [event for _, event in await lease_events(nc)]
        assert check_queue(waits, events, await request_events(nc), left, silence_seconds) == []
        assert len(waits.asked) == 2
    finally:
        planner.kill()
        await slots.stop()
        await close(connections)
