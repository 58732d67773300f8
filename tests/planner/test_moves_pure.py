"""The fewest leases to take, against all sets of leases one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product

import corral.planner.fleet.fleet as fold
from corral.planner.placement.decide import Placed, Policies, ask_of, decide
from corral.planner.queue.move_sites import sites_for, whole_hosts, why_not_free
from corral.planner.queue.moves import Site, best_of, fewest
from corral.schemas.operations import Drains
from corral.schemas.requests import Grant, Placement, WorkRequest
from corral.schemas.telemetry import Inventory
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planner_world import GIB, NOW, ask, fleet_of, inventories, inventory, placed, requests

T4 = "Tesla T4"


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Site], dict[str, float], int]:
    """Hosts of devices with leases on them, some on several hosts, some that can't go; and the units wanted."""
    names = [f"l{number}" for number in range(draw(st.integers(0, 7)))]
    held = [[set[str]() for _ in range(draw(st.integers(1, 4)))] for _ in range(draw(st.integers(1, 4)))]
    for name in names:
        for _ in range(draw(st.integers(1, 3))):
            draw(st.sampled_from(draw(st.sampled_from(held)))).add(name)
    for device in (device for host in held for device in host):
        if draw(st.integers(0, 7)) == 0:
            device.add("stays")
    together = draw(st.sampled_from([0, 1, 2, 3]))
    sites: list[Site] = []
    for number, host in enumerate(held):

        def units(gone: Sequence[str], host: list[set[str]] = host) -> int:
            free = sum(device <= set(gone) for device in host)
            return int(free >= together) if together else free

        leases = tuple(sorted({lease for device in host for lease in device} - {"stays"}))
        sites.append(Site(f"h{number}", leases, units))
    prices = {name: float(draw(st.integers(0, 5))) for name in names}
    return sites, prices, draw(st.integers(1, 5))


def every_set(sites: Sequence[Site], prices: Mapping[str, float], wanted: int) -> tuple[int, float] | None:
    """Number and price of the best set, by trying all."""
    leases = sorted({lease for site in sites for lease in site.leases})
    for size in range(len(leases) + 1):
        found = [
            sum(prices[lease] for lease in chosen)
            for chosen in combinations(leases, size)
            if sum(site.units(frozenset(chosen)) for site in sites) >= wanted
        ]
        if found:
            return size, min(found)
    return None


@settings(deadline=None, max_examples=120)
@given(worlds(), st.sampled_from([None, 0, 3, 20]))
def test_no_set_of_leases_is_smaller_or_as_small_and_cheaper(
    world: tuple[list[Site], dict[str, float], int], limit: int | None
) -> None:
    sites, prices, wanted = world
    best = every_set(sites, prices, wanted)
    choice = fewest(sites, prices, wanted) if limit is None else fewest(sites, prices, wanted, limit)
    assert (choice is None) == (best is None)
    if choice is None or best is None:
        return
    assert sum(site.units(frozenset(choice.leases)) for site in sites) >= wanted
    assert choice.price == sum(prices[lease] for lease in choice.leases)
    assert (len(choice.leases), choice.price) >= best
    if choice.proven:
        assert (len(choice.leases), choice.price) == best
    assert choice.proven or limit is not None
    assert fewest(sites[::-1], prices, wanted) == fewest(sites, prices, wanted)


def test_of_equal_choices_the_same_is_taken_whatever_the_order_of_the_hosts() -> None:
    def site(host: str, lease: str) -> Site:
        return Site(host, (lease,), lambda gone: int(lease in gone))

    sites = [site("h0", "l2"), site("h1", "l0"), site("h2", "l1")]
    prices = {"l0": 0.0, "l1": 0.0, "l2": 0.0}
    assert fewest(sites, prices, 2) == fewest(sites[::-1], prices, 2)


