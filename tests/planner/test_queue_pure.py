"""The order of those who wait."""

from __future__ import annotations

from corral.planner.leases.queue import WaitingQueue
from corral.schemas.requests import Rejection, RejectionCode, WorkRequest
from hypothesis import given
from hypothesis import strategies as st

WHY = Rejection(code=RejectionCode.NO_CAPACITY, message="full")


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(1, 50)), max_size=20))
def test_priority_comes_first_and_then_arrival(arrivals: list[tuple[int, float]]) -> None:
    queue = WaitingQueue()
    for number, (priority, wait) in enumerate(arrivals):
        request = WorkRequest(owner=f"c{number}", priority=priority, wait_seconds=wait)
        queue.add(request, float(number), WHY, None)
    order = [int(entry.owner[1:]) for entry in queue.listing(100.0).entries]
    assert order == sorted(range(len(arrivals)), key=lambda number: (-arrivals[number][0], number))
    over = {int(entry.request.owner[1:]) for entry in queue.expired(40.0)}
    assert over == {number for number, (_, wait) in enumerate(arrivals) if number + wait <= 40.0}
