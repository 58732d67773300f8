"""What do decisions about groups cost the processor, and how good are they where they take no time? In virtual time.

    python bench/groups_virtual.py            # about 15 s on the processor

No bus, no bucket, no clients: the planner's own line, quotas and reclaimer on a fleet of their own, in a time of their
own. So the figures hardly depend on what else the machine does.

- Kueue's `baseline` load (`groups_loads.py`), as if decisions and messages took no time: what the order itself loses.
  Once with its priorities, by which large goes before medium and medium before small, and once without.
- 3,980 single GPUs taken back for a group that is guaranteed them, whose leases end 30 ms after their notice: where
  their prices differ, and where they are equal.
- What the accounts of 100 groups add to a plain request and its release.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from corral.planner.broker.quotas import reclaimer
from corral.planner.fleet.fleet import free, hold
from corral.planner.groups.state import GroupState, amounts_of
from corral.planner.leases.lifecycle import Refused
from corral.planner.placement.decide import Policies, ask_of
from corral.planner.placement.policies import DEFAULT
from corral.planner.queue.durations import given
from corral.planner.queue.line import Line
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.timed import grants_of
from corral.planner.simulation.trace import Node
from corral.schemas.requests import Grant, LeaseState, Placement, WorkRequest
from corral.schemas.work.groups import GroupTree
from groups_loads import LOADS, QUOTA, Load, floor, groups, without_priorities, workloads
from msgspec import convert

MODELS = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "Tesla T4")
BEGIN = 1e6


class Planner:
    """A line with groups and the reclaimer of a real planner, and leases that are kept in memory."""

    def __init__(self, hosts: int, tree: dict[str, Any], notice: Callable[[str], None]) -> None:
        self.now = BEGIN
        self.fleet = fleet_of([Node(f"n{at:04d}", 10**9, 10**9, 8, MODELS[at % 4]) for at in range(hosts)])
        self.state = GroupState(convert(tree, GroupTree), 1)
        self.line = Line(self.fleet, Policies(DEFAULT), groups=self.state)
        self.leases: dict[str, Any] = {}
        self.queue: set[Any] = set()
        self.noticed = 0
        self.seconds = {"arrivals": 0.0, "starts": 0.0, "reclaiming": 0.0, "ends": 0.0}
        self._notice = notice
        self._made = 0
        self._tasks: list[Coroutine[Any, Any, None]] = []
        # The reclaimer's clock is this one.
        reclaimer.time = SimpleNamespace(time=lambda: self.now, perf_counter=lambda: 0.0, thread_time=lambda: 0.0)
        reclaimer.preemptible_from = lambda lease: lease.granted_at
        self.reclaimer = reclaimer.Reclaimer(
            self.fleet, self._ledger(), self.state, self.line, self.queue, self._tasks.append, lambda: None
        )

    def _ledger(self) -> Any:
        async def preempt(lease_id: str, preemption: Any) -> Any:
            record = self.leases.get(lease_id)
            if record is None:
                raise Refused("ended", "it has ended")
            record.lease.preemption = preemption
            self.noticed += 1
            self._notice(lease_id)
            return record.lease

        async def unpreempt(lease_id: str, _: str) -> None:
            if lease_id in self.leases:
                self.leases[lease_id].lease.preemption = None

        class Table(dict[str, Any]):
            def __iter__(self) -> Iterator[Any]:  # nothing is left of an earlier term
                return iter(())

        self.leases = Table()
        return SimpleNamespace(table=self.leases, preempt=preempt, unpreempt=unpreempt)

    def ask(self, request: WorkRequest, seconds: float, arrived_at: float, payload: Any = None) -> None:
        began = time.process_time()
        entry = self.line.arrive(request, given(seconds), arrived_at)
        self.seconds["arrivals"] += time.process_time() - began
        entry.payload = queued = _Queued()
        queued.request, queued.entry, queued.payload, queued.arrived_at = request, entry, payload, arrived_at
        self.queue.add(queued)

    def serve(self, apart: float = 0.0) -> list[tuple[str, Any]]:
        """Start who may, and give notice; returns the starts. Leases are granted so many seconds apart."""
        found: list[tuple[str, Any]] = []
        began = time.process_time()
        while (start := self.line.next(self.now)) is not None:
            queued = start.entry.payload
            self.queue.discard(queued)
            self._made += 1
            lease, owner, grants = f"L{self._made:06d}", queued.request.owner, grants_of(start.picks)
            hold(self.fleet, lease, grants)
            amounts = amounts_of(self.fleet, grants)
            self.state.use.hold(lease, owner, amounts, queued.request.preemptible)
            self.state.usage.starts(lease, owner, amounts, self.now)
            self.line.started(lease, start.entry, self.now)
            granted_at = datetime.fromtimestamp(self.now + apart * self._made, UTC)
            self.leases[lease] = SimpleNamespace(
                queued=queued,
                lease=SimpleNamespace(
                    lease_id=lease,
                    owner=owner,
                    state=LeaseState.ACTIVE,
                    preemption=None,
                    granted_at=granted_at,
                    saved_at=None,
                    grants=[SimpleNamespace(device=grant.device) for grant in grants],
                ),
            )
            found.append((lease, queued))
        self.seconds["starts"] += time.process_time() - began
        began = time.process_time()
        self.reclaimer.serve()
        while self._tasks:
            with contextlib.suppress(StopIteration):
                self._tasks.pop(0).send(None)
        self.seconds["reclaiming"] += time.process_time() - began
        return found

    def end(self, lease: str) -> Any:
        began = time.process_time()
        record = self.leases[lease]
        record.lease.state = LeaseState.RELEASED
        self.line.ended(lease, self.now)
        free(self.fleet, lease)
        self.state.use.drop(lease)
        self.state.usage.ends(lease, self.now)
        self.reclaimer.ended(lease)
        del self.leases[lease]
        self.seconds["ends"] += time.process_time() - began
        return record.queued


class _Queued:
    """A request in the queue, as far as the reclaimer needs it."""

    request: WorkRequest
    entry: Any
    payload: Any
    arrived_at: float


def kueue(name: str, load: Load) -> None:
    """One of Kueue's loads where nothing but the work itself takes time."""
    noticed = list[str]()
    planner = Planner(load.cohorts * load.queues * QUOTA // 8, groups(load)["replace"], noticed.append)
    works, ends, waits = workloads(load)[::-1], list[tuple[float, str]](), dict[str, float]()
    left = len(works)

    def ask(work: Any, arrived_at: float, requeue_of: str | None = None) -> None:
        request = WorkRequest(
            owner=work.owner,
            request_id=f"{work.request_id}-{requeue_of}",
            gpus=work.kind.units,
            placement=Placement.FEWEST_HOSTS,
            priority=work.kind.priority,
            preemptible=True,
            requeue_of=requeue_of,
        )
        planner.ask(request, 10.0, arrived_at, work)

    while left:
        planner.now = min(works[-1].at + BEGIN if works else 1e18, ends[0][0] if ends else 1e18)
        while works and works[-1].at + BEGIN <= planner.now:
            work = works.pop()
            ask(work, work.at + BEGIN)
        while ends and ends[0][0] <= planner.now:
            lease = heapq.heappop(ends)[1]
            if lease in planner.leases:
                planner.end(lease)
                left -= 1
        while True:
            for lease, queued in planner.serve():
                waits.setdefault(queued.payload.request_id, planner.now - BEGIN - queued.payload.at)
                heapq.heappush(ends, (planner.now + queued.payload.kind.seconds, lease))
            if not noticed:
                break
            for lease in noticed:  # work without grace ends at once, and is asked for again
                queued = planner.end(lease)
                ask(queued.payload, queued.arrived_at, lease)
            noticed.clear()
    least, floors = floor(load)
    print(f"Kueue's {name}, where decisions and messages take no time; mean time to admission by class")
    first_fit = " / ".join(f"{statistics.fmean(each):.2f}" for each in floors.values())
    print(f"  first-fit by priority   {least:.1f} s; {first_fit} s")
    means = [statistics.fmean(wait for name, wait in waits.items() if f"-{kind.name}-" in name) for kind in load.kinds]
    print(f"  Corral                  {planner.now - BEGIN:.1f} s; {' / '.join(f'{mean:.2f}' for mean in means)} s")
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in planner.seconds.items())
    print(f"  processor, for {len(waits):,} workloads: {spent}; {planner.noticed:,} preempted")


