"""The core against a reference that looks at every device of every host, one by one, in plain words."""

from __future__ import annotations

from fnmatch import fnmatchcase
from math import ceil

import corral.planner.fleet.fleet as fold
import corral.planner.fleet.summary as view
import msgspec
import pytest
from corral.planner.fleet.state import ROUNDED_OFF_BYTES, UNLIMITED, WHOLE_SHARE, ask_key, share_of
from corral.planner.placement.capacity import CapacityTally, room_for
from corral.planner.placement.decide import Placed, Policies, decide, explain
from corral.planner.placement.exact import exact_state
from corral.planner.placement.feasible import candidates, capacity, excluded, has_part, part_most
from corral.planner.placement.policies import make
from corral.planner.placement.reject import could_ever_fit
from corral.schemas.operations import DeviceStatus, Drains
from corral.schemas.requests import Placement, Rejection, WorkRequest
from corral.schemas.telemetry import DeviceEvent, Inventory, Severity
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planner_world import GIB, MIB, NOW, inventories, inventory, processes, requests, samples

POLICIES = ("opportunity", "best-fit", "pack", "spread", "score", "random")


def usable(fleet: fold.Fleet, status: DeviceStatus, inventory: Inventory, request: WorkRequest) -> bool:
    """Whether one device could take one part of the request, from the public view of it."""
    info = next(device for device in inventory.devices if device.uuid == status.uuid)
    if not status.usable:
        return False
    if request.models and not any(fnmatchcase(info.name.lower(), glob.lower()) for glob in request.models):
        return False
    if request.vendors and info.vendor not in [vendor.lower() for vendor in request.vendors]:
        return False
    if request.min_compute_capability and (
        not info.compute_capability or float(info.compute_capability) < float(request.min_compute_capability)
    ):
        return False
    if request.gpu_share is None and (status.leases or (status.in_use and not request.allow_in_use)):
        return False
    if request.gpu_share is not None and status.share_free < request.gpu_share - 1e-9:
        return False
    if request.gpu_share is not None and not request.gpu_memory_bytes:
        # Its part of the memory, but for what the driver or a small stranger takes; in steps, as a decision sees it.
        seen = fleet.devices[status.uuid].state
        part = seen.memory_most * request.gpu_share
        slack = min(512 * MIB, part / 8) + (ROUNDED_OFF_BYTES if seen.rounded else 0)
        if abs(seen.memory_free - (part - slack)) > 2:
            return seen.memory_free > part - slack
        return has_part(seen, share_of(request.gpu_share))
    return status.memory_free_bytes >= request.gpu_memory_bytes


def memory(fleet: fold.Fleet, status: DeviceStatus, request: WorkRequest) -> int:
    """What is granted of a device's memory: all that is free, what was asked for, or what goes with a share."""
    if request.gpu_share is None:
        return status.memory_free_bytes
    device = fleet.devices[status.uuid]
    part = (device.memory_total - device.reserved) * share_of(request.gpu_share) // WHOLE_SHARE
    return request.gpu_memory_bytes or min(part, status.memory_free_bytes)


def rooms(fleet: fold.Fleet, world: dict[str, Inventory], request: WorkRequest) -> dict[str, int]:
    """How many of the request's devices each host could hold: the largest k whose part of everything is there."""
    found: dict[str, int] = {}
    statuses: dict[str, list[DeviceStatus]] = {}
    for status in view.devices(fleet, NOW):
        statuses.setdefault(status.host, []).append(status)
    for name, event in world.items():
        if request.hosts and not any(fnmatchcase(name, glob) for glob in request.hosts):
            continue
        if any(event.host.labels.get(key) != value for key, value in request.host_labels.items()):
            continue
        host = fleet.hosts[name]
        if host.blocked:
            continue
        held = [grants for lease in fleet.leases.values() for at, grants in lease.hosts.items() if at == name]
        cpus = event.host.cpus * 1000 - sum(part[0] for part in held) if event.host.cpus else UNLIMITED
        ram = event.host.memory_bytes - sum(part[1] for part in held) if event.host.memory_bytes else UNLIMITED
        able = sum(usable(fleet, status, event, request) for status in statuses.get(name, []))
        want = ceil(round(request.cpus * 1000, 6))
        room = -1
        for k in range(0 if not request.gpus else 1, min(able, request.gpus) + 1):
            total = max(1, request.gpus)
            part = k if request.gpus else 1
            if ceil(want * part / total) <= cpus and ceil(request.host_memory_bytes * part / total) <= ram:
                room = max(room, k)
        found[name] = room
    return found


