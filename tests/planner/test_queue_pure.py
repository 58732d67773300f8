"""The order of those who wait."""

from __future__ import annotations

from corral.planner.leases.queue import WaitingQueue
from corral.schemas.requests import Rejection, RejectionCode, WorkRequest
from hypothesis import given
from hypothesis import strategies as st

WHY = Rejection(code=RejectionCode.NO_CAPACITY, message="full")


def request(owner: str, priority: int = 0, models: list[str] | None = None, wait: float = 100.0) -> WorkRequest:
    return WorkRequest(owner=owner, priority=priority, wait_seconds=wait, models=models or [])


def same_models(one: WorkRequest, other: WorkRequest) -> bool:
    return not one.models or not other.models or one.models == other.models


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(1, 50)), max_size=20))
def test_priority_comes_first_and_then_arrival(arrivals: list[tuple[int, float]]) -> None:
    queue = WaitingQueue(same_models)
    for number, (priority, wait) in enumerate(arrivals):
        queue.add(request(f"c{number}", priority, wait=wait), float(number), WHY, None)
    order = [int(entry.owner[1:]) for entry in queue.listing(100.0).entries]
    assert order == sorted(range(len(arrivals)), key=lambda number: (-arrivals[number][0], number))
    over = {int(entry.request.owner[1:]) for entry in queue.expired(40.0)}
    assert over == {number for number, (_, wait) in enumerate(arrivals) if number + wait <= 40.0}
    assert len(queue) == len(arrivals) - len(over)


def test_patience_ends_overtaking() -> None:
    """Smaller ones may pass a big one at first, and may not any more once it has waited long enough."""
    queue = WaitingQueue(same_models, patience_seconds=30.0)
    big = queue.add(request("big", models=["h100"]), 0.0, WHY, None)
    small = queue.add(request("small"), 5.0, WHY, None)
    other = queue.add(request("other", models=["t4"]), 6.0, WHY, None)
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