def reclaiming(label: str, apart: float, gpus: int = 4000) -> None:
    """All GPUs are taken back for the group that is guaranteed them."""
    tree = [
        {"name": "lender", "guarantee": {"gpus": {"*": gpus}}, "members": ["lender"]},
        {"name": "borrower", "members": ["borrower"]},
    ]
    draw, ends = random.Random(1), list[tuple[float, str]]()
    planner = Planner(
        gpus // 8,
        {"groups": tree},
        lambda lease: heapq.heappush(ends, (planner.now + draw.uniform(0.02, 0.04), lease)),
    )
    for number in range(gpus):
        planner.ask(WorkRequest(owner="borrower", request_id=f"b{number}", preemptible=True), 3600.0, planner.now)
    planner.serve(apart)
    planner.now += 10.0
    planner.seconds = dict.fromkeys(planner.seconds, 0.0)
    for number in range(gpus - 20):
        planner.ask(WorkRequest(owner="lender", request_id=f"l{number}"), 3600.0, planner.now)
    left, turns = gpus - 20, 0
    while left:
        left -= len(planner.serve())
        turns += 1
        planner.now += 0.02
        while ends and ends[0][0] <= planner.now:
            planner.end(heapq.heappop(ends)[1])
    each = ", ".join(f"{name} {1e6 * seconds / (gpus - 20):.0f} µs" for name, seconds in planner.seconds.items())
    print(
        f"{gpus - 20:,} GPUs taken back, {label}: {planner.noticed:,} notices, {turns} turns; processor, each: {each}"
    )