def needs(found: dict[str, int], world: dict[str, Inventory], request: WorkRequest) -> int:
    """Number of hosts that the request needs, in one rack where it must, or would rather, stay in one; 0 for no fit."""
    racks: dict[str, dict[str, int]] = {}
    for name, room in found.items():
        if "rack" in world[name].host.labels:
            racks.setdefault(world[name].host.labels["rack"], {})[name] = room
    inside = min((hosts for rack in racks.values() if (hosts := fits(rack, request))), default=0)
    if several(request) and request.within:
        return inside
    return inside if several(request) and request.prefer_within and inside else fits(found, request)


def several(request: WorkRequest) -> bool:
    """Whether the request may be on several hosts."""
    return request.placement is not Placement.SAME_HOST and request.gpus > (request.gpus_per_host or 1)


def fits(found: dict[str, int], request: WorkRequest) -> int:
    """Number of hosts that the request needs at least, in any racks; 0 where it does not fit."""
    if not request.gpus:
        return 1 if any(room >= 0 for room in found.values()) else 0
    if request.placement is Placement.SPREAD and several(request):
        each = request.gpus_per_host or 1
        hosts = request.gpus // each
        return hosts if sum(room >= each for room in found.values()) >= hosts else 0
    if request.placement is Placement.FEWEST_HOSTS:
        left = request.gpus
        for hosts, room in enumerate(sorted((room for room in found.values() if room > 0), reverse=True), start=1):
            left -= room
            if left <= 0:
                return hosts
        return 0
    return 1 if any(room >= request.gpus for room in found.values()) else 0


def check_grants(fleet: fold.Fleet, world: dict[str, Inventory], request: WorkRequest, placed: Placed) -> None:
    found = rooms(fleet, world, request)
    per_host: dict[str, int] = {}
    seen: set[str] = set()
    for grant in placed.grants:
        assert grant.host in found
        per_host[grant.host] = per_host.get(grant.host, 0) + (1 if grant.device else 0)
        assert grant.score == pytest.approx(sum(grant.score_parts.values()))
        if not request.gpus:
            assert grant.device == ""
            continue
        assert grant.device not in seen
        seen.add(grant.device)
        status = next(s for s in view.devices(fleet, NOW) if s.uuid == grant.device)
        assert status.host == grant.host
        assert status.index == grant.index
        assert usable(fleet, status, world[grant.host], request)
        assert grant.memory_bytes == memory(fleet, status, request)
        assert grant.share == (1.0 if request.gpu_share is None else pytest.approx(request.gpu_share, abs=0.001))
    assert len(seen) == request.gpus
    assert all(count <= max(found[name], 0) for name, count in per_host.items())
    assert sum(round(grant.cpus * 1000) for grant in placed.grants) == ceil(round(request.cpus * 1000, 6))
    assert sum(grant.host_memory_bytes for grant in placed.grants) == request.host_memory_bytes
    assert len(per_host) == needs(found, world, request)
    if request.placement is Placement.SPREAD and several(request):
        assert set(per_host.values()) == {request.gpus_per_host or 1}
    if several(request) and request.within:
        assert len({world[name].host.labels["rack"] for name in per_host}) == 1


