"""Hundreds of clients against planners and a bus that are killed with -9 all the time: what is promised holds."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import math
import os
import random
import subprocess
import time
from collections.abc import Sequence
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
    Answered,
    Claim,
    Closed,
    ElasticHistory,
    check_elastic,
    crowd_of,
)
from support.groups_model import (
    GUESTS,
    MODEL,
    OWNERS,
    POOL,
    POOL_DEVICES,
    PRICE,
    Claimed,
    GroupClient,
    GroupHistory,
    check_groups,
    configured,
)
from support.planner_model import (
    ABSENT_SECONDS,
    CPUS,
    ENDS,
    HEARD_SECONDS,
    RECOVERY_SECONDS,
    TRIES_MOST,
    History,
    Patience,
    RandomBooker,
    RandomClient,
    check,
    close,
    connect_clients,
    stamp,
    time_of,
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
        wrong += check_queue(waits, events, await request_events(nc), left)
        wrong += check_elastic(elastic, events, active, waits.outages)
        devices = 26 + len(FLEX) * FLEX_DEVICES + GROW_DEVICES + len(POOL) * POOL_DEVICES * PRICE
        count = 6 + len(SLOTS) + len(POOL) + len(FLEX) + len(GROW)
        wrong += check_groups(groups, events, waits.outages, (devices, count * CPUS, count * 512.0 * GIB))
        (folder / "history.json").write_text(
            json.dumps(
                {
                    "wrong": wrong,
                    "answers": history.answers,
                    "windows": history.windows,
                    "events": events,
                    "outages": [[one.since, one.until] for one in waits.outages],
                    "asked": {name: one.body for name, one in groups.asked.items()},
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


START = 1_800_000_000.0


def second_of(second: float) -> str:
    return time_of(START + second)


def lease(lease_id: str, since: int, until: int, **grant: Any) -> dict[str, Any]:
    return {
        "lease_id": lease_id,
        "owner": "ann",
        "request_id": f"r-{lease_id}",
        "granted_at": f"2026-01-01T00:00:{since:02d}Z",
        "expires_at": f"2026-01-01T00:00:{until:02d}Z",
        "ended_at": f"2026-01-01T00:00:{until:02d}Z",
        "grants": [{"host": "a", "device": "G1", "share": 1.0, **grant}],
    }


def test_the_checker_finds_what_it_looks_for() -> None:
    """A sound history passes; each of these lies is found."""

    def story() -> tuple[History, list[dict[str, Any]]]:
        history = History()
        events: list[dict[str, Any]] = []
        for one in (lease("l1", 1, 5), lease("l2", 5, 9)):
            history.answers[one["request_id"]].append({"type": "assignment", "lease": one})
            for kind, time_ in (("granted", one["granted_at"]), ("expired", one["ended_at"])):
                events.append({"kind": kind, "time": time_, "lease": one})
        return history, events

    assert check(*story(), active=[]) == []

    history, events = story()
    events.pop(0)
    assert any("missing" in problem for problem in check(history, events, []))
    history, events = story()
    events.append(copy.deepcopy(events[1]))
    assert any("told twice" in problem for problem in check(history, events, []))
    history, events = story()
    history.answers["r-l1"].append({"type": "rejection"})
    assert any("differ" in problem for problem in check(history, events, []))
    history, events = story()
    history.answers["r-l3"] = history.answers["r-l1"]
    assert any("granted to" in problem for problem in check(history, events, []))
    history, events = story()
    for event in events[2:]:
        event["lease"]["granted_at"] = "2026-01-01T00:00:04Z"
    assert any("share of G1" in problem for problem in check(history, events, []))
    for event in events:
        event["lease"]["grants"][0].update(share=0.5, memory_bytes=60 * 2**30)
    assert any("memory of G1" in problem for problem in check(history, events, []))
    history, events = story()
    times = {
        "starts_at": "2026-01-01T00:00:06Z",
        "ends_at": "2026-01-01T00:00:08Z",
        "booked_at": "2026-01-01T00:00:00Z",
        "devices": ["G1"],
    }
    history.windows = [{"window_id": "w", "owners": ["ann"], **times}]
    assert check(history, events, []) == []
    history.windows[0]["owners"] = ["ben"]
    assert any("in the way" in problem for problem in check(history, events, []))
    history.windows.append({"window_id": "v", "owners": ["ben"], **times})
    assert any("booked for v and w" in problem for problem in check(history, events, []))
    history, events = story()
    history.unanswered.append("request r-l3")
    assert check(history, events, []) == ["request r-l3 was never answered"]
    history, events = story()
    assert any("listed" in problem for problem in check(history, events[:-1], []))


def test_who_finds_nobody_there_has_not_been_left_without_an_answer() -> None:
    """Planners that all start anew are waited for; none that hears, and none that never comes, gets away with it."""

    def tries(count: int, seconds: float, *, heard: bool, since: Patience | None = None) -> tuple[Patience, bool]:
        patience = since or Patience(0.0)
        over = [patience.over(patience.looked_at + seconds, heard) for _ in range(count)]
        return patience, any(over)

    away, over = tries(TRIES_MOST + 10, 0.12, heard=False)
    assert not over
    assert not tries(TRIES_MOST - 1, 1.6, heard=True, since=away)[1]
    assert tries(1, 1.6, heard=True, since=away)[1]
    # One that says `unavailable` at once may have its reasons for longer than so many tries take.
    assert not tries(TRIES_MOST + 10, 0.12, heard=True)[1]
    assert tries(math.ceil(HEARD_SECONDS / 0.12) + 1, 0.12, heard=True)[1]
    assert tries(math.ceil(ABSENT_SECONDS / 0.12) + 1, 0.12, heard=False)[1]


def test_the_checker_of_groups_finds_what_it_looks_for() -> None:
    """A sound story of a claim passes; each of these lies is found."""

    def event(kind: str, second: float, lease: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"kind": kind, "time": second_of(second), "lease": {**lease, **fields}}

    def held(lease_id: str, owner: str, since: float, device: int, **fields: Any) -> dict[str, Any]:
        lease = {
            "lease_id": lease_id,
            "owner": owner,
            "request_id": f"r-{lease_id}",
            "granted_at": second_of(since),
            "grants": [{"host": POOL[0], "device": f"GPU-{POOL[0]}-{device}"}],
            "preemptible": True,
            "grace_seconds": 2,
            "min_run_seconds": 1,
            "saved_at": None,
            "preemption": None,
            "state": "active",
        }
        return {**lease, **fields}

    def story(
        notified: float = 20,
        noticed: float = 22,
        started: float = 22,
        victims: int = 1,
        claim: dict[str, Any] | None = None,
        usage: float | None = None,
        **victim: Any,
    ) -> list[str]:
        guests = [held(f"g{at}", f"guest{at}", 2, at, **victim) for at in range(4)]
        notice = {"notified_at": second_of(notified), "claimant": "r-v", "claimant_owner": "vision0"}
        ended = {"preemption": notice, "state": "evicted", "ended_at": second_of(noticed)}
        events = [event("granted", 2, guest) for guest in guests]
        events += [event("preempting", notified, guest, preemption=notice) for guest in guests[:victims]]
        events += [event("evicted", noticed, guest, **ended) for guest in guests[:victims]]
        events += [event("granted", started, held("v", "vision0", started, 0))]
        events += [event("released", 40, guest, state="released", ended_at=second_of(40)) for guest in guests[victims:]]
        body = {"owner": "vision0", "hosts": ["pool0"], "gpus": 1, **(claim or {})}
        groups = GroupHistory({"r-v": Claimed(body, START + 19, START + 19, START + started)}, [], START)
        if usage is not None:
            answer = {"groups": [{"group": {"name": GUESTS}, "usage": usage}]}
            groups.usage = [(START + 22, START + 22, answer)]
        return check_groups(groups, events, [], (8.0, 64.0, 1.0))

    assert story(usage=1.0) == []
    assert any("usage: guests" in one for one in story(usage=0.98))
    assert any("gave way" in one for one in story(notified=28, noticed=30, started=30))
    two = [{"host": POOL[0], "device": "d"}, {"host": POOL[0], "device": "e"}]
    assert any("limit: guests" in one for one in story(grants=two))
    assert any("not preemptible" in one for one in story(preemptible=False))
    assert any("s after its grant" in one for one in story(min_run_seconds=18.5))
    assert any("s after its notice" in one for one in story(grace_seconds=3))
    assert any("did not wait" in one for one in story(notified=18))
    assert any("nobody asked" in one for one in story(claim={"owner": "ops0"}))
    assert any("cascade" in one for one in story(claim={"requeue_of": "x"}))
    assert any("beyond its guarantee" in one for one in story(claim={"gpus": 6}))
    assert any("had gone" in one for one in story(noticed=30))
    assert any("may use" in one for one in story(claim={"hosts": ["pool1"]}))
    assert any("not enough" in one for one in story(claim={"gpus": 2}))
    assert any("is not needed" in one for one in story(victims=2))


def test_the_checker_of_elastic_leases_windows_and_drains_finds_what_it_looks_for() -> None:
    """A sound story of an offer and of a request to give back passes; each of these lies is found."""
    owners = {"owner": "ann", "preemptible": False, "grace_seconds": 1, "preemption": None, "ends_at": None}

    def notice(number: int, kind: str, second: float, devices: str) -> dict[str, Any]:
        ends = {"notified_at": second_of(second), "ends_at": second_of(second + 30)}
        grants = [{"host": "flex0", "device": device} for device in devices]
        return {"number": number, "kind": kind, "grants": grants, "claimant": "r-ben", **ends}

    def story(
        accepts: Sequence[float] = (4.0, 8.0),
        named: str = "",
        grown: str = "abc",
        returned: str = "c",
        asked: str = "c",
        limits: tuple[int, int] = (1, 3),
        claimed: float | None = None,
        closed: Closed | None = None,
        reply: str = "ab",
        other: float = 9.0,
        **fields: Any,
    ) -> list[str]:
        lease: dict[str, Any] = {
            "lease_id": "l1",
            "request_id": "r-ann",
            "granted_at": second_of(1),
            **owners,
            **fields,
        }
        lease["elastic"] = {"min": limits[0], "max": limits[1]}
        events: list[dict[str, Any]] = []

        def tell(kind: str, second: float, devices: str, resize: dict[str, Any] | None = None, **rest: Any) -> None:
            now = {**lease, "grants": [{"host": "flex0", "device": device} for device in devices], "resize": resize}
            back = [{"host": "flex0", "device": device} for device in rest.pop("returned", "")]
            events.append({"kind": kind, "time": second_of(second), "lease": {**now, **rest}, "returned": back})

        tell("granted", 1, "ab")
        tell("resize_offered", 3, "ab", notice(2, "offer", 3, "c"))
        tell("resized", 5, grown)
        tell("resize_requested", 7, grown, notice(4, "request", 7, asked))
        tell("resized", 9, "ab", returned=returned)
        tell("released", 20, "ab", ended_at=second_of(20))
        ben = {**lease, **owners, "lease_id": "l2", "request_id": "r-ben", "elastic": None, "resize": None}
        ben |= {"granted_at": second_of(other), "grants": [{"host": "flex0", "device": "c"}], "owner": "ben"}
        events.append({"kind": "granted", "time": second_of(other), "lease": ben})
        ended = {**ben, "ended_at": second_of(12)}
        events.append({"kind": "released", "time": second_of(12), "lease": ended})
        numbers = zip((2, 4), accepts, (named, ""), strict=True)
        answered = [
            Answered({"lease_id": "l1", "number": number, **({"devices": list(some)} if some else {})}, START + at)
            for number, at, some in numbers
        ]
        answered[1].answered_at = START + 9.5
        grants = [{"host": "flex0", "device": device} for device in reply]
        answered[1].reply = {"type": "lease", "lease_id": "l1", "state": "active", "grants": grants}
        history = ElasticHistory({"r-ben": START + 6.0}, answered, [closed] if closed else [])
        if claimed is not None:
            times = {"starts_at": second_of(claimed), "ends_at": second_of(30), "booked_at": second_of(0)}
            history.claims.append(Claim({"devices": ["c"], **times}, "r-ben", START))
        return check_elastic(history, events, [], []) + check(History(), events, [])

    assert story() == []
    assert any("did not agree" in one for one in story(accepts=(6.0, 8.0)))
    assert any("did not agree" in one for one in story(named="d"))
    assert any("did not agree" in one for one in story(grown="abd"))
    assert any("leaves 3 devices" in one for one in story(limits=(1, 2)))
    assert any("in addition to" in one for one in story(limits=(1, 2)))
    assert any("has a device twice" in one for one in story(grown="abb"))
    assert any("and says" in one for one in story(returned=""))
    assert any("resize_requested" in one for one in story(limits=(3, 3)))
    assert any("of what l2 holds" in one for one in story(other=2.0))
    assert any("share of c" in one for one in story(other=8.0))
    assert any("no event has" in one for one in story(reply="a"))
    assert any("between" in one for one in story(closed=Closed({"c"}, START + 4.5, START + 5.5)))
    assert any("take no work" in one for one in story(closed=Closed({"c"}, START + 2.5, START + 3.5)))
    assert any("into maintenance" in one for one in story(closed=Closed({"c"}, START + 8, START + 9, START + 4)))
    assert any("being preempted" in one for one in story(preemption={}))
    assert story(claimed=7) == []
    assert any("after the begin" in one for one in story(claimed=5))
