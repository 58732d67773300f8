"""The order of those who wait."""

from __future__ import annotations

import corral.planner.fleet.fleet as fold
import pytest
from corral.planner.leases.queue import Reaches, WaitingQueue
from corral.schemas import globs
from corral.schemas.requests import Rejection, RejectionCode, WorkRequest
from hypothesis import given
from hypothesis import strategies as st
from planner_world import MODELS, fleet_of, inventory

WHY = Rejection(code=RejectionCode.NO_CAPACITY, message="full")


def request(owner: str, priority: int = 0, models: list[str] | None = None, wait: float = 100.0) -> WorkRequest:
    return WorkRequest(owner=owner, priority=priority, wait_seconds=wait, models=models or [])


H100, T4 = "NVIDIA H100 80GB HBM3", "Tesla T4"
NAMES = ["h1", "h2", "h10", "k1", "H3"]
GLOBS = st.lists(st.sampled_from(["h*", "H1", "h?", "k1", "[hk]1", "*", "x"]), max_size=3)
MODEL_GLOBS = st.lists(st.sampled_from(["*h100*", "*A100*", "Tesla*", "tesla t4", "*", "x"]), max_size=2)


def fleet() -> fold.Fleet:
    return fleet_of(inventory("h0", [H100, T4]))


def fits(name: str, patterns: list[str]) -> bool:
    return not patterns or globs.matches_any(name.lower(), [glob.lower() for glob in patterns])


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(1, 50)), max_size=20))
def test_priority_comes_first_and_then_arrival(arrivals: list[tuple[int, float]]) -> None:
    queue = WaitingQueue(Reaches(fleet()))
    for number, (priority, wait) in enumerate(arrivals):
        queue.add(request(f"c{number}", priority, wait=wait), float(number), WHY, None)
    order = [int(entry.owner[1:]) for entry in queue.listing(100.0).entries]
    assert order == sorted(range(len(arrivals)), key=lambda number: (-arrivals[number][0], number))
    over = {int(entry.request.owner[1:]) for entry in queue.expired(40.0)}
    assert over == {number for number, (_, wait) in enumerate(arrivals) if number + wait <= 40.0}
    assert len(queue) == len(arrivals) - len(over)


def test_patience_ends_overtaking() -> None:
    """Smaller ones may pass a big one at first, and may not any more once it has waited long enough."""
    queue = WaitingQueue(Reaches(fleet()), patience_seconds=30.0)
    big = queue.add(request("big", models=["*h100*"]), 0.0, WHY, None)
    small = queue.add(request("small"), 5.0, WHY, None)
    other = queue.add(request("other", models=["*t4*"]), 6.0, WHY, None)
    new, urgent = request("new"), request("urgent", priority=1)
    assert [queue.blocker(new, 29.0), queue.blocker(small.request, 29.0, small)] == [None, None]
    assert queue.blocker(new, 30.0) is big
    assert queue.blocker(small.request, 30.0, small) is big
    assert queue.blocker(big.request, 30.0, big) is None
    assert queue.blocker(other.request, 30.0, other) is None
    assert queue.blocker(urgent, 30.0) is None
    queue.remove(big)
    assert queue.blocker(new, 30.0) is None
    assert queue.blocker(new, 36.0) is small


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(list(MODELS))), max_size=8),
    st.lists(st.tuples(MODEL_GLOBS, GLOBS), min_size=2, max_size=2),
)
def test_requests_meet_where_a_model_and_a_host_fit_both(
    steps: list[tuple[str, str]], asked: list[tuple[list[str], list[str]]]
) -> None:
    """Also while hosts come, change what they have, and go."""
    world = fleet()
    reaches = Reaches(world)
    one, other = (WorkRequest(owner="a", models=models, hosts=hosts) for models, hosts in asked)
    for time_ns, (name, model) in enumerate(steps, start=2):
        fold.apply(world, inventory(name, [model], time_ns=time_ns))
        reaches.version()
        models = {device.model.name for device in world.devices.values()}
        both = reaches.of(one).models & reaches.of(other).models
        assert bool(both) >= any(fits(model, one.models) and fits(model, other.models) for model in models)
        assert reaches.of(one).meets(reaches.of(other)) == (
            bool(both) and any(fits(host, one.hosts) and fits(host, other.hosts) for host in world.hosts)
        ) or not (one.hosts or other.hosts)


def test_those_who_wait_are_compared_without_looking_at_the_fleet_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = fleet_of(*(inventory(f"h{n}", [H100] * 8) for n in range(20)))
    queue = WaitingQueue(Reaches(world))
    for n in range(20):
        queue.add(WorkRequest(owner="a", models=["*h100*"], hosts=[f"h{n}*"], wait_seconds=500), 0.0, WHY, None)
    small = WorkRequest(owner="b", models=["*a100*"], hosts=["h1?"])
    assert queue.blocker(small, 100.0) is None
    looked, matches = 0, globs.matches

    def counted(text: str, glob: str) -> bool:
        nonlocal looked
        looked += 1
        return matches(text, glob)

    monkeypatch.setattr(globs, "matches", counted)
    for n in range(20):
        fold.apply(world, inventory(f"h{n}", [H100] * 8, time_ns=2))  # hosts say the same again each minute
        assert queue.blocker(small, 100.0) is None
    assert looked == 0
    fold.apply(world, inventory("h1", ["NVIDIA A100-SXM4-40GB"] * 8, time_ns=3))
    meets = WorkRequest(owner="b", models=["*100*"], hosts=["h1"])
    assert queue.blocker(meets, 100.0) is not None
    assert looked > 0