@st.composite
def worlds(draw: st.DrawFn) -> tuple[fold.Fleet, dict[str, Inventory]]:
    """A live fleet with strangers' processes, faults, drains, warm devices."""
    fleet = fold.Fleet()
    world = {event.host.name: event for event in draw(inventories())}
    for name, event in world.items():
        fold.apply(fleet, event, NOW)
        uuids = [device.uuid for device in event.devices]
        if not uuids or draw(st.integers(0, 9)) == 0:
            continue
        used = [draw(st.sampled_from([0, 0, 3 * MIB, 700 * MIB, 10 * GIB])) for _ in uuids]
        fold.apply(
            fleet,
            samples(
                name,
                uuids,
                NOW,
                used=used,
                reserved=[draw(st.sampled_from([None, 0, 512 * MIB, 601 * MIB])) for _ in uuids],
                utilization=[draw(st.sampled_from([None, 0.0, 60.0, 100.0])) for _ in uuids],
                temperature=[draw(st.sampled_from([None, 30.0, 75.0, 95.0])) for _ in uuids],
                throttle=[draw(st.sampled_from([0, 4, 0x40])) for _ in uuids],
            ),
            NOW,
        )
        if draw(st.booleans()):
            fold.apply(
                fleet,
                processes(name, NOW, [(uuid, "", amount) for uuid, amount in zip(uuids, used, strict=True) if amount]),
                NOW,
            )
        for uuid in uuids:
            severity = draw(st.sampled_from([None] * 8 + [Severity.WARNING, Severity.HARDWARE, Severity.APPLICATION]))
            if severity is not None:
                event_ns = int(NOW * 1e9)
                fold.apply(
                    fleet,
                    DeviceEvent(
                        host=name, agent="a1", sequence=2, time_ns=event_ns, kind="xid", severity=severity, device=uuid
                    ),
                    NOW,
                )
    fold.apply(fleet, Drains(drains=draw(st.sampled_from([{}, {}, {"host:h1": "x"}, {"label:rack=r1": "x"}]))), NOW)
    return fleet, world


@settings(max_examples=60, deadline=None)
@given(worlds(), st.lists(st.tuples(requests(POLICIES), st.integers(0, 3)), min_size=1, max_size=12))
def test_a_request_is_placed_exactly_where_it_fits(
    made: tuple[fold.Fleet, dict[str, Inventory]], asked: list[tuple[WorkRequest, int]]
) -> None:
    fleet, world = made
    policies = Policies()
    held: list[str] = []
    for number, (request, release) in enumerate(asked):
        needed = needs(rooms(fleet, world, request), world, request)
        decision = decide(fleet, request, NOW, policies)
        assert isinstance(decision, Placed) == (needed > 0), decision
        if isinstance(decision, Placed):
            check_grants(fleet, world, request, decision)
            fold.hold(fleet, f"l{number}", decision.grants)
            held.append(f"l{number}")
        elif decision.reasons:
            ask = fleet.ask(ask_key(request))
            assert sum(reason.devices for reason in decision.reasons) == (
                len(fleet.devices) if request.gpus else len(fleet.hosts)
            )
            assert decision.could_ever_fit == (idle_fits(fleet, world, request) > 0)
            check_room(fleet, room_for(fleet, ask))
        if held and release == 0:
            fold.free(fleet, held.pop(0))
        check_shares(fleet)


def check_shares(fleet: fold.Fleet) -> None:
    """No device is over-committed, whoever holds it."""
    for device in fleet.devices.values():
        held = fleet.on_device.get(device.uuid, {})
        assert device.holders == held
        assert sum(share for share, _ in held.values()) <= WHOLE_SHARE
        assert sum(memory for _, memory in held.values()) <= device.memory_total
        assert device.state is device.see(fleet.device_state, fleet.reserved.get(device.uuid)), "an old look at it"
    for host in fleet.hosts.values():
        assert host.cpus_held <= host.cpus_total
        assert host.memory_held <= host.memory_total


def check_room(fleet: fold.Fleet, kept: CapacityTally) -> None:
    """What was followed move by move is what counting anew gives."""
    if kept.ask.filtered:
        return
    fresh = CapacityTally(kept.ask).follow(fleet)
    assert (kept.total, kept.devices, kept.nearest, kept.rooms) == (
        fresh.total,
        fresh.devices,
        fresh.nearest,
        fresh.rooms,
    )