def plain(rounds: int = 3000) -> None:
    """The accounts of 100 groups, for one request after another."""
    teams = [
        {"name": f"team{number}", "guarantee": {"gpus": {"*": 4}}, "members": [f"owner{number}"]}
        for number in range(100)
    ]
    planner = Planner(500, {"groups": teams}, lambda _: None)
    fleet, state = planner.fleet, planner.state
    device, request = next(iter(fleet.devices.values())), WorkRequest(owner="owner3")
    grants = [Grant(host=device.host, device=device.uuid, model=device.model.name, share=1.0)]
    spent = 0.0
    for number in range(rounds):
        ask = ask_of(fleet, request)
        began = time.process_time()
        state.note_fleet(fleet)
        state.admission(fleet, "owner3", ask, preemptible=False)
        amounts = amounts_of(fleet, grants)
        state.use.hold("lease", "owner3", amounts, preemptible=False)
        state.usage.starts("lease", "owner3", amounts, BEGIN + number)
        spent += time.process_time() - began
        hold(fleet, "lease", grants)
        began = time.process_time()
        state.use.drop("lease")
        state.usage.ends("lease", BEGIN + number + 0.5)
        spent += time.process_time() - began
        free(fleet, "lease")
    print(f"100 groups add {1e6 * spent / rounds:.0f} µs of the processor to a request and its release")


if __name__ == "__main__":
    plain()
    reclaiming("of different prices", 5e-4)
    reclaiming("of equal prices", 0.0)
    kueue("baseline", LOADS["baseline"])
    kueue("baseline without priorities", without_priorities(LOADS["baseline"]))
    kueue("large-scale", LOADS["large-scale"])