@settings(deadline=None, max_examples=50)
@given(
    inventories(hosts=4, devices=3),
    st.lists(st.tuples(requests(), st.sampled_from([True, True, False])), max_size=6),
    requests(),
)
def test_a_request_starts_once_they_are_gone_and_not_without_as_many(
    found: list[Inventory], held: list[tuple[WorkRequest, bool]], wish: WorkRequest
) -> None:
    def fleet_without(gone: Sequence[str]) -> fold.Fleet:
        fleet = fleet_of(*found)
        for name, grants in leases.items():
            if name not in gone:
                fold.hold(fleet, name, grants)
        return fleet

    def starts(gone: Sequence[str]) -> bool:
        return isinstance(decide(fleet_without(gone), wish, NOW, policies), Placed)

    policies, leases = Policies("best-fit"), {}
    takes: dict[str, float] = {}
    fleet = fleet_of(*found)
    for number, (request, preemptible) in enumerate(held):
        decision = decide(fleet, request, NOW, policies)
        if isinstance(decision, Placed):
            leases[f"l{number}"] = decision.grants
            fold.hold(fleet, f"l{number}", decision.grants)
            if preemptible:
                takes[f"l{number}"] = float(number % 3)
    going = frozenset(list(takes)[:1])
    takes = {lease: price for lease, price in takes.items() if lease not in going}
    asked = ask_of(fleet, wish)
    asked = fleet.ask(asked.key._replace(prefer_within=""))
    choice = best_of(sites_for(fleet, asked, takes, going), takes)
    sizes = [
        size for size in range(len(takes) + 1) if any(starts([*going, *some]) for some in combinations(takes, size))
    ]
    assert (choice is None) == (not sizes)
    if choice is not None:
        assert choice.proven
        assert starts([*going, *choice.leases])
        assert len(choice.leases) == sizes[0]
        alike = [some for some in combinations(takes, sizes[0]) if starts([*going, *some])]
        assert choice.price == min(sum(takes[lease] for lease in some) for some in alike)


@st.composite
def wishes(draw: st.DrawFn, least: int = 1) -> WorkRequest:
    """Requests for devices of hosts with 4 devices, 8 cores and RAM for them."""
    return WorkRequest(
        owner="me",
        gpus=draw(st.integers(least, 4)),
        cpus=draw(st.sampled_from([0.0, 2.0, 3.0, 5.0])),
        host_memory_bytes=draw(st.sampled_from([0, 0, 100 * GIB])),
        hosts=draw(st.sampled_from([[], ["h0"]])),
        placement=draw(st.sampled_from([Placement.SAME_HOST, Placement.SAME_HOST, Placement.FEWEST_HOSTS])),
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(wishes(2), st.booleans(), st.integers(0, 2)), min_size=2, max_size=4), wishes())
def test_elastic_leases_give_back_rather_than_others_end(
    held: list[tuple[WorkRequest, bool, int]], wish: WorkRequest
) -> None:
    found = [inventory(f"h{n}", [T4] * 4, cpus=8) for n in range(2)]
    policies, leases = Policies("best-fit"), dict[str, list[Grant]]()
    takes, spare = dict[str, float](), dict[str, int]()
    fleet = fleet_of(*found)
    for number, (request, preemptible, most) in enumerate(held):
        decision = decide(fleet, request, NOW, policies)
        if isinstance(decision, Placed):
            name, grants = f"l{number}", decision.grants
            leases[name] = grants
            fold.hold(fleet, name, grants)
            if preemptible:
                takes[name] = float(number)
            if most and len(grants) > most and all(each.device and each.share == 1 for each in grants):
                spare[name] = most

    def starts(gone: Collection[str]) -> bool:
        after = fleet_of(*found)
        for name, grants in leases.items():
            kept = [grant for grant in grants if grant.device not in gone]
            if name not in gone and kept:
                fold.hold(after, name, kept)
        return isinstance(decide(after, wish, NOW, policies), Placed)

    def ways(name: str) -> list[tuple[int, int, tuple[str, ...]]]:
        """Keep a lease, end it, or have it give devices back: leases that end, that give back, and what is gone."""
        devices = [grant.device for grant in leases[name]]
        back = [(0, 1, some) for size in range(1, spare.get(name, 0) + 1) for some in combinations(devices, size)]
        return [(0, 0, ()), *([(1, 0, (name,))] if name in takes else []), *back]

    def cost(each: Sequence[tuple[int, int, tuple[str, ...]]]) -> tuple[int, int]:
        return sum(ends for ends, _, _ in each), sum(back for _, back, _ in each)

    asked = ask_of(fleet, wish)
    asked = fleet.ask(asked.key._replace(prefer_within=""))
    choice = best_of(sites_for(fleet, asked, takes, frozenset(), spare), takes)
    every = sorted(product(*map(ways, leases)), key=cost)
    best = next((each for each in every if starts({one for _, _, gone in each for one in gone})), None)
    # On several hosts, which of them a lease leaves is decided before the search.
    alone = wish.placement is Placement.SAME_HOST
    assert (choice is None) == (best is None) or (choice is None and not alone)
    if choice is None or best is None:
        return
    assert starts(choice.gone)
    assert all(len(uuids) <= spare[name] for name, uuids in choice.back.items())
    found_cost = len(choice.leases), len(choice.back)
    assert found_cost == cost(best) if alone else found_cost >= cost(best)
    for uuid in set[str]().union(*choice.back.values()) if alone else ():
        assert not starts(choice.gone - {uuid})


