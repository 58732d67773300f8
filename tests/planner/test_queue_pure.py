"""The order of those who wait."""

from __future__ import annotations

from corral.planner.broker.waiting.queue import QueuedRequest, WaitingQueue
from corral.planner.fleet.fleet import Fleet
from corral.planner.placement.decide import Policies
from corral.planner.queue.durations import unknown
from corral.planner.queue.line import Line
from corral.planner.queue.order import fifo
from corral.schemas.requests import Rejection, RejectionCode, WorkRequest
from hypothesis import given
from hypothesis import strategies as st

WHY = Rejection(code=RejectionCode.NO_CAPACITY, message="full")


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(1, 50)), max_size=20))
def test_priority_comes_first_and_then_arrival(arrivals: list[tuple[int, float]]) -> None:
    queue = WaitingQueue(Line(Fleet(), Policies(), fifo))
    for number, (priority, wait) in enumerate(arrivals):
        request = WorkRequest(owner=f"c{number}", priority=priority, wait_seconds=wait)
        queue.add(request, float(number), unknown(), WHY, None, steady=float(number))
    order = [int(entry.owner[1:]) for entry in queue.listing(100.0).entries]
    assert order == sorted(range(len(arrivals)), key=lambda number: (-arrivals[number][0], number))
    over = {int(entry.request.owner[1:]) for entry in queue.expired(40.0)}
    assert over == {number for number, (_, wait) in enumerate(arrivals) if number + wait <= 40.0}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
def test_an_owners_requests_are_counted_as_they_come_and_go(steps: list[tuple[str, bool]]) -> None:
    queue = WaitingQueue(Line(Fleet(), Policies(), fifo))
    there: list[QueuedRequest] = []
    for number, (owner, comes) in enumerate(steps):
        if comes or not there:
            request = WorkRequest(owner=owner, request_id=f"r{number}", wait_seconds=9)
            there.append(queue.add(request, 0.0, unknown(), WHY, None))
        else:
            queue.remove(there.pop(0 if number % 2 else -1))
        for name in "abc":
            assert queue.count_of(name) == sum(entry.request.owner == name for entry in there)
