"""The set of devices that is joined best, against all sets."""

from __future__ import annotations

from itertools import combinations

import corral.planner.fleet.fleet as fold
import msgspec
from corral.planner.fleet.topology import Topology, best_exact, best_greedy, connectivity, levels_of
from corral.schemas.telemetry import Link
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planner_world import ask, fleet_of, inventory, placed

A100 = "NVIDIA A100-SXM4-40GB"


@st.composite
def levels(draw: st.DrawFn, most: int = 9) -> tuple[tuple[int, ...], ...]:
    count = draw(st.integers(1, most))
    found = [[0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            found[i][j] = found[j][i] = draw(st.sampled_from([8, 16, 22, 50, 300]))
    return tuple(map(tuple, found))


@settings(max_examples=80, deadline=None)
@given(st.data(), levels())
def test_the_exact_search_finds_the_best_of_all_sets(data: st.DataObject, found: tuple[tuple[int, ...], ...]) -> None:
    places = data.draw(st.lists(st.sampled_from(range(len(found))), unique=True, min_size=1))
    count = data.draw(st.integers(1, len(places)))
    best = best_exact(found, tuple(places), count)
    assert len(set(best)) == count
    assert set(best) <= set(places)

    def key(chosen: tuple[int, ...]) -> tuple[int, int, int]:
        worst, inside = connectivity(found, chosen)
        lost = sum(found[a][b] for a in chosen for b in places if b not in chosen)
        return (worst, inside, -lost)

    top = max(key(each) for each in combinations(places, count))
    assert key(best) == top
    greedy = best_greedy(found, tuple(places), count)
    assert len(set(greedy)) == count
    assert set(greedy) <= set(places)
    assert connectivity(found, greedy) <= top[:2]


def islands(size: int, count: int, inside: Link, outside: Link) -> list[list[Link]]:
    total = size * count
    return [
        [Link.SAME if i == j else inside if i // size == j // size else outside for j in range(total)]
        for i in range(total)
    ]


def test_sixteen_devices_are_searched_exactly_and_fast_enough_to_wait_for() -> None:
    matrix = islands(4, 4, Link.NVLINK, Link.SYSTEM)
    found = levels_of(inventory("h0", [A100] * 16, links=matrix))
    assert found is not None
    order = tuple(reversed(range(16)))
    assert best_exact(found, order, 4) == (12, 13, 14, 15)
    assert connectivity(found, best_exact(found, order, 8)) == (8, 12 * 25 + 16 * 8)


def test_a_request_gets_the_pair_that_is_joined_and_leaves_the_other_island_whole() -> None:
    matrix = islands(4, 2, Link.NVLINK, Link.SYSTEM)
    fleet = fleet_of(inventory("h0", [A100] * 8, links=matrix))
    first = placed(ask(fleet, gpus=2)).grants
    assert {grant.index // 4 for grant in first} == {0}
    fold.hold(fleet, "l1", first)
    second = placed(ask(fleet, gpus=2)).grants
    assert {grant.index // 4 for grant in second} == {0}
    fold.hold(fleet, "l2", second)
    assert [grant.index for grant in placed(ask(fleet, gpus=4)).grants] == [4, 5, 6, 7]


def test_more_nvlinks_are_better_than_fewer() -> None:
    matrix = [[Link.SAME if i == j else Link.NVLINK for j in range(4)] for i in range(4)]
    counts = [[0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]]
    event = msgspec.structs.replace(inventory("h0", [A100] * 4, links=matrix), nvlink_counts=counts)
    fleet = fleet_of(event)
    assert [grant.index for grant in placed(ask(fleet, gpus=2)).grants] == [0, 3]


def test_equal_links_need_no_topology() -> None:
    matrix = [[Link.SAME if i == j else Link.NVLINK for j in range(8)] for i in range(8)]
    assert levels_of(inventory("h0", [A100] * 8, links=matrix)) is None
    assert levels_of(inventory("h0", [A100] * 2, links=[[Link.SAME, Link.NVLINK], [Link.NVLINK, Link.SAME]])) is None
    assert Topology(((0, 5), (5, 0))).connectivity((0, 1)) == (5, 5)
