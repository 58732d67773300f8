"""What is kept for requests that have waited longer than their patience, and what is not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

import corral.planner.fleet.fleet as fold
from corral.planner.broker.queue import QueuedRequest, WaitingQueue
from corral.planner.broker.reservations import Reservations, newcomer
from corral.planner.fleet.events import HostForgotten, HostLost, HostSeen
from corral.planner.fleet.reservation import Reservation
from corral.planner.fleet.reserved import reserve, unreserve
from corral.planner.fleet.state import ask_key
from corral.planner.placement.decide import Placed, Policies, decide, explain
from corral.planner.placement.reservations import choose
from corral.schemas.operations import Drains
from corral.schemas.requests import Grant, Placement, Rejection, RejectionCode, WorkRequest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.planner_world import GIB, NOW, fleet_of, inventories, inventory

WHY = Rejection(code=RejectionCode.NO_CAPACITY, message="full")
H100, A100, T4 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "Tesla T4"


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def never(_: str) -> float:
    return math.inf


def fits(fleet: fold.Fleet, request: WorkRequest) -> Placed | None:
    decision = decide(fleet, request, NOW, Policies())
    return decision if isinstance(decision, Placed) else None


def fill(fleet: fold.Fleet, asked: Iterable[WorkRequest], name: str) -> list[str]:
    """Lease to each what it asks for, where there is room."""
    made: list[str] = []
    for number, request in enumerate(asked):
        found = fits(fleet, request)
        if found is not None:
            made.append(f"{name}-{number}")
            fold.hold(fleet, made[-1], found.grants)
    return made


def free_all(fleet: fold.Fleet, leases: Iterable[str]) -> None:
    for lease in leases:
        fold.free(fleet, lease)


def kept_for(fleet: fold.Fleet, request: WorkRequest) -> Reservation | None:
    return choose(fleet, fleet.ask(ask_key(request)), request.owner, never)


def any_request(dice: Random) -> WorkRequest:
    """As `planner_world.requests`, of which a dozen an example take long to draw."""
    share = dice.choice([None, None, 0.1, 0.25, 0.333, 0.5])
    gpus = 1 if share is not None else dice.randint(0, 7)
    return WorkRequest(
        owner="me",
        gpus=gpus,
        gpu_share=share,
        gpu_memory_bytes=dice.choice([0, GIB, 15 * GIB, 40 * GIB, 80 * GIB]) if gpus else 0,
        cpus=dice.choice([0.0, 0.5, 3.3, 8.0] if gpus else [0.5, 1.0, 3.3, 8.0]),
        host_memory_bytes=dice.choice([0, 0, GIB, 20 * GIB]),
        models=dice.choice([[], [], ["*h100*"], ["*A100*", "tesla*"]]),
        hosts=dice.choice([[], [], ["h1"], ["h[02]"]]),
        host_labels=dice.choice([{}, {}, {"rack": "r1"}]),
        min_compute_capability=dice.choice([None, None, "8.0"]),
        placement=dice.choice(list(Placement)),
        policy="best-fit",
    )


dice = Random(7)
requests = st.sampled_from([any_request(dice) for _ in range(500)])
streams = st.lists(requests, max_size=10)


@unhurried
@given(inventories(), streams, requests, streams, st.sampled_from(["", "host:h0", "device:GPU-h1-0"]))
def test_who_waits_is_served_once_the_leases_before_it_end_whatever_comes_meanwhile(
    hosts: list[fold.Inventory], before: list[WorkRequest], waits: WorkRequest, stream: list[WorkRequest], drain: str
) -> None:
    """Also where those who come ask for cores alone, or for a share, or never give back. Nothing useless is kept."""
    fleet = fleet_of(*hosts)
    fold.apply(fleet, Drains(drains={drain: "disk"} if drain else {}))
    leases = fill(fleet, before, "before")
    assume(fits(fleet, waits) is None)
    states = {name: host.state for name, host in fleet.hosts.items()}
    kept = kept_for(fleet, waits)
    if kept is not None:
        assert len(kept.devices) == len({uuid for uuid, _, _ in kept.devices}) == waits.gpus
        assert sum(cpus for _, cpus, _ in kept.hosts) < waits.cpus * 1000 + 1 + len(kept.hosts)
        reserve(fleet, kept)
        fill(fleet, stream, "stream")
        unreserve(fleet, kept)
    free_all(fleet, leases)
    assert (kept is not None) == (fits(fleet, waits) is not None)
    if kept is not None:
        alone = replace(waits, gpus=1, cpus=0, host_memory_bytes=0, placement=Placement.SAME_HOST)
        free_all(fleet, list(fleet.leases))
        for uuid, _, _ in kept.devices:  # each could be taken by itself
            others = {f"device:{other}": "" for other in fleet.devices if other != uuid}
            fold.apply(fleet, Drains(drains=others | ({drain: ""} if drain else {})))
            assert fits(fleet, alone) is not None
    fold.apply(fleet, Drains(drains={drain: "disk"} if drain else {}))
    assert not fleet.reserved
    assert not fleet.reserved_hosts
    fill(fleet, before, "before")
    assert {name: host.state for name, host in fleet.hosts.items()} == states  # nothing of it stays


@unhurried
@given(inventories(), streams, requests, requests)
def test_whoever_fits_beside_a_reservation_is_granted(
    hosts: list[fold.Inventory], before: list[WorkRequest], waits: WorkRequest, comes: WorkRequest
) -> None:
    """A newcomer sees what is kept as it would see a lease of the same, and the rest as it is."""
    fleet = fleet_of(*hosts)
    fill(fleet, before, "before")
    assume(fits(fleet, waits) is None)
    kept = kept_for(fleet, waits)
    found = fits(fleet, comes)
    if kept is None:
        return
    reserve(fleet, kept)
    beside = fits(fleet, comes)
    told = explain(fleet, comes, NOW, Policies())
    assert (told.granted, told.grants) == (beside is not None, [] if beside is None else beside.grants)
    unreserve(fleet, kept)
    fold.hold(fleet, "kept", grants_of(fleet, kept))
    assert (fits(fleet, comes) is None) == (beside is None)
    if beside is None and found is not None:
        taken = {grant.device or grant.host for grant in found.grants}
        near = {uuid for uuid, _, _ in kept.devices} | {name for name, _, _ in kept.hosts}
        assert taken & near  # it is refused for what is kept, and for nothing else


def grants_of(fleet: fold.Fleet, kept: Reservation) -> list[Grant]:
    """A lease of what is kept."""
    found = [
        Grant(host=name, share=0.0, cpus=cpus / 1000, host_memory_bytes=memory) for name, cpus, memory in kept.hosts
    ]
    for uuid, share, memory in kept.devices:
        device = fleet.devices[uuid]
        found.append(
            Grant(
                host=device.host,
                device=uuid,
                share=share / 1000,
                memory_bytes=device.memory_free if share == 1000 else memory,
            )
        )
    return found


def waiting(queue: WaitingQueue, owner: str, **fields: object) -> QueuedRequest:
    request = WorkRequest(owner=owner, wait_seconds=1000, request_id=owner, **fields)  # pyright: ignore[reportArgumentType]
    return queue.add(request, NOW, WHY, None)


def turn(reservations: Reservations, queue: WaitingQueue, fleet: fold.Fleet, now: float = NOW + 30) -> None:
    """One look at those who wait, as the desk takes it."""
    reservations.begin(queue, now)
    for entry in queue:
        reservations.show(entry.order)
        reservations.renew(entry, fleet.ask(ask_key(entry.request)))
    reservations.show(newcomer(-1000))


def test_several_who_wait_keep_different_devices_in_their_order() -> None:
    """A higher priority is not held back; who leaves the line leaves nothing."""
    fleet = fleet_of(inventory("big", [H100] * 2), inventory("small", [T4] * 4))
    [lease] = fill(fleet, [WorkRequest(owner="x", gpus=2, models=["*h100*"])], "x")
    queue = WaitingQueue()
    reservations = Reservations(fleet, never)
    first, second, third = (waiting(queue, name, models=["*h100*"]) for name in ("a", "b", "c"))
    gone = waiting(queue, "d", gpus=5, priority=-1)  # more than a host has
    turn(reservations, queue, fleet, NOW + 29.9)
    assert len(reservations) == 0
    assert not fleet.reserved
    turn(reservations, queue, fleet)
    assert [e.reservation is not None for e in (first, second, third, gone)] == [True, True, False, False]
    assert {uuid for uuid, kept in fleet.reserved.items()} == {"GPU-big-0", "GPU-big-1"}
    anyone = WorkRequest(owner="e", gpus=4)
    assert fits(fleet, anyone) is not None  # all that none of them could take
    fold.free(fleet, lease)
    reservations.show(newcomer(0))
    wants = WorkRequest(owner="e", models=["*h100*"])
    told = explain(fleet, wants, NOW, Policies())
    assert not told.granted
    assert told.rejection is not None
    assert {reason.code: reason.devices for reason in told.rejection.reasons} == {"model": 4, "reserved": 2}
    assert "a, b" in told.rejection.message
    by_device = {verdict.device: verdict.reason for verdict in told.verdicts}
    assert {by_device["GPU-big-0"], by_device["GPU-big-1"]} == {
        f"reserved for {owner}, who has waited longer" for owner in "ab"
    }
    reservations.show(newcomer(1))
    assert fits(fleet, wants) is not None
    reservations.show(second.order)
    assert fits(fleet, replace(wants, gpus=2)) is None
    assert fits(fleet, wants) is not None
    for entry in (first, second):
        queue.remove(entry)
        reservations.drop(entry)
    turn(reservations, queue, fleet)
    assert third.reservation is not None
    assert len(reservations) == 1
    reservations.clear()
    assert not fleet.reserved
    assert fits(fleet, replace(wants, gpus=2)) is not None


def test_what_is_kept_prefers_idle_devices_and_hosts_with_few_leases_and_stays_where_it_is() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [H100] * 4, cpus=8) for n in range(3)))
    for host, count in (("h0", 3), ("h1", 1), ("h2", 2)):
        for n in range(count):
            fill(fleet, [WorkRequest(owner="x", hosts=[host])], f"{host}.{n}")
    wants = WorkRequest(owner="a", gpus=4)
    kept = kept_for(fleet, wants)
    assert kept is not None
    assert {name for name, _, _ in kept.hosts} == {"h1"}
    assert kept.busy == 1
    several = kept_for(fleet, replace(wants, gpus=7, placement=Placement.FEWEST_HOSTS))
    assert several is not None
    assert several.busy == 1
    spread = kept_for(fleet, replace(wants, gpus=3, placement=Placement.SPREAD))
    assert spread is not None
    assert spread.busy == 0
    fill(fleet, [WorkRequest(owner="x", hosts=["h1"])], "more")
    again = choose(fleet, fleet.ask(ask_key(wants)), "a", never, kept)
    assert again is not None
    assert again.hosts == kept.hosts
    ends = {"h1.0-0": 9.0, "more-0": 3.0, "h2.0-0": 5.0, "h2.1-0": 2.0}
    sooner = choose(fleet, fleet.ask(ask_key(wants)), "a", lambda lease: ends.get(lease, 10.0))
    assert sooner is not None
    assert sooner.hosts[0][0] == "h2"


def test_cores_are_kept_with_the_device_and_the_rest_of_the_host_is_not() -> None:
    fleet = fleet_of(inventory("h0", [H100] * 2, cpus=16))
    fill(fleet, [WorkRequest(owner="x", gpus=0, cpus=6)], "x")
    kept = kept_for(fleet, WorkRequest(owner="a", gpus=1, cpus=12))
    assert kept is not None
    assert kept.hosts == (("h0", 12_000, 0),)
    assert kept.busy == 1
    reserve(fleet, kept)
    assert fits(fleet, WorkRequest(owner="b", gpus=0, cpus=1)) is None
    assert fits(fleet, WorkRequest(owner="b", gpus=1)) is not None
    assert fits(fleet, WorkRequest(owner="b", gpus=2)) is None
    told = explain(fleet, WorkRequest(owner="b", gpus=0, cpus=1), NOW, Policies())
    assert "reserved for a" in told.hosts["h0"]
    assert " of a" in told.message
    fold.free(fleet, "x-0")
    assert fits(fleet, WorkRequest(owner="b", gpus=0, cpus=4)) is not None
    assert fits(fleet, WorkRequest(owner="b", gpus=0, cpus=4.1)) is None


names = st.sampled_from(["h0", "h1", "h2"])
changes = st.one_of(
    st.tuples(st.just("lost"), names),
    st.tuples(st.just("seen"), names),
    st.tuples(st.just("forgotten"), names),
    st.tuples(st.just("drained"), names),
    st.tuples(st.just("there"), names),
    st.tuples(st.just("leaves"), st.integers(0, 5)),
    st.tuples(st.just("comes"), requests, st.integers(-1, 1)),
    st.tuples(st.just("leased"), requests),
    st.tuples(st.just("ended"), st.integers(0, 5)),
    st.tuples(st.just("turn")),
    st.tuples(st.just("shown"), st.integers(-1, 1)),
)


@unhurried
@given(st.lists(changes, max_size=25))
def test_what_is_kept_follows_the_fleet_and_the_line_and_nothing_is_left(steps: list[tuple[object, ...]]) -> None:
    fleet = fleet_of(*(inventory(name, [H100, A100, T4], cpus=16) for name in ("h0", "h1", "h2")))
    queue = WaitingQueue()
    reservations = Reservations(fleet, never)
    time_ns = count = 1
    for what, *rest in steps:
        count += 1
        match what, rest:
            case "lost", [str(name)]:
                fold.apply(fleet, HostLost(name))
            case "seen", [str(name)]:
                fold.apply(fleet, HostSeen(name))
            case "forgotten", [str(name)]:
                fold.apply(fleet, HostForgotten(name))
            case "drained", [str(name)]:
                fold.apply(fleet, Drains(drains={} if fleet.drains else {f"host:{name}": "disk"}))
            case "there", [str(name)]:
                time_ns += 1
                fold.apply(fleet, inventory(name, [H100, T4], cpus=16, time_ns=time_ns))
            case "leaves", [int(at)]:
                for entry in list(queue)[at : at + 1]:
                    queue.remove(entry)
                    reservations.drop(entry)
            case "comes", [WorkRequest() as request, int(priority)]:
                if fits(fleet, request) is None:
                    queue.add(replace(request, priority=priority, wait_seconds=100.0), NOW, WHY, None)
            case "leased", [WorkRequest() as request]:
                reservations.show(newcomer(0))
                fill(fleet, [request], str(count))
            case "ended", [int(at)]:
                free_all(fleet, list(fleet.leases)[at : at + 1])
            case "shown", [int(priority)]:
                reservations.show(newcomer(priority))
                check_shown(fleet, queue, -priority)
            case _:
                turn(reservations, queue, fleet)
                check_shown(fleet, queue, 1000)
    turn(reservations, queue, fleet)
    turn(reservations, queue, fleet)
    for entry in queue:  # what could be served has something kept, and what is kept could be served
        if entry.reservation is not None:
            assert all(name in fleet.hosts for name, _, _ in entry.reservation.hosts)
    reservations.clear()
    assert not fleet.reserved
    assert not fleet.reserved_hosts
    states = {name: host.state for name, host in fleet.hosts.items()}
    for name in fleet.hosts:
        fold.reblock(fleet, name)
    assert {name: host.state for name, host in fleet.hosts.items()} == states


def check_shown(fleet: fold.Fleet, queue: WaitingQueue, most: float) -> None:
    """The fleet hides what is kept for those ahead of a place, and no more."""
    shares: dict[str, int] = {}
    cores: dict[str, int] = {}
    for entry in queue:
        if entry.reservation is not None and entry.order[0] <= most:
            for uuid, share, _ in entry.reservation.devices:
                shares[uuid] = shares.get(uuid, 0) + share
            for name, cpus, _ in entry.reservation.hosts:
                cores[name] = cores.get(name, 0) + cpus
    assert {uuid: kept.amount for uuid, kept in fleet.reserved.items()} == shares
    assert {name: kept.amount for name, kept in fleet.reserved_hosts.items()} == cores


@unhurried
@given(inventories(), streams, requests, st.permutations(["a", "b", "c"]))
def test_who_asks_makes_no_difference(
    hosts: list[fold.Inventory], before: list[WorkRequest], waits: WorkRequest, owners: list[str]
) -> None:
    """Equal requests in another order keep the same in all, and so do leases of another order."""

    def kept(names: list[str], leased: list[WorkRequest]) -> dict[str, int]:
        fleet = fleet_of(*hosts)
        for number, request in enumerate(leased):
            found = fits(fleet, request)
            if found is not None:
                fold.hold(fleet, f"x{number}", found.grants)
        for name in names:
            one = kept_for(fleet, replace(waits, owner=name))
            if one is not None:
                reserve(fleet, one)
        return {uuid: found.amount for uuid, found in sorted(fleet.reserved.items())}

    assert kept(["a", "b", "c"], before) == kept(owners, before)


def test_thousands_who_wait_cost_a_newcomer_next_to_nothing() -> None:
    """Counted, not timed: hosts whose state is looked at anew for one decision after the choices were made."""
    fleet = fleet_of(*(inventory(f"h{n:03d}", [H100] * 8) for n in range(40)))
    fill(fleet, [WorkRequest(owner="x", gpus=8)] * 40, "x")
    queue = WaitingQueue()
    reservations = Reservations(fleet, never)
    for n in range(1000):
        waiting(queue, f"w{n}", gpus=1 + n % 8, cpus=n % 3)
    for _ in range(5):
        turn(reservations, queue, fleet)
    assert 40 <= len(reservations) <= 256
    moves, order = fleet.index.moves_end, newcomer(0)
    for _ in range(5):
        reservations.show(order)
        assert fits(fleet, WorkRequest(owner="y")) is None
    assert fleet.index.moves_end == moves