def idle_fits(live: fold.Fleet, world: dict[str, Inventory], request: WorkRequest) -> int:
    """How many hosts the request would need on the same fleet, just switched on."""
    fleet = fold.Fleet(stale_after=float("inf"))
    for name, event in world.items():
        fold.apply(fleet, event, NOW)
        uuids = [device.uuid for device in event.devices]
        if uuids:
            reserved = [live.devices[uuid].reserved for uuid in uuids]
            fold.apply(fleet, samples(name, uuids, NOW, reserved=reserved), NOW)
    return needs(rooms(fleet, world, request), world, request)


@settings(max_examples=50, deadline=None)
@given(worlds(), st.lists(requests(("opportunity", "best-fit", "pack", "spread", "score")), min_size=1, max_size=8))
def test_the_best_host_by_the_policy_is_taken(
    made: tuple[fold.Fleet, dict[str, Inventory]], asked: list[WorkRequest]
) -> None:
    fleet, world = made
    policies = Policies()
    for number, request in enumerate(asked):
        decision = decide(fleet, request, NOW, policies)
        if isinstance(decision, Rejection):
            continue
        hosts = {grant.host for grant in decision.grants}
        if len(hosts) == 1 and request.gpus and not (request.within or request.prefer_within):
            ask = fleet.ask(ask_key(request))
            policy = policies.get(request.policy)
            found = rooms(fleet, world, request)
            scores: dict[str, float] = {}
            for name, room in found.items():
                # By the rounded state where it suffices, as the planner ranks; by the exact one where it does not.
                state = fleet.hosts[name].state
                places = candidates(state, ask)
                if len(places) < request.gpus:
                    continue
                if room >= request.gpus:
                    scores[name] = policy.choose(state, ask, places).score
            if scores:
                assert scores[next(iter(hosts))] == max(scores.values())
            else:
                exact = exact_state(fleet, fleet.hosts[next(iter(hosts))])
                assert len(candidates(exact, ask)) >= request.gpus
        fold.hold(fleet, f"l{number}", decision.grants)


PROFILE = {
    ask_key(WorkRequest(owner="me", **fields)): weight  # pyright: ignore[reportArgumentType]
    for weight, fields in (
        (5.0, {"gpus": 1, "cpus": 8, "host_memory_bytes": 20 * GIB}),
        (2.0, {"gpus": 4, "cpus": 16}),
        (4.0, {"gpu_share": 0.5, "cpus": 2}),
        (3.0, {"gpu_share": 0.333, "cpus": 1, "host_memory_bytes": 4 * GIB}),
    )
}


@pytest.mark.parametrize(("taken", "asked", "foreign"), [(1 / 3, 1 / 3, 10 * GIB), (0.6667, 0.3334, 0)])
def test_a_part_that_a_device_cannot_give_does_not_make_its_host_the_best(
    taken: float, asked: float, foreign: int
) -> None:
    """The part that is left would cost nothing, but has too little memory, or is smaller by less than a thousandth."""
    fleet = fold.Fleet()
    for event in (inventory("h0", ["Tesla T4"] * 2), inventory("h1", ["Tesla T4"] * 2)):
        fold.apply(fleet, event, NOW)
        uuids = [device.uuid for device in event.devices]
        used = [foreign, 0] if event.host.name == "h0" else [0, 0]
        fold.apply(fleet, samples(event.host.name, uuids, NOW, used=used, temperature=[30.0, 95.0]), NOW)
    policy = make("opportunity", {ask_key(WorkRequest(owner="me", gpu_share=asked)): 1.0})
    policies = Policies()
    policies.use(policy)
    held = decide(fleet, WorkRequest(owner="me", gpu_share=taken, hosts=["h0"]), NOW, policies)
    assert isinstance(held, Placed)
    fold.hold(fleet, "l0", [msgspec.structs.replace(held.grants[0], device=fleet.hosts["h0"].devices[0].uuid)])
    ask = fleet.ask(ask_key(WorkRequest(owner="me", gpu_share=asked)))
    scores = {
        name: policy.choose(host.state, ask, candidates(host.state, ask)).score for name, host in fleet.hosts.items()
    }
    assert scores["h0"] < scores["h1"]
    assert policy.search is not None
    best = policy.search.best(fleet, ask)
    assert best is not None
    assert best[1].score == scores["h1"]
    assert policy.search.top(fleet, ask, 1, set())[0][0] == "h1"


