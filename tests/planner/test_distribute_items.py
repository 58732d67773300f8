"""Distribution: nothing lost, nothing doubled, no limit broken, and as good as the best where that can be counted."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
from corral.planner.placement.decide import InvalidRequest, Placed, Policies, decide
from corral.planner.work.apportion import apportion
from corral.planner.work.balance import EXACT_ITEMS, Machine, balance, lower_bound, span
from corral.planner.work.distribute import Outcome, distribute, items_of
from corral.planner.work.pipeline import pipeline
from corral.schemas.requests import Distribution, Grant, Method, WeightBy, WorkItem, WorkRequest
from corral.schemas.telemetry import DeviceInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.planner_world import GIB, NOW, fleet_of, inventory

costs_of = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.5, 7.0, 10.0])
sizes_of = st.sampled_from([0, 1, 2, 3, 5, 8])
machines_of = st.builds(
    Machine,
    st.sampled_from([1.0, 1.0, 2.0, 3.3]),
    st.sampled_from([0, 4, 8, 12, 1000]),
    st.sampled_from([None, None, None, 1, 2]),
)


@st.composite
def works(draw: st.DrawFn) -> tuple[Distribution, list[Grant], list[DeviceInfo]]:
    count = draw(st.integers(1, 6))
    form = draw(st.integers(0, 2))
    items: int | list[str | WorkItem]
    if form == 0:
        items = draw(st.integers(0, 60))
    elif form == 1:
        items = [f"i{n}" for n in range(draw(st.integers(0, 30)))]
    else:
        items = [
            WorkItem(id=f"i{n}", memory_bytes=draw(sizes_of), cost=draw(costs_of))
            for n in range(draw(st.integers(0, 30)))
        ]
    given_weights = [draw(st.sampled_from([0.5, 1.0, 2.0, 7.0])) for _ in range(count)]
    work = Distribution(
        items=items,
        method=draw(st.sampled_from([method for method in Method if method is not Method.SERVE])),
        weight_by=draw(st.sampled_from(list(WeightBy))),
        weights=given_weights,
        max_items_per_device=draw(st.sampled_from([None, None, 1, 5])),
        memory_per_item_bytes=draw(st.sampled_from([0, 0, 1, 3])),
    )
    grants = [
        Grant(host="h", device=f"g{n}", memory_bytes=draw(st.sampled_from([0, 7, 40, 10**6])), share=1.0)
        for n in range(count)
    ]
    infos = [
        DeviceInfo(
            uuid=f"g{n}", host="h", index=n, sm_count=draw(st.sampled_from([0, 40, 132])), sm_clock_max_megahertz=9
        )
        for n in range(count)
    ]
    return work, grants, infos


def check(work: Distribution, grants: list[Grant], outcome: Outcome) -> None:
    """Every item once; memory and limits kept; the report true."""
    items = items_of(work)
    known = dict(zip(items.ids, zip(items.costs, items.sizes, strict=True), strict=True))
    given_out = [item for grant in outcome.grants for item in grant.items]
    left_out = [item.id for item in outcome.unassigned]
    assert len(given_out) + len(left_out) == len(items.ids)
    assert set(given_out) | set(left_out) == set(items.ids)
    assert all(item.reason for item in outcome.unassigned)
    times: list[float] = []
    for before, grant, weight in zip(grants, outcome.grants, outcome.report.weights, strict=True):
        assert (grant.device, grant.memory_bytes) == (before.device, before.memory_bytes)
        assert sum(known[item][1] for item in grant.items) <= grant.memory_bytes
        assert work.max_items_per_device is None or len(grant.items) <= work.max_items_per_device
        times.append(sum(known[item][0] for item in grant.items) / weight)
    assert outcome.report.makespan == pytest.approx(max(times))
    assert outcome.report.bound <= outcome.report.makespan
    # Whoever is left out does not fit where it could have gone.
    if work.method is not Method.PIPELINE:
        for item in left_out:
            for grant in outcome.grants:
                room = grant.memory_bytes - sum(known[held][1] for held in grant.items)
                full = work.max_items_per_device is not None and len(grant.items) >= work.max_items_per_device
                assert full or known[item][1] > room


@settings(max_examples=100, deadline=None)
@given(works())
def test_every_item_is_given_to_one_device_or_listed(made: tuple[Distribution, list[Grant], list[DeviceInfo]]) -> None:
    work, grants, infos = made
    outcome = distribute(work, grants, infos)
    check(work, grants, outcome)
    if work.method is Method.PIPELINE:
        order = [item for grant in outcome.grants for item in grant.items]
        assert order == list(items_of(work).ids)[: len(order)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_counts_follow_the_largest_remainder_rule(total: int, weights: list[float]) -> None:
    counts = apportion(total, weights)
    whole = sum(Fraction(weight) for weight in weights)
    quotas = [total * Fraction(weight) / whole for weight in weights]
    assert sum(counts) == total
    assert all(math.floor(quota) <= count <= math.ceil(quota) for quota, count in zip(quotas, counts, strict=True))
    up = [quota - math.floor(quota) for quota, count in zip(quotas, counts, strict=True) if count > quota]
    down = [quota - math.floor(quota) for quota, count in zip(quotas, counts, strict=True) if count < quota]
    assert not up or not down or min(up) >= max(down)
    even = apportion(total, [1.0] * len(weights))
    assert max(even) - min(even) <= 1


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 80), st.lists(st.tuples(st.floats(0.1, 10), st.one_of(st.none(), st.integers(0, 20))), min_size=1)
)
def test_limits_are_kept_and_used_up_before_anything_is_left_out(
    total: int, places: list[tuple[float, int | None]]
) -> None:
    limits = [limit for _, limit in places]
    counts = apportion(total, [weight for weight, _ in places], limits)
    assert all(limit is None or count <= limit for count, limit in zip(counts, limits, strict=True))
    room = math.inf if None in limits else sum(limit for limit in limits if limit is not None)
    assert sum(counts) == min(total, room)


def brute(costs: list[float], sizes: list[int], machines: list[Machine]) -> tuple[int, float]:
    """Fewest items left out, then the smallest makespan, over every assignment."""
    best = (len(costs) + 1, math.inf)
    for place in product(range(-1, len(machines)), repeat=len(costs)):
        held = [[at for at, machine in enumerate(place) if machine == which] for which in range(len(machines))]
        if any(
            sum(sizes[at] for at in items) > machine.memory or (machine.most is not None and len(items) > machine.most)
            for items, machine in zip(held, machines, strict=True)
        ):
            continue
        best = min(best, (place.count(-1), span(costs, machines, place)))
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(costs_of, sizes_of), min_size=1, max_size=6),
    st.lists(machines_of, min_size=1, max_size=3),
)
def test_few_items_are_balanced_as_well_as_can_be(items: list[tuple[float, int]], machines: list[Machine]) -> None:
    costs, sizes = [cost for cost, _ in items], [size for _, size in items]
    found = balance(costs, sizes, machines)
    left_out, makespan = brute(costs, sizes, machines)
    assert found.place.count(-1) == left_out
    if len(set(items)) > 1:  # of equal items every choice of those left out is as good
        assert found.makespan == pytest.approx(makespan)
    assert found.optimal
    assert found.bound == pytest.approx(found.makespan)
    placed = [at for at, machine in enumerate(found.place) if machine >= 0]
    assert lower_bound(costs, sizes, machines, placed) <= found.makespan * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 3)), min_size=EXACT_ITEMS + 1, max_size=60),
    st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=1, max_size=6),
)
def test_many_items_come_within_the_bound_that_is_told(items: list[tuple[float, int]], speeds: list[float]) -> None:
    costs, sizes = [cost for cost, _ in items], [size for _, size in items]
    machines = [Machine(speed, 10**6) for speed in speeds]
    found = balance(costs, sizes, machines)
    assert -1 not in found.place
    assert found.bound <= found.makespan <= 2 * found.bound * (1 + 1e-9)  # LPT's guarantee on uniform machines


def brute_stages(costs: list[float], sizes: list[int], machines: list[Machine]) -> tuple[int, float]:
    """How far any split comes, and the smallest slowest stage of those that come so far."""
    best: dict[int, float] = {0: 0.0}
    for machine in machines:
        after: dict[int, float] = {}
        for start, slowest in best.items():
            for end in range(start, len(costs) + 1):
                if sum(sizes[start:end]) > machine.memory or (machine.most is not None and end - start > machine.most):
                    break
                time = max(slowest, sum(costs[start:end]) / machine.speed)
                after[end] = min(after.get(end, math.inf), time)
        best = after
    return max(best), best[max(best)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(costs_of, sizes_of), min_size=1, max_size=12),
    st.lists(machines_of, min_size=1, max_size=5),
)
def test_the_slowest_stage_is_as_fast_as_can_be(items: list[tuple[float, int]], machines: list[Machine]) -> None:
    costs, sizes = [cost for cost, _ in items], [size for _, size in items]
    found = pipeline(costs, sizes, machines)
    reached, slowest = brute_stages(costs, sizes, machines)
    assert found.ends[-1] == reached
    assert found.slowest == slowest  # sums of these costs are exact
    assert found.ends == sorted(found.ends)


def test_a_million_equal_items_are_counted_not_searched() -> None:
    grants = [Grant(host="h", device=f"g{n}", memory_bytes=GIB) for n in range(3)]
    infos = [DeviceInfo(uuid=f"g{n}", host="h", index=n) for n in range(3)]
    for method in set(Method) - {Method.SERVE}:
        work = Distribution(items=1_000_000, method=method, weight_by=WeightBy.GIVEN, weights=[1.0, 2.0, 5.0])
        outcome = distribute(work, grants, infos)
        counts = [len(grant.items) for grant in outcome.grants]
        if method is Method.UNIFORM:
            assert counts == [333_334, 333_333, 333_333]
        else:
            assert counts == [125_000, 250_000, 625_000]


def test_the_planner_distributes_over_what_it_grants() -> None:
    fleet = fleet_of(inventory("h0", ["NVIDIA H100 80GB HBM3", "Tesla T4"]))
    items: list[str | WorkItem] = [
        WorkItem(id="big", memory_bytes=60 * GIB, cost=5),
        "a",
        "b",
        WorkItem(id="x", memory_bytes=90 * GIB),
    ]
    work = Distribution(items=items, method=Method.BALANCED)
    decision = decide(fleet, WorkRequest(owner="me", gpus=2, distribution=work), NOW, Policies())
    assert isinstance(decision, Placed)
    assert "big" in decision.grants[0].items
    assert [item.id for item in decision.unassigned] == ["x"]
    assert decision.unassigned[0].reason == "it needs 90.0 GiB, and no device has more than 80.0 GiB"
    assert decision.distribution is not None
    assert decision.distribution.weights == [132 * 1980, 40 * 1590]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"gpus": 2, "distribution": Distribution(items=3, weights=[1.0])}, "$.distribution.weights"),
        ({"distribution": Distribution(items=3, weight_by=WeightBy.GIVEN)}, "$.distribution.weights"),
        ({"distribution": Distribution(items=["a", "b", "a"])}, "$.distribution.items"),
        ({"gpus": 0, "cpus": 1.0, "distribution": Distribution(items=3)}, "$.distribution"),
        ({"gpus": 2, "gpu_share": 0.5}, "$.gpu_share"),
        ({"gpus": 0}, "$.gpus"),
        ({"gpus": 0, "cpus": 1.0, "gpu_memory_bytes": 5}, "$.gpu_memory_bytes"),
        ({"policy": "best"}, "$.policy"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused_by_field(fields: dict[str, object], field: str) -> None:
    fleet = fleet_of(inventory("h0", ["Tesla T4", "Tesla T4"]))
    request = WorkRequest(owner="me", **fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidRequest) as refused:
        decide(fleet, request, NOW, Policies())
    assert refused.value.field == field
