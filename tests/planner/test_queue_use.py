"""Use of the fleet by owner, and the order that rests on it."""

from __future__ import annotations

import math

import pytest
from corral.planner.fleet.fleet import free, hold
from corral.planner.placement.decide import Policies
from corral.planner.queue.durations import given
from corral.planner.queue.line import Line
from corral.planner.queue.order import fair
from corral.planner.queue.use import Use
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.timed import grants_of
from corral.planner.simulation.trace import Node
from corral.schemas.requests import WorkRequest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

HALF_LIFE = 100.0


@settings(deadline=None, max_examples=60)
@cases(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.floats(0, 300), st.floats(100, 300)),
        min_size=1,
        max_size=12,
    )
)
def test_use_is_the_faded_integral_and_shares_of_all_owners_make_their_number(
    leases: list[tuple[str, int, float, float]],
) -> None:
    use, now = Use(HALF_LIFE), 450.0
    steps = [(at, 0, number) for number, (_, _, at, _) in enumerate(leases)]
    steps += [(at + length, 1, number) for number, (_, _, at, length) in enumerate(leases) if at + length <= now]
    for at, ends, number in sorted(steps):
        if ends:
            use.ends(str(number), at)
        else:
            use.starts(str(number), leases[number][0], leases[number][1], at)
    rate = math.log(2) / HALF_LIFE
    for owner in "abc":
        expected = sum(
            gpus * (math.exp(-rate * (now - min(now, at + length))) - math.exp(-rate * (now - at))) / rate
            for name, gpus, at, length in leases
            if name == owner
        )
        assert use.of(owner, now) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    owners = sorted({name for name, *_ in leases})
    assert sum(use.share(owner, now) for owner in owners) == pytest.approx(len(owners), rel=1e-6)
    # What has ended long ago is as if it had never been; what runs on has come to a constant.
    running = [
        sum(gpus for name, gpus, at, length in leases if name == owner and at + length > now) for owner in owners
    ]
    assert use.of_all(owners, now + 1e5)[0].tolist() == pytest.approx([gpus / rate for gpus in running], abs=1e-6)


def test_of_equal_work_the_lighter_owner_goes_first_and_brief_work_of_a_heavy_one_before_long() -> None:
    fleet = fleet_of([Node("a", 10**9, 10**6, 8, "H100")])
    line = Line(fleet, Policies("best-fit"), fair)
    line.arrive(WorkRequest(owner="heavy", gpus=8), given(1000.0), 0.0)
    (start,) = line.serve(0.0)
    hold(fleet, "l", grants_of(start.picks))
    line.started("l", start.entry, 0.0)
    line.arrive(WorkRequest(owner="light", gpus=1), given(1.0), 0.0)
    asked = {
        name: line.arrive(WorkRequest(owner=name.split()[0], gpus=8), given(seconds), 500.0)
        for name, seconds in (("heavy", 600.0), ("light", 600.0), ("heavy brief", 100.0))
    }
    line.renew(1000.0)
    order = [entry for entry in line if entry in asked.values()]
    assert order == [asked["heavy brief"], asked["light"], asked["heavy"]]
    line.ended("l", 1000.0)
    free(fleet, "l")