@settings(max_examples=60, deadline=None)
@given(worlds(), st.lists(requests(("opportunity",)), min_size=1, max_size=8), st.integers(1, 4))
def test_a_look_over_all_hosts_finds_what_a_look_at_each_finds(
    made: tuple[fold.Fleet, dict[str, Inventory]], asked: list[WorkRequest], count: int
) -> None:
    fleet, _ = made
    policies = Policies()
    policies.use(make("opportunity", PROFILE))
    policy = policies.get(None)
    assert policy.search is not None
    for number, request in enumerate(asked):
        decision = decide(fleet, request, NOW, policies)
        if isinstance(decision, Placed):
            fold.hold(fleet, f"l{number}", decision.grants)
        ask = fleet.ask(ask_key(request)).part(min(request.gpus, 1 + number % 4))
        if not ask.plain:  # the search is not asked then
            continue
        scores: dict[str, float] = {}
        for name, host in fleet.hosts.items():
            places = candidates(host.state, ask)
            if not excluded(host.state, ask) and len(places) >= ask.gpus:
                scores[name] = policy.choose(host.state, ask, places).score
        for device in {device for host in fleet.hosts.values() for device in host.state.devices}:
            assert has_part(device, part_most(device))
            assert not device.memory_most or not has_part(device, part_most(device) + 1)
        without = set(sorted(fleet.hosts)[:number])
        # The arrays interpolate where the rule itself computes.
        near = pytest.approx(sorted([s for name, s in scores.items() if name not in without])[::-1][:count], abs=1e-5)
        found = policy.search.top(fleet, ask, count, without)
        assert [choice.score for _, choice in found] == near
        assert all(
            policy.choose(fleet.hosts[name].state, ask, candidates(fleet.hosts[name].state, ask)) == choice
            and name not in without
            for name, choice in found
        )
        best = policy.search.best(fleet, ask)
        assert (best is None) == (not scores)
        if best is not None:
            assert best[1].score == pytest.approx(max(scores.values()), abs=1e-5)
        if ask.gpus and ask.whole:
            most = max(
                [
                    capacity(host.state, ask, len(candidates(host.state, ask)))
                    for name, host in fleet.hosts.items()
                    if name not in without
                ],
                default=0,
            )
            assert most <= policy.search.may_hold(fleet, ask, ask.gpus, without) <= ask.gpus


@settings(max_examples=60, deadline=None)
@given(worlds(), requests(("opportunity", "best-fit", "score")))
def test_explain_tells_what_decide_does(made: tuple[fold.Fleet, dict[str, Inventory]], request: WorkRequest) -> None:
    fleet, _ = made
    policies = Policies()
    told = explain(fleet, request, NOW, policies)
    done = decide(fleet, request, NOW, policies)
    if isinstance(done, Placed):
        assert told.granted
        assert told.grants == done.grants
        taken = {grant.device for grant in done.grants if grant.device}
        assert {verdict.device for verdict in told.verdicts if verdict.selected} == taken
        assert all(verdict.feasible for verdict in told.verdicts if verdict.selected)
    else:
        assert not told.granted
        assert told.rejection == done
        assert not any(verdict.selected for verdict in told.verdicts)
    assert len(told.verdicts) == len(fleet.devices)


def test_what_remains_of_rounding_is_found() -> None:
    fleet = fold.Fleet()
    event = inventory("h0", ["Tesla T4"])
    fold.apply(fleet, event, NOW)
    fold.apply(fleet, samples("h0", ["GPU-h0-0"], NOW, used=[5 * MIB + 17]), NOW)
    exact = fleet.devices["GPU-h0-0"].memory_free
    assert fleet.hosts["h0"].state.devices[0].memory_free < exact
    world = {"h0": event}
    for amount, fit in ((exact, True), (exact + 1, False)):
        request = WorkRequest(owner="me", gpu_memory_bytes=amount)
        decision = decide(fleet, request, NOW, Policies())
        assert isinstance(decision, Placed) == fit
        if isinstance(decision, Placed):
            check_grants(fleet, world, request, decision)
    assert could_ever_fit(fleet, fleet.ask(ask_key(WorkRequest(owner="me", gpu_memory_bytes=exact + 17))))