def test_whole_hosts_are_freed_by_the_fewest_leases_that_may_go() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [T4] * 4) for n in range(5)))
    prices: dict[str, float] = {}
    for name, host, gpus, price in (
        ("a0", "h0", 2, 1.0),
        ("a1", "h0", 1, 1.0),
        ("b0", "h1", 1, 50.0),
        ("c0", "h2", 4, 40.0),
        ("d0", "h3", 1, None),
    ):
        fold.hold(fleet, name, placed(ask(fleet, gpus=gpus, hosts=[host])).grants)
        if price is not None:
            prices[name] = price
    wide = placed(ask(fleet, gpus=4, placement=Placement.SPREAD, hosts=["h0", "h1", "h3", "h4"])).grants
    fold.hold(fleet, "wide", wide)
    prices["wide"] = 0.0

    def plan(wanted: int) -> tuple[str, ...] | None:
        choice = best_of([(whole_hosts(fleet, fleet.hosts.values(), prices, frozenset()), wanted)], prices)
        return None if choice is None else choice.leases

    assert plan(1) == ("wide",)  # h4, for nothing
    assert plan(2) == ("c0", "wide")
    assert plan(3) == ("b0", "c0", "wide")
    assert plan(4) == ("a0", "a1", "b0", "c0", "wide")
    assert plan(5) is None

    def why(host: str) -> str:
        return why_not_free(fleet, fleet.hosts[host], prices, frozenset())

    assert (why("h0"), why("h3")) == ("", "d0 is not preemptible (yet)")
    fold.apply(fleet, Drains(drains={f"device:{fleet.hosts['h0'].devices[2].uuid}": "fan"}))
    assert why("h0") == "GPU 2 drained"


def test_an_elastic_lease_leaves_a_host_that_it_can_leave_wholly() -> None:
    fleet = fleet_of(*(inventory(f"h{n}", [T4] * 4) for n in range(3)))
    wide = [
        grant
        for host, gpus in (("h0", 2), ("h1", 4), ("h2", 1))
        for grant in placed(ask(fleet, gpus=gpus, hosts=[host])).grants
    ]
    fold.hold(fleet, "e0", wide)

    def plan(wanted: int, spare: int) -> tuple[str, ...] | None:
        sites = whole_hosts(fleet, fleet.hosts.values(), {}, frozenset(), {"e0": spare})
        choice = best_of([(sites, wanted)], {})
        return None if choice is None else tuple(sorted(choice.back.get("e0", ())))

    assert plan(1, 1) == ("GPU-h2-0",)
    assert plan(2, 3) == ("GPU-h0-0", "GPU-h0-1", "GPU-h2-0")
    assert plan(2, 2) is None
    assert why_not_free(fleet, fleet.hosts["h1"], {}, frozenset(), {"e0": 3}) == "e0 is not preemptible (yet)"
