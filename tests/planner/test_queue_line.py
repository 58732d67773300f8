"""The line of waiting requests: who may start, what is kept for whom, and that nothing is overlooked."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from corral.planner.fleet.fleet import Fleet, apply, free, hold
from corral.planner.fleet.state import milli
from corral.planner.placement.decide import Policies
from corral.planner.placement.feasible import model_allowed
from corral.planner.queue.backfill import Horizons
from corral.planner.queue.durations import given
from corral.planner.queue.line import MOST_UNREADY, Entry, Line, Start
from corral.planner.queue.order import LIMIT_SECONDS, RULES, fifo, shortest
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.timed import grants_of
from corral.planner.simulation.trace import Node
from corral.schemas.operations import Drains
from corral.schemas.requests import Placement, WorkRequest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st


class World:
    """A line over a fleet, in a time of its own."""

    def __init__(self, nodes: Sequence[Node], rule=shortest) -> None:
        self.fleet: Fleet = fleet_of(nodes)
        for name, host in self.fleet.hosts.items():
            host.labels = {"rack": "r1" if name in "ac" else "r2"}
        self.line = Line(self.fleet, Policies("best-fit"), rule)
        self.now = 0.0
        self.running: list[str] = []
        self.started: list[Start] = []

    def ask(self, seconds: float, **fields: object) -> Entry:
        return self.line.arrive(WorkRequest(**{"owner": "o", **fields}), given(seconds), self.now)

    def serve(self) -> list[Start]:
        found: list[Start] = []
        for start in self.line.serve(self.now):
            lease = f"l{start.entry.number}"
            hold(self.fleet, lease, grants_of(start.picks))
            self.line.started(lease, start.entry, self.now)
            self.running.append(lease)
            found.append(start)
        self.started += found
        return found

    def end(self, lease: str) -> None:
        self.running.remove(lease)
        self.line.ended(lease, self.now)
        free(self.fleet, lease)


NODES = [
    Node("a", 16_000, 1000, 4, "H100"),
    Node("b", 8_000, 1000, 4, "H100"),
    Node("c", 16_000, 1000, 2, "T4"),
    Node("d", 16_000, 1000, 4, "T4"),
]
on_one_or_few = st.fixed_dictionaries(
    {"gpus": st.sampled_from([1, 1, 1, 2, 3, 4, 6])},
    optional={
        "cpus": st.sampled_from([1.0, 4.0, 12.0]),
        "models": st.sampled_from([["H100"], ["T4"]]),
        "hosts": st.sampled_from([["a"], ["a", "c"]]),
        "placement": st.sampled_from([Placement.FEWEST_HOSTS, Placement.SPREAD]),
        "within": st.just("rack"),
        "priority": st.sampled_from([0, 5]),
        "owner": st.sampled_from(["p", "q"]),
    },
).map(lambda fields: fields if "placement" in fields else {k: v for k, v in fields.items() if k != "within"})
# Several devices on each of several hosts, where they are spread.
several_each = st.tuples(on_one_or_few, st.sampled_from([2, 3])).map(
    lambda made: (
        {**made[0], "gpus": made[0]["gpus"] * made[1], "gpus_per_host": made[1]}
        if made[0].get("placement") is Placement.SPREAD
        else made[0]
    )
)
requests = on_one_or_few | several_each
of_one_model = st.fixed_dictionaries(
    {"gpus": st.sampled_from([1, 2, 4]), "models": st.sampled_from([["H100"], ["T4"]])},
    optional={"hosts": st.just(["a", "c"]), "priority": st.sampled_from([0, 5]), "cpus": st.sampled_from([1.0, 12.0])},
)
shares = st.fixed_dictionaries({"gpus": st.just(1), "gpu_share": st.sampled_from([0.3, 0.5])})
events = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), requests | shares, st.sampled_from([5.0, 20.0, 100.0])),
        st.tuples(st.just("end"), st.integers(0, 99)),
        st.tuples(st.just("withdraw"), st.integers(0, 99)),
        st.tuples(st.just("drain"), st.sampled_from(["host:a", "host:d", ""])),
        st.tuples(st.just("pass"), st.sampled_from([1.0, 30.0])),
    ),
    min_size=5,
    max_size=40,
)


def play(world: World, event: tuple) -> list[Start]:
    kind, *rest = event
    if kind == "ask":
        world.ask(rest[1], **rest[0])
    elif kind == "end" and world.running:
        world.end(world.running[rest[0] % len(world.running)])
    elif kind == "withdraw" and len(world.line):
        world.line.withdraw(list(world.line)[rest[0] % len(world.line)])
    elif kind == "drain":
        apply(world.fleet, Drains(drains={rest[0]: "why"} if rest[0] else {}))
    elif kind == "pass":
        world.now += rest[0]
    return world.serve()


@settings(deadline=None, max_examples=60)
@cases(events, st.sampled_from(sorted(RULES)))
def test_nobody_is_overlooked_and_each_plan_is_that_of_a_fresh_look(history: list[tuple], rule: str) -> None:
    world = World(NODES, RULES[rule])
    for event in history:
        play(world, event)
        assert not world.fleet.reserved  # what is kept for others shows in decisions alone
        world.line.reopen()
        assert world.serve() == []
        for held in world.line.held:
            fresh = Horizons(world.fleet, world.line.ends).plan(held.entry.ask, "o")
            others = [other for other in world.line.held if other is not held]
            assert fresh is not None
            assert held.starts_at >= fresh.starts_at or others


@settings(deadline=None, max_examples=60)
@cases(
    events
    | st.lists(
        st.tuples(st.just("ask"), of_one_model, st.sampled_from([20.0, 100.0])) | st.tuples(st.just("end"), st.just(9)),
        min_size=5,
        max_size=20,
    )
)
def test_no_newcomer_is_refused_devices_that_nobody_ahead_could_take(history: list[tuple]) -> None:
    world = World(NODES)
    for event in history:
        play(world, event)
        newcomer = world.ask(50.0, gpus=1)
        started = world.serve()
        if all(start.entry is not newcomer for start in started):
            ahead = [entry for entry in world.line if entry.order < newcomer.order]
            for device in world.fleet.devices.values():
                if device.state.idle:
                    host = world.fleet.hosts[device.host]
                    takers = [
                        entry for entry in ahead if could_ever(entry, device.host, len(host.devices), world.fleet)
                    ]
                    assert takers, f"{device.uuid} stands idle, and is wanted by nobody ahead"
            world.line.withdraw(newcomer)
            world.serve()


def could_ever(entry: Entry, host: str, devices: int, fleet: Fleet) -> bool:
    """True if a request could take a device of a host: by model, name, drains aside, cores and number of devices."""
    request, ask = entry.request, entry.ask
    known = fleet.hosts[host]
    if known.blocked or (request.hosts and host not in request.hosts):
        return False
    one_host = request.placement is Placement.SAME_HOST
    part = ask if one_host else ask.part(1)
    enough = milli(known.cpus_total / 1000) >= part.cpus_milli and (devices >= ask.gpus or not one_host)
    return enough and any(model_allowed(device.model, ask) for device in known.devices)


def test_who_would_end_in_time_passes_and_who_would_not_waits_but_for_what_is_beside() -> None:
    world = World([Node("a", 10**9, 10**6, 4, "H100"), Node("b", 10**9, 10**6, 1, "T4")], fifo)
    world.ask(100.0, gpus=3, models=["H100"])
    world.serve()
    head = world.ask(10.0, gpus=4)
    long = world.ask(101.0, gpus=1, models=["H100"])
    brief = world.ask(100.0, gpus=1, models=["H100"])
    beside = world.ask(9999.0, gpus=1)
    assert [start.entry for start in world.serve()] == [brief, beside]
    (held,) = world.line.held
    assert (held.entry, held.starts_at, held.hosts) == (head, 100.0, {"a"})
    assert [world.line.position(entry) for entry in (head, long)] == [1, 2]
    world.now = 100.0
    for lease in list(world.running[:2]):
        world.end(lease)
    assert [start.entry for start in world.serve()] == [head]


def test_each_kind_of_devices_has_a_first_in_line_of_its_own() -> None:
    world = World([Node("a", 10**9, 10**6, 2, "H100"), Node("b", 10**9, 10**6, 2, "T4")], fifo)
    for model in ("H100", "T4"):
        world.ask(100.0, gpus=1, models=[model])
    assert len(world.serve()) == 2
    one, other = (world.ask(10.0, gpus=2, models=[model]) for model in ("H100", "T4"))
    world.ask(10.0, gpus=2)
    assert world.serve() == []
    assert [(held.entry, held.hosts) for held in world.line.held] == [(one, {"a"}), (other, {"b"})]
    # Nobody may take what either waits for, though it could take the other.
    late = world.ask(1000.0, gpus=1)
    assert world.serve() == []
    with world.line.protected(late, 0, 1000.0, world.now) as fleet:
        assert not any(device.state.idle for device in fleet.devices.values())
    with world.line.protected(None, 0, 50.0, world.now) as fleet:
        assert sum(device.state.idle for device in fleet.devices.values()) == 2


def test_a_search_that_takes_too_long_goes_on_with_the_next_call() -> None:
    world, reference = World(NODES, fifo), World(NODES, fifo)
    for each in (world, reference):
        for memory in range(1, 21):  # of as many kinds; the last one alone fits beside what is kept for the others
            each.ask(100.0, gpus=6, host_memory_bytes=memory, models=["H100"])
        each.ask(100.0, models=["T4"])
    found: list[int] = []
    steps = 0
    while True:
        start = world.line.next(world.now, lambda: True)
        steps += 1
        if start is None and not world.line.paused:
            break
        if start is not None:
            hold(world.fleet, f"l{start.entry.number}", grants_of(start.picks))
            world.line.started(f"l{start.entry.number}", start.entry, world.now)
            found.append(start.entry.number)
    assert found == [start.entry.number for start in reference.serve()]
    assert steps > len(found) + 1
    assert [held.entry.number for held in world.line.held] == [held.entry.number for held in reference.line.held]


def test_thousands_that_are_not_ready_keep_no_more_than_some_of_the_fleet() -> None:
    world = World([Node(f"n{at}", 16_000, 1000, 8, "H100") for at in range(100)], fifo)
    for _ in range(700):
        world.line.pause(world.ask(100.0))
    ready = world.ask(100.0)
    assert [start.entry for start in world.serve()] == [ready]
    assert len(world.line.unready) == MOST_UNREADY


def test_a_paused_request_keeps_what_it_would_take_until_it_is_resumed() -> None:
    world = World([Node("a", 10**9, 10**6, 2, "H100")])
    first = world.ask(10.0, gpus=1)
    world.line.pause(first)
    second, third = world.ask(100.0, gpus=1), world.ask(20.0, gpus=1, cpus=1.0)
    assert [start.entry for start in world.serve()] == [third]
    assert world.line.unready == [first]
    assert list(world.line) == [first, second]
    world.line.resume(first)
    assert [start.entry for start in world.serve()] == [first]


def test_equal_requests_start_in_order_and_a_restart_keeps_it() -> None:
    world = World([Node("a", 10**9, 10**6, 1, "H100")])
    world.ask(10.0, gpus=1)
    world.serve()
    asked = []
    for _ in range(5):
        world.now += 1
        asked.append(world.ask(10.0, gpus=1))
    again = World([Node("a", 10**9, 10**6, 1, "H100")])
    shuffled = random.Random(3).sample(asked, 5)
    for entry in shuffled:
        again.line.arrive(entry.request, entry.estimate, entry.arrived_at, number=entry.number)
    again.now = 100.0
    order = []
    while len(again.line):
        order += [start.entry.number for start in again.serve()]
        again.end(again.running[0])
    assert order == [entry.number for entry in asked]


@settings(deadline=None, max_examples=60)
@cases(
    st.lists(
        st.tuples(st.floats(0, 2 * LIMIT_SECONDS), st.integers(1, 8), st.floats(1, 1e9), st.sampled_from("pq")),
        min_size=2,
        max_size=12,
    ),
    st.sampled_from(sorted(RULES)),
)
def test_after_its_limit_a_request_is_behind_those_alone_that_came_before_it(asked: list[tuple], rule: str) -> None:
    world = World([Node("a", 10**9, 10**6, 8, "H100")], RULES[rule])
    for at, gpus, length, owner in sorted(asked):
        world.line.arrive(WorkRequest(owner=owner, gpus=gpus), given(length), at)
    now = max(at for at, *_ in asked)
    world.line.renew(now)
    order = list(world.line)
    for place, entry in enumerate(order):
        if now - entry.arrived_at >= LIMIT_SECONDS and RULES[rule] is not fifo:
            assert all(other.arrived_at <= entry.arrived_at for other in order[:place])
    assert [world.line.position(entry) for entry in order] == list(range(1, len(order) + 1))
    # One key at a time is the same as all at once.
    alone = World([Node("a", 10**9, 10**6, 8, "H100")], RULES[rule])
    alone.line.renew(now)
    for entry in order:
        again = alone.line.arrive(entry.request, entry.estimate, entry.arrived_at, number=entry.number)
        assert again.order == pytest.approx(entry.order)


def test_a_brief_request_uses_the_hole_before_a_reservation_ahead_of_an_overdue_one() -> None:
    """Who came later goes ahead of an overdue request only where that could not start, since others are ahead of it."""
    world = World([Node("slot", 16_000, 1000, 1, "H100"), Node("wide", 16_000, 1000, 2, "H100")])
    world.ask(10.0, hosts=["slot"])
    world.serve()
    overdue = world.ask(1e6, hosts=["slot"])
    world.now = LIMIT_SECONDS
    world.ask(100.0, hosts=["wide"], gpus=2)
    world.serve()
    several = world.ask(10.0, gpus=3, placement=Placement.FEWEST_HOSTS, priority=1)
    brief = [world.ask(10.0, hosts=["slot"]) for _ in range(2)]
    world.end(world.running[0])
    assert [start.entry for start in world.serve()] == brief[:1]
    world.line.withdraw(several)
    world.end(world.running[-1])
    assert [start.entry for start in world.serve()] == [overdue]


def test_the_more_a_request_has_waited_for_its_work_the_further_ahead_it_is() -> None:
    world = World([Node("a", 10**9, 10**6, 8, "H100")])
    long, brief = world.ask(100_000.0, gpus=1), world.ask(1000.0, gpus=1)
    assert list(world.line) == [brief, long]
    late = []
    for world.now in (10 * 86_400.0, 100 * 86_400.0):
        late.append(world.ask(20_000.0, gpus=1))
        world.line.renew(world.now)
    assert list(world.line)[:2] == [long, brief]  # both are overdue
    assert list(world.line)[2:] == late


def test_a_lease_past_its_expected_end_is_expected_to_take_longer() -> None:
    world = World([Node("a", 10**9, 10**6, 1, "H100")])
    world.ask(10.0, gpus=1)
    world.serve()
    head = world.ask(10.0, gpus=1)
    for world.now, least in ((10.0, 70.0), (100.0, 160.0)):
        world.serve()
        (held,) = world.line.held
        assert held.entry is head
        assert held.starts_at >= least


def test_a_request_that_nothing_could_serve_keeps_nothing_from_others() -> None:
    world = World(NODES)
    apply(world.fleet, Drains(drains={"host:a": "why", "host:b": "why"}))
    world.ask(10.0, gpus=1, models=["H100"])
    other = world.ask(1e6, gpus=4)
    assert [start.entry for start in world.serve()] == [other]
    assert world.line.held == []