def test_the_rest_of_a_request_may_need_several_smaller_hosts() -> None:
    sizes = {"h0": 5, "h1": 1, "h2": 1, "h3": 1}
    world = {name: inventory(name, ["Tesla T4"] * count) for name, count in sizes.items()}
    fleet = fold.Fleet(stale_after=float("inf"))
    for event in world.values():
        fold.apply(fleet, event, NOW)
    for gpus, hosts in ((5, 1), (6, 2), (7, 3), (8, 4), (9, 0)):
        request = WorkRequest(owner="me", gpus=gpus, placement=Placement.FEWEST_HOSTS)
        decision = decide(fleet, request, NOW, Policies())
        assert isinstance(decision, Placed) == (hosts > 0)
        if isinstance(decision, Placed):
            check_grants(fleet, world, request, decision)
            assert len({grant.host for grant in decision.grants}) == hosts


def test_a_part_that_does_not_divide_is_rounded_up_not_over_committed() -> None:
    fleet = fold.Fleet(stale_after=float("inf"))
    for n in range(3):
        fold.apply(fleet, inventory(f"h{n}", ["Tesla T4"], cpus=1), NOW)
    for cpus, placement in ((3.001, Placement.SPREAD), (3.001, Placement.FEWEST_HOSTS)):
        request = WorkRequest(owner="me", gpus=3, cpus=cpus, placement=placement)
        assert isinstance(decide(fleet, request, NOW, Policies()), Rejection)
    for placement in (Placement.SPREAD, Placement.FEWEST_HOSTS):
        decision = decide(fleet, WorkRequest(owner="me", gpus=3, cpus=3.0, placement=placement), NOW, Policies())
        assert isinstance(decision, Placed)
        assert [grant.cpus for grant in decision.grants] == [1.0, 1.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(
    inventories(hosts=6, devices=3),
    st.lists(
        st.tuples(requests(("opportunity", "best-fit", "spread")), st.booleans(), st.integers(0, 5)),
        min_size=5,
        max_size=40,
    ),
)
def test_what_is_forgotten_is_worked_out_again_alike(
    found: list[Inventory], asked: list[tuple[WorkRequest, bool, int]]
) -> None:
    """With hardly anything kept from one decision to the next, the answers are the same."""

    def run() -> list[object]:
        fleet = fold.Fleet()
        for event in found:
            fold.apply(fleet, event, NOW)
        policies, answers, held, now = Policies(), list[object](), list[str](), NOW
        for number, (request, release, host) in enumerate(asked):
            now += 1.0
            event = found[host % len(found)]
            uuids = [device.uuid for device in event.devices]
            if uuids:
                heat = [30.0 + 13 * ((number + at) % 6) for at in range(len(uuids))]
                fold.apply(fleet, samples(event.host.name, uuids, now, temperature=heat), now)
            decision = decide(fleet, request, now, policies)
            answers.append(decision)
            if isinstance(decision, Placed):
                fold.hold(fleet, f"l{number}", decision.grants)
                held.append(f"l{number}")
            if release and held:
                fold.free(fleet, held.pop(0))
        return answers

    kept = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corral.planner.fleet.known.STATES_SPARE", -100)
        patch.setattr("corral.planner.fleet.known.MAX_CACHED", 3)
        patch.setattr("corral.planner.fleet.known.MAX_ASKS", 2)
        patch.setattr("corral.planner.placement.rank.CHOICES_SPARE", -100)
        patch.setattr("corral.planner.placement.capacity.PARTS_SPARE", -100)
        patch.setattr("corral.planner.fleet.index.LOG_SPARE", -100)
        assert run() == kept
