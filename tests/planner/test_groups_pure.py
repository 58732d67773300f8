"""Groups in virtual time: limits, guarantees, borrowing, fair share, and whose leases are taken back."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from heapq import heappop, heappush

import pytest
from corral.planner.fleet.fleet import Fleet, apply, free, hold
from corral.planner.fleet.state import WHOLE_SHARE, Ask, ask_key
from corral.planner.groups.state import GroupState, amounts_of
from corral.planner.groups.tree import Tree
from corral.planner.groups.usage import PastUse, Usage
from corral.planner.groups.use import Admission, Amounts, Pending
from corral.planner.placement.decide import Policies
from corral.planner.queue.durations import given
from corral.planner.queue.line import Entry, Line
from corral.planner.queue.line import Group as LineGroup
from corral.planner.queue.reclaim import Candidate, Reclaim, ranked
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.timed import grants_of
from corral.planner.simulation.trace import Node
from corral.schemas.operations import Drains
from corral.schemas.requests import Placement, WorkRequest
from corral.schemas.work.groups import Group, GroupTree, Resources
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

HALF_LIFE = 7 * 86400.0


def gpus(**amounts: float) -> Resources:
    return Resources(gpus={"*" if name == "any" else name: amount for name, amount in amounts.items()})


class World:
    """A line of several groups, in a time of its own."""

    def __init__(self, nodes: list[Node], *groups: Group, **tree: object) -> None:
        self.fleet: Fleet = fleet_of(nodes)
        self.state = GroupState(GroupTree(groups=list(groups), **tree))
        self.line = Line(self.fleet, Policies("best-fit"), groups=self.state)
        self.now = 0.0
        self.running: dict[str, Entry] = {}

    def ask(self, owner: str, seconds: float = 100.0, **fields: object) -> Entry:
        request = WorkRequest(**{"owner": owner, "wait_seconds": 1e4, **fields})
        return self.line.arrive(request, given(seconds), self.now)

    def serve(self) -> list[str]:
        """Start who may; returns the owners."""
        found: list[str] = []
        for start in self.line.serve(self.now):
            lease, request = f"l{start.entry.number}", start.entry.request
            grants = grants_of(start.picks)
            amounts = amounts_of(self.fleet, grants)
            self.state.use.hold(lease, request.owner, amounts, request.preemptible)
            self.state.usage.starts(lease, request.owner, amounts, self.now)
            hold(self.fleet, lease, grants)
            self.line.started(lease, start.entry, self.now)
            self.running[lease] = start.entry
            found.append(request.owner)
        return found

    def end(self, lease: str) -> None:
        self.state.use.drop(lease)
        self.state.usage.ends(lease, self.now)
        del self.running[lease]
        self.line.ended(lease, self.now)
        free(self.fleet, lease)

    def used(self, group: str) -> Mapping[str, float]:
        use = self.state.use.of(self.state.tree.nodes[group])
        return {model: share / WHOLE_SHARE for model, share in use.devices.items()}


TWO_KINDS = [Node("a", 64_000, 1000, 8, "H100"), Node("b", 64_000, 1000, 8, "T4")]


def test_limits_guarantees_and_what_is_borrowed() -> None:
    world = World(
        TWO_KINDS,
        Group(name="lab", limit=gpus(any=12)),
        Group(name="lab/vision", guarantee=gpus(H100=4), limit=gpus(H100=6), members=["ann"]),
        Group(name="lab/nlp", members=["bob"]),
        Group(name="ops", guarantee=gpus(H100=4, any=2), members=["eve"]),
    )
    # Not preemptible: ann gets her guarantee of four H100s, and T4s that nobody is guaranteed.
    for _ in range(8):
        world.ask("ann", models=["*h100*"])
    world.serve()
    assert world.used("lab/vision") == {"H100": 4}
    # Preemptible: she may borrow, up to her limit of six.
    for _ in range(8):
        world.ask("ann", models=["*h100*"], preemptible=True)
    world.serve()
    assert world.used("lab/vision") == {"H100": 6}
    # The limit of the group around counts for both.
    for _ in range(8):
        world.ask("bob", preemptible=True)
    world.serve()
    assert sum(world.used("lab").values()) == 12
    # Two of ops' guarantee of any other model are kept from work that can't be preempted.
    for lease in [lease for lease, entry in world.running.items() if entry.request.owner == "bob"]:
        world.end(lease)
    world.serve()
    for entry in list(world.line):
        world.line.withdraw(entry)
    for _ in range(8):
        world.ask("zoe", models=["*t4*"])
    world.serve()
    assert world.used("default") == {"T4": 6}
    assert "guaranteed to other groups" in next(iter(world.line)).group.refused


def test_a_request_within_guarantee_goes_first_and_takes_back_the_cheapest() -> None:
    world = World(
        [Node("a", 64_000, 1000, 8, "H100")],
        Group(name="vision", guarantee=gpus(H100=6), members=["ann"]),
        Group(name="nlp", guarantee=gpus(H100=2), members=["bob", "bea"]),
    )
    for at in range(8):
        world.now = 10.0 * at
        world.ask("bob", preemptible=True)
        assert world.serve() == ["bob"]
    world.ask("bob", preemptible=True, priority=1000)
    ann = world.ask("ann", gpus=4)
    assert world.serve() == []
    ((group, ask),) = world.line.owed
    assert group.entries == [ann]
    nodes = world.state.tree.nodes
    candidates = [
        Candidate(lease, nodes["nlp"], Amounts({"H100": WHOLE_SHARE}), 100.0 - 10 * number, 10.0 * number)
        for number, lease in enumerate(world.running)
    ]
    given_up = Pending()
    reclaim = reclaim_of(world, candidates, given_up)
    chosen = reclaim.choose(ask, nodes["vision"])
    assert chosen is not None
    # The four that lose least.
    assert {each.lease_id for each in chosen} == set(list(world.running)[4:])
    # Two more are above the guarantee of nlp, and no third.
    more: list[int | None] = []
    for each in chosen:
        given_up.add(each.node, each.amounts)
    for _ in range(3):
        found = reclaim.choose(world.fleet.ask(ask.key._replace(gpus=1)), nodes["vision"])
        more.append(found and len(found))
        for each in found or ():
            given_up.add(each.node, each.amounts)
    assert more == [1, 1, None]
    # What comes free goes to ann, whatever priority bob has in his group.
    for each in chosen:
        world.end(each.lease_id)
    assert world.serve() == ["ann"]


def reclaim_of(world: World, candidates: list[Candidate], given_up: Pending | None = None) -> Reclaim:
    """Choice among leases for the outermost groups."""
    root = world.state.tree.root
    return Reclaim(world.fleet, world.state.use, root, ranked(candidates, lambda _: 1.0), given_up or Pending())


def taken(world: World, claimant: str, ask: Ask, *owners: str) -> list[str]:
    """Owners whose leases are taken back for a request; of those given, only they may be."""
    use, nodes = world.state.use, world.state.tree.nodes
    candidates = [
        Candidate(lease, world.state.node_of(entry.request.owner), use.holdings[lease].amounts, 1.0, 0.0)
        for lease, entry in world.running.items()
        if not owners or entry.request.owner in owners
    ]
    node = nodes[claimant]
    chosen = reclaim_of(world, candidates).choose(ask, node)
    return [world.running[each.lease_id].request.owner for each in chosen or ()]


@pytest.mark.parametrize("limited", [False, True])
def test_what_a_preemption_has_freed_is_lent_to_nobody_who_may_stay(limited: bool) -> None:
    """The second of two leases that are preempted for a request ends later; a guest that should be brief waits."""
    world = World(
        [Node("a", 64_000, 1000, 2, "T4")],
        Group(name="ops", guarantee=gpus(any=2), members=["eve"]),
        Group(name="guests", members=["guest", "brief"]),
    )
    for _ in range(2):
        world.ask("guest", preemptible=True)
    world.serve()
    entry = world.ask("eve", gpus=2)
    world.serve()
    for lease in list(world.running):
        world.line.ends.expect(lease, 20.0)
    entry.claimed = True
    world.end(next(iter(world.running)))
    brief = WorkRequest(owner="brief", preemptible=True, wait_seconds=1e4, max_seconds=10 if limited else None)
    world.line.arrive(brief, given(5.0, 10.0 if limited else math.inf), world.now)
    assert world.serve() == (["brief"] if limited else [])
    world.line.withdraw(entry) if limited else world.end(next(iter(world.running)))
    assert world.serve() == ([] if limited else ["eve"])


def test_a_lease_that_is_partly_guaranteed_is_taken_back_only_if_no_other_is_enough() -> None:
    world = World(
        [Node("a", 64_000, 1000, 5, "H100")],
        Group(name="vision", guarantee=gpus(any=1), members=["ann"]),
        Group(name="big", guarantee=gpus(any=3), members=["bob"]),
        Group(name="zoo", members=["zoe"]),
    )
    world.ask("bob", gpus=4, preemptible=True)
    world.ask("zoe", preemptible=True)
    assert world.serve() == ["bob", "zoe"]
    ask = world.ask("ann").group.ask
    assert taken(world, "vision", ask) == ["zoe"]  # though big is ahead of zoo in the order
    assert taken(world, "vision", ask, "bob") == ["bob"]


def test_guaranteed_cores_keep_a_lease_of_cores() -> None:
    world = World(
        [Node("a", 64_000, 1000, 1, "H100")],
        Group(name="vision", guarantee=Resources(cpus=32), members=["ann"]),
        Group(name="nlp", guarantee=Resources(cpus=32), members=["bob"]),
    )
    for cpus in (32, 16, 16):
        world.ask("bob", gpus=0, cpus=cpus, preemptible=True)
        assert world.serve() == ["bob"]
    ann = world.ask("ann", gpus=0, cpus=16)
    assert taken(world, "vision", ann.group.ask) == ["bob"]
    world.line.withdraw(ann)
    for lease in [lease for lease, entry in world.running.items() if entry.request.cpus == 16]:
        world.end(lease)
    world.ask("eve", gpus=0, cpus=32, preemptible=True)  # all that bob has left is his own
    assert world.serve() == ["eve"]
    assert taken(world, "vision", world.ask("ann", gpus=0, cpus=16).group.ask, "bob") == []


def test_what_is_pending_counts_by_pattern() -> None:
    world = World(TWO_KINDS, Group(name="vision", guarantee=gpus(H100=2, any=2), members=["ann"]))
    use, vision = world.state.use, world.state.tree.nodes["vision"]
    pending = Pending()
    pending.add(vision, Amounts({"T4": 2 * WHOLE_SHARE}))
    assert use.within_level(vision, "T4", WHOLE_SHARE, pending=pending) is None
    assert use.within_level(vision, "H100", 2 * WHOLE_SHARE, pending=pending) is vision
    # Of four H100s and four T4s, two of each are beyond the guarantee, whatever is given up of the other kind.
    use.hold("l", "ann", Amounts({"H100": 4 * WHOLE_SHARE, "T4": 4 * WHOLE_SHARE}), preemptible=True)
    default = world.state.node_of("eve")
    assert not use.protects(vision, Amounts({"H100": WHOLE_SHARE}), default, pending)
    assert use.protects(vision, Amounts({"T4": WHOLE_SHARE}), default, pending)


def test_one_host_is_chosen_by_the_price_of_all_its_leases() -> None:
    world = World(
        [Node("a", 64_000, 1000, 4, "H100"), Node("b", 64_000, 1000, 4, "H100")],
        Group(name="vision", guarantee=gpus(any=4), members=["ann"]),
        Group(name="nlp", members=["bob"]),
    )
    for _ in range(4):
        world.ask("bob", preemptible=True, hosts=["a"])
    world.ask("bob", preemptible=True, hosts=["b"], gpus=4)
    world.serve()
    nodes, use = world.state.tree.nodes, world.state.use
    prices = {lease: 30.0 if entry.request.gpus == 1 else 100.0 for lease, entry in world.running.items()}
    candidates = [
        Candidate(lease, nodes["nlp"], use.holdings[lease].amounts, price, 0.0) for lease, price in prices.items()
    ]
    ann = world.ask("ann", gpus=4)
    world.serve()
    reclaim = reclaim_of(world, candidates)
    chosen = reclaim.choose(ann.group.ask, nodes["vision"])
    assert chosen is not None
    assert [prices[each.lease_id] for each in chosen] == [100.0]  # rather than four of 30


def test_no_lease_is_taken_back_that_a_later_one_makes_needless() -> None:
    world = World(
        [Node("a", 64_000, 1000, 4, "H100")],
        Group(name="vision", guarantee=gpus(any=4), members=["ann"]),
        Group(name="nlp", members=["bob"]),
    )
    for count in (1, 1, 2):
        world.ask("bob", preemptible=True, gpus=count)
        world.serve()
    nodes, use = world.state.tree.nodes, world.state.use
    one, _, two = world.running
    prices = dict(zip(world.running, (10.0, 90.0, 20.0), strict=True))
    candidates = [
        Candidate(lease, nodes["nlp"], use.holdings[lease].amounts, price, 0.0) for lease, price in prices.items()
    ]
    ann = world.ask("ann", gpus=2)
    world.serve()
    for count, expected in ((2, [two]), (3, [one, two])):
        reclaim = reclaim_of(world, candidates)
        chosen = reclaim.choose(world.fleet.ask(ann.group.ask.key._replace(gpus=count)), nodes["vision"])
        assert chosen is not None
        assert [each.lease_id for each in chosen] == expected


def test_several_hosts_are_taken_back_in_one_rack_each_with_its_part_of_the_cores() -> None:
    world = World(
        [Node(name, 16_000, 1000, 4, "H100", f"r{name[0]}") for name in ("1a", "1b", "2a", "2b")],
        Group(name="vision", guarantee=gpus(any=16), members=["ann"]),
        Group(name="nlp", members=["bob"]),
    )
    for _ in range(16):
        world.ask("bob", cpus=4.0, preemptible=True)
    assert len(world.serve()) == 16
    use, nodes, fleet = world.state.use, world.state.tree.nodes, world.fleet
    at = {lease: next(iter(fleet.leases[lease].hosts)) for lease in world.running}
    # The cheapest are on two hosts of rack 1 and one of rack 2, where a second is dear.
    price = {"1a": 20.0, "1b": 30.0, "2a": 10.0, "2b": 90.0}
    candidates = [
        Candidate(lease, nodes["nlp"], use.holdings[lease].amounts, price[at[lease]], 0.0) for lease in world.running
    ]
    for placement, within, expected in (
        (Placement.SPREAD, None, ["1a", "2a"]),
        (Placement.SPREAD, "rack", ["1a", "1b"]),
        (Placement.FEWEST_HOSTS, "rack", ["1a", "1a", "1a", "1a", "1b"]),
    ):
        request = WorkRequest(
            owner="ann", gpus=len(expected), cpus=4.0 * len(expected), placement=placement, within=within
        )
        reclaim = reclaim_of(world, candidates)
        chosen = reclaim.choose(fleet.ask(ask_key(request)), nodes["vision"])
        assert chosen is not None
        assert sorted(at[each.lease_id] for each in chosen) == expected


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_groups_that_always_ask_share_by_weight(weights: tuple[float, float]) -> None:
    world = World(
        [Node("a", 64_000, 1000, 8, "H100")],
        Group(name="a", weight=weights[0], members=["ann"]),
        Group(name="b", weight=weights[1], members=["bob"]),
        half_life_seconds=86_400,
    )
    rng = random.Random(3)
    spent = {"ann": 0.0, "bob": 0.0}
    ends: dict[str, float] = {}
    while world.now < 3 * 86_400:
        for owner in spent:
            waiting = sum(entry.request.owner == owner for entry in world.line)
            for _ in range(4 - waiting):
                # One group's work is long and wide, the other's short.
                wide = owner == "ann"
                world.ask(owner, rng.uniform(3600, 7200) if wide else rng.uniform(600, 1800), gpus=4 if wide else 1)
        world.serve()
        for lease in world.running.keys() - ends.keys():
            entry = world.running[lease]
            spent[entry.request.owner] += entry.seconds * entry.request.gpus
            ends[lease] = world.now + entry.seconds
        lease = min(ends, key=lambda lease: ends[lease])
        world.now = ends.pop(lease)
        world.end(lease)
    nodes = world.state.tree.nodes
    usage = {name: world.state.usage.of(nodes[name], world.now) for name in ("a", "b")}
    assert usage["a"] / usage["b"] == pytest.approx(weights[0] / weights[1], rel=0.1)
    assert spent["ann"] / spent["bob"] == pytest.approx(weights[0] / weights[1], rel=0.05)


def test_equal_groups_that_always_ask_have_the_same_device_seconds_within_half_a_percent() -> None:
    day = 86_400.0
    world = World(
        [Node(name, 10**9, 10**9, 8, "H100") for name in "abcd"],
        Group(name="a", members=["ann"]),
        Group(name="b", members=["bob"]),
        half_life_seconds=day,
    )
    draw = {"ann": random.Random(1), "bob": random.Random(2)}

    def ask(owner: str) -> None:
        # Heavy-tailed, an hour on average.
        seconds = max(10.0, 3600 * math.exp(draw[owner].gauss(0.0, 1.5) - 1.125))
        world.ask(owner, seconds, gpus=draw[owner].choice([1, 1, 2, 4, 8]))

    for owner in draw:
        for _ in range(30):
            ask(owner)
    ends: list[tuple[float, str]] = []
    spent = {"ann": 0.0, "bob": 0.0}
    while world.now < 2 * day:
        for owner in world.serve():
            ask(owner)
        for lease in world.running.keys() - {lease for _, lease in ends}:
            entry = world.running[lease]
            heappush(ends, (world.now + entry.estimate.seconds, lease))
            # What of it is within the last half-life.
            within = min(world.now + entry.estimate.seconds, 2 * day) - max(world.now, day)
            spent[entry.request.owner] += max(0.0, within) * entry.request.gpus
        world.now, lease = heappop(ends)
        world.end(lease)
    assert spent["ann"] / sum(spent.values()) == pytest.approx(0.5, rel=0.005)


def test_idle_days_are_not_held_against_a_burst() -> None:
    world = World(
        [Node("a", 64_000, 1000, 4, "H100")], Group(name="busy", members=["ann"]), Group(name="calm", members=["bob"])
    )
    for day in range(6):
        world.now = day * 86_400.0
        world.ask("ann", gpus=2)
        world.serve()
        world.now += 80_000
        for lease in list(world.running):
            world.end(lease)
    for _ in range(4):
        world.ask("ann")
        world.ask("bob")
    assert world.serve() == ["bob"] * 4


class ExhaustiveLine(Line):
    """A line that tries all that wait at each walk."""

    def _exhausted(self, group: object) -> bool:
        return False

    def _admission(self, group: LineGroup) -> Admission:
        group.admission = None
        return super()._admission(group)


@pytest.mark.parametrize("seed", range(2))
def test_whom_quotas_let_nothing_start_is_not_tried_and_starts_when_all_that_wait_would(seed: int) -> None:
    groups = [Group(name=f"c{number}", limit=gpus(any=10)) for number in range(3)]
    groups += [
        Group(
            name=f"c{number}/{name}",
            guarantee=gpus(any=3),
            borrowing_limit=gpus(any=4),
            weight=1 + number,
            members=[f"{name}{number}"],
        )
        for number in range(3)
        for name in ("p", "q")
    ]
    worlds = [World([*TWO_KINDS, Node("c", 64_000, 1000, 8, "T4")], *groups) for _ in range(2)]
    worlds[1].line = ExhaustiveLine(worlds[1].fleet, Policies("best-fit"), groups=worlds[1].state)
    rng = random.Random(seed)
    slept = 0
    for _ in range(150):
        for _ in range(rng.choice([0, 0, 1, 3])):
            owner = rng.choice(["p0", "p1", "p2", "q0", "q1", "q2", "nobody"])
            fields: dict[str, object] = {"gpus": rng.choice([1, 1, 2, 4]), "priority": rng.choice([0, 5])}
            fields["preemptible"] = rng.random() < 0.7
            seconds = rng.choice([10.0, 1000.0])
            for world in worlds:
                world.ask(owner, seconds, **fields)
        if worlds[0].running and rng.random() < 0.6:
            ended = rng.choice(sorted(worlds[0].running))
            for world in worlds:
                world.end(ended)
        if rng.random() < 0.1 and len(worlds[0].line):
            gone = rng.randrange(len(worlds[0].line))
            for world in worlds:
                world.line.withdraw(list(world.line)[gone])
        for world in worlds:
            world.now += 5.0
        started = [world.serve() for world in worlds]
        assert started[0] == started[1]
        owed = [[(group.entries[0].number, ask.key) for group, ask in world.line.owed] for world in worlds]
        assert owed[0] == owed[1]
        slept += len(list(worlds[0].line.groups)) - sum(map(len, worlds[0].line.awake().values()))
    assert slept > 60


@pytest.mark.parametrize("preemptible", [True, False])
def test_quotas_judge_a_model_as_if_it_were_asked_for_alone(preemptible: bool) -> None:
    nodes = [Node(name, 64_000, 1000, 8, name) for name in ("A100", "H100", "L40S", "T4")]
    world = World(
        nodes,
        Group(name="lab", limit=gpus(H100=6, any=20)),
        Group(name="lab/vision", guarantee=gpus(H100=4, any=3), limit=gpus(L40S=2), members=["ann"]),
        Group(name="lab/nlp", guarantee=gpus(T4=2), members=["bob"]),
        Group(name="ops", guarantee=gpus(A100=6, any=2), members=["eve"]),
    )
    draw = random.Random(1)
    for _ in range(60):
        world.ask(draw.choice(["ann", "bob", "eve", "zoe"]), gpus=draw.choice([1, 2]), preemptible=draw.random() < 0.5)
        world.serve()
        if len(world.running) > 12:
            world.end(draw.choice(list(world.running)))
        for name in ("lab/vision", "lab/nlp", "ops", "default"):
            node, use, count = world.state.tree.nodes[name], world.state.use, draw.choice([1, 2, 4]) * WHOLE_SHARE
            models = ("A100", "H100", "L40S", "T4")
            together = use.admission(node, models, count, 0, 0, preemptible)
            alone = {model: use.admission(node, (model,), count, 0, 0, preemptible) for model in models}
            over = tuple(model for model in models if alone[model].barred is None)
            beyond = tuple(model for model in models if alone[model].within is None)
            assert together.barred == (None if len(over) == 4 else over)
            assert together.within == (None if len(beyond) == 4 else beyond)
            assert together.reason == next((each.reason for each in alone.values() if each.reason), "")


def test_what_the_fleet_has_follows_each_of_its_changes() -> None:
    nodes = [Node(f"n{at}", 64_000, 1000, 4, ("H100", "T4")[at % 2]) for at in range(6)]
    world = World(nodes, Group(name="lab", members=["ann"]), prices={"H100": 3})
    draw, seen = random.Random(2), set[float]()
    for _ in range(60):
        world.now += 1.0
        world.ask("ann", gpus=draw.choice([1, 2]))
        if world.running and draw.random() < 0.5:
            world.end(draw.choice(list(world.running)))
        apply(world.fleet, Drains(drains={f"host:n{at}": "x" for at in range(6) if draw.random() < 0.2}))
        world.serve()
        world.state.note_fleet(world.fleet)
        anew = GroupState(world.state.tree.config)
        anew.note_fleet(world.fleet)
        assert world.state.usage.total == anew.usage.total
        seen.add(anew.usage.total.devices)
    assert len(seen) > 5


@settings(deadline=None, max_examples=40)
@cases(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("ask"),
                st.sampled_from(["ann", "bob", "eve", "zoe"]),
                st.sampled_from([1, 1, 2, 4]),
                st.booleans(),
                st.sampled_from([[], ["*h100*"], ["*t4*"]]),
            ),
            st.tuples(st.just("end"), st.integers(0, 99)),
            st.tuples(st.just("pass"), st.sampled_from([10.0, 1000.0])),
        ),
        min_size=5,
        max_size=40,
    )
)
def test_no_limit_is_exceeded_and_firm_work_leaves_guarantees_alone(history: list[tuple]) -> None:
    groups = (
        Group(name="lab", guarantee=gpus(H100=4, any=2), limit=gpus(any=10)),
        Group(name="lab/x", guarantee=gpus(H100=2), borrowing_limit=gpus(H100=1), members=["ann"]),
        Group(name="lab/y", weight=2, members=["bob"]),
        Group(name="ops", guarantee=gpus(any=4), members=["eve"]),
    )
    world = World(TWO_KINDS, *groups)
    for kind, *rest in history:
        if kind == "ask":
            owner, count, preemptible, models = rest
            world.ask(owner, gpus=count, preemptible=preemptible, models=models)
        elif kind == "end" and world.running:
            world.end(list(world.running)[rest[0] % len(world.running)])
        elif kind == "pass":
            world.now += rest[0]
        world.serve()
        assert sum(world.used("lab").values()) <= 10
        assert world.used("lab/x").get("H100", 0) <= 3
        # Recomputed from what runs, firm work leaves room for all guarantees.
        firm: dict[str, dict[str, int]] = {owner: {} for owner in ("ann", "bob", "eve", "zoe")}
        for lease, entry in world.running.items():
            if not entry.request.preemptible:
                for model, share in world.state.use.holdings[lease].amounts.devices.items():
                    held = firm[entry.request.owner]
                    held[model] = held.get(model, 0) + share // WHOLE_SHARE
        lab = {model: firm["ann"].get(model, 0) + firm["bob"].get(model, 0) for model in ("H100", "T4")}
        every = {model: sum(held.get(model, 0) for held in firm.values()) for model in ("H100", "T4")}
        owed_h100 = max(0, 4 - lab["H100"])
        if every["H100"] > lab["H100"]:  # others hold firm H100s: those of lab must still be there
            assert every["H100"] + owed_h100 <= 8
        before = {lease: world.state.use.holdings[lease] for lease in world.running}
        assert before == world.state.use.holdings


@settings(deadline=None, max_examples=30)
@cases(
    st.lists(
        st.tuples(st.sampled_from(["ann", "xia", "eve", "zoe"]), st.sampled_from([8, 16, 32]), st.booleans())
        | st.tuples(st.just("end"), st.integers(0, 99), st.just(False)),
        min_size=5,
        max_size=40,
    )
)
def test_firm_work_leaves_guaranteed_cores_to_others(history: list[tuple[str, int, bool]]) -> None:
    world = World(
        TWO_KINDS,
        Group(name="lab", guarantee=Resources(cpus=64), members=["ann"]),
        Group(name="lab/x", guarantee=Resources(cpus=32), members=["xia"]),
        Group(name="ops", guarantee=Resources(cpus=16), members=["eve"]),
    )
    for owner, number, preemptible in history:
        if owner != "end":
            world.ask(owner, gpus=0, cpus=number, preemptible=preemptible)
        elif world.running:
            world.end(list(world.running)[number % len(world.running)])
        world.serve()
        firm = dict.fromkeys(("ann", "xia", "eve", "zoe"), 0.0)
        for entry in world.running.values():
            if not entry.request.preemptible:
                firm[entry.request.owner] += entry.request.cpus
        lab = max(0.0, 64 - firm["ann"] - firm["xia"], 32 - firm["xia"])
        assert sum(firm.values()) + lab + max(0.0, 16 - firm["eve"]) <= 128


def test_guaranteed_cores_are_kept_from_firm_work_and_lent_to_other() -> None:
    world = World(
        TWO_KINDS,
        Group(name="lab", guarantee=Resources(cpus=64), members=["ann"]),
        Group(name="lab/x", guarantee=Resources(cpus=32), members=["xia"]),
    )
    for _ in range(5):
        world.ask("zoe", gpus=0, cpus=16)
    assert world.serve() == ["zoe"] * 4
    (waiting,) = world.line
    assert "what is free of the cores is guaranteed to other groups" in waiting.group.refused
    world.line.withdraw(waiting)
    # Half of what lab is guaranteed is that of lab/x, whose members have not asked yet.
    for _ in range(3):
        world.ask("ann", gpus=0, cpus=16)
    assert world.serve() == ["ann"] * 2
    world.ask("xia", gpus=0, cpus=32)
    assert world.serve() == ["xia"]
    # What may be given back may borrow, and a request for a device counts with its cores.
    for lease in list(world.running):
        world.end(lease)
    for entry in list(world.line):
        world.line.withdraw(entry)
    for _ in range(8):
        world.ask("zoe", cpus=16, preemptible=True)
    assert world.serve() == ["zoe"] * 8
    for lease in list(world.running):
        world.end(lease)
    for _ in range(8):
        world.ask("zoe", cpus=16)
    assert world.serve() == ["zoe"] * 4


def test_usage_is_the_decayed_sum_of_all_lease_seconds() -> None:
    tree = Tree(GroupTree(groups=[Group(name="lab/x", members=["ann"])], prices={"H100": 4.0}))
    usage = Usage(tree)
    rng = random.Random(1)
    events: list[tuple[float, int, str]] = []
    exact = 0.0
    end = 30 * 86_400.0
    for number in range(200):
        start = rng.uniform(0, end * 0.9)
        stop = min(end, start + rng.uniform(60, 200_000))
        events += [(start, 1, f"l{number}"), (stop, 0, f"l{number}")]
        rate = 0.5 ** ((end - stop) / HALF_LIFE) - 0.5 ** ((end - start) / HALF_LIFE)
        exact += 4.0 * rate * HALF_LIFE / 0.6931471805599453
    events.sort()
    for at in range(len(events) - 1):  # those that are heard late count as well
        if rng.random() < 0.2 and events[at][2] != events[at + 1][2]:
            events[at], events[at + 1] = events[at + 1], events[at]
    for at, starts, lease in events:
        if starts:
            usage.starts(lease, "ann", Amounts({"NVIDIA H100": WHOLE_SHARE}), at)
        else:
            usage.ends(lease, at)
    saved = usage.saved(end)
    assert saved["ann"][0] == pytest.approx(exact, rel=1e-9)
    again = Usage(tree)
    again.load(saved, end)
    assert again.saved(end + HALF_LIFE)["ann"][0] == pytest.approx(exact / 2, rel=1e-9)


def test_past_use_halves() -> None:
    past = PastUse()
    past.add(0.0, (1.0, 0.0, 0.0), 100.0)
    past.add(100.0, (-1.0, 0.0, 0.0), 100.0)
    before = past.done[0]
    past.settle(200.0, 100.0)
    assert past.done[0] == pytest.approx(before / 2)


def test_what_a_group_is_owed_under_the_limit_of_another_is_taken_back_within_that() -> None:
    world = World(
        [Node("a", 64_000, 1000, 8, "H100")],
        Group(name="lab", limit=gpus(any=4)),
        Group(name="lab/x", guarantee=gpus(any=2), members=["ann"]),
        Group(name="lab/y", guarantee=gpus(any=2), members=["bob"]),
        Group(name="ops", members=["eve"]),
    )
    world.ask("eve", preemptible=True)
    for _ in range(4):
        world.ask("bob", preemptible=True)
    world.serve()
    assert sum(world.used("lab").values()) == 4
    ann = world.ask("ann", gpus=2)
    assert world.serve() == []  # though three devices are free
    ((group, ask),) = world.line.owed
    nodes, use = world.state.tree.nodes, world.state.use
    assert (group.entries, group.limited) == ([ann], nodes["lab"])
    assert use.excess(nodes["lab"], "H100", 2 * WHOLE_SHARE) == 2 * WHOLE_SHARE
    candidates = [
        Candidate(lease, nodes["lab/y"], use.holdings[lease].amounts, float(at), 0.0)
        for at, (lease, entry) in enumerate(world.running.items())
        if entry.request.owner == "bob"
    ]
    reclaim = Reclaim(world.fleet, use, nodes["lab"], candidates, Pending())
    chosen = reclaim.make_room(2 * WHOLE_SHARE, nodes["lab/x"], nodes["lab"])
    assert chosen is not None
    assert len(chosen) == 2
    assert reclaim.make_room(3 * WHOLE_SHARE, nodes["lab/x"], nodes["lab"]) is None
    for each in chosen:
        world.end(each.lease_id)
    assert world.serve() == ["ann"]
    assert ask.gpus == 2
