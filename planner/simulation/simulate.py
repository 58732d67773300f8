"""Replay of a trace with the planner's code: a fleet from inventories, then `decide` and `hold` for each request.

Requests arrive in their order and stay. A request that fits somewhere is placed, since `decide` never declines it. A
dropped request could not be held by any host at that time.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from ...schemas.requests import Grant, Rejection, RejectionCode
from ...schemas.telemetry import DeviceInfo, HostInfo, Inventory
from ..fleet.fleet import Fleet, apply, hold
from ..fleet.state import WHOLE_MILLI
from ..placement.decide import Placed, Policies, decide
from ..placement.policies import Policy
from .trace import MIB, Arrival, Node

REPORT_EVERY: Final = 64
SIZE_LABEL: Final = "gpus"
"""Label of a host with its number of devices."""
NEAREST: Final = ("cpus", "host_memory", "host_devices", "share", "leased", "memory", "devices")
"""Reasons of a drop, closest to a placement first: the first one of a rejection counts."""


class Placement(Struct, frozen=True):
    """Outcome of one request.

    Attributes:
        name: of the request.
        node: empty for a drop.
        gpu_indices: of the devices there; empty without devices.
        reason: of a drop.
    """

    name: str
    node: str = ""
    gpu_indices: tuple[int, ...] = ()
    reason: str = ""


class Simulation(Struct, frozen=True, kw_only=True):
    """Result of a replay.

    Attributes:
        policy: that ranked.
        capacity_milli: thousandths of all devices.
        demand_milli: thousandths of devices that all requests asked for.
        allocated_milli: thousandths of devices that were placed.
        placements: one for each request, in their order.
        decision_seconds: CPU time of each decision, rejections included, in order.
        busy_seconds: total CPU time of decisions, and of holding the grants in the fleet.
        seconds: wall-clock time.
    """

    policy: str
    capacity_milli: int
    demand_milli: int
    allocated_milli: int
    placements: list[Placement]
    decision_seconds: list[float]
    busy_seconds: float
    seconds: float

    @property
    def allocated_percent(self) -> float:
        """Allocated part of all devices, in percent."""
        return 100 * self.allocated_milli / self.capacity_milli if self.capacity_milli else 0.0

    @property
    def placed(self) -> int:
        """Number of requests that were placed."""
        return sum(1 for placement in self.placements if placement.node)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of drops by reason, the most frequent first."""
        counts: dict[str, int] = {}
        for placement in self.placements:
            if not placement.node:
                counts[placement.reason] = counts.get(placement.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def decision_quantile(self, part: float) -> float:
        """Quantile of the decision times, in seconds; 0 without decisions."""
        ordered = sorted(self.decision_seconds)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def fleet_of(nodes: Sequence[Node]) -> Fleet:
    """Make a fleet from the hosts of a trace, idle and healthy, as from collectors' inventories."""
    fleet = Fleet(stale_after=math.inf)
    for node in nodes:
        cores = max(1, -(-node.cpus_milli // 1000))
        memory = max(1, node.memory_mib * MIB)
        devices = [
            DeviceInfo(uuid=f"{node.name}/{index}", host=node.name, index=index, name=node.model)
            for index in range(node.gpus)
        ]
        host = HostInfo(
            name=node.name, cpus=cores, memory_bytes=memory, labels={SIZE_LABEL: str(node.gpus), **node.labels}
        )
        apply(fleet, Inventory(host=host, agent="trace", time_ns=0, devices=devices), 0.0)
        # Inventories have whole cores, and 0 means unknown: the excess is held for good.
        over = Grant(
            host=node.name,
            share=0.0,
            cpus=(cores * 1000 - node.cpus_milli) / 1000,
            host_memory_bytes=memory - node.memory_mib * MIB,
        )
        if over.cpus or over.host_memory_bytes:
            hold(fleet, f"over/{node.name}", [over])
    return fleet


def simulate(
    nodes: Sequence[Node],
    arrivals: Sequence[Arrival],
    policy: Policy,
    on_progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Replay requests on hosts.

    Args:
        nodes: all hosts.
        arrivals: all requests, in their order.
        policy: ranks, and may learn from the requests as they arrive.
        on_progress: called now and then with the number of requests that are done, and of allocated milli.
    """
    fleet = fleet_of(nodes)
    policies = Policies()
    policies.use(policy)
    clock = time.thread_time
    placements: list[Placement] = []
    times: list[float] = []
    allocated = 0
    busy = 0.0
    first = min((node.name for node in nodes), default="")
    began = time.perf_counter()
    for number, arrival in enumerate(arrivals):
        if arrival.empty:  # the planner refuses such a request: there is nothing to decide
            placements.append(Placement(arrival.name, first))
            continue
        request = arrival.request(policy.name)
        start = clock()
        decision = decide(fleet, request, 0.0, policies)
        times.append(clock() - start)
        if isinstance(decision, Placed):
            hold(fleet, str(number), decision.grants)
            placements.append(_placement(arrival, decision))
            allocated += arrival.milli
        else:
            placements.append(Placement(arrival.name, reason=_reason(decision)))
        busy += clock() - start
        if on_progress is not None and number % REPORT_EVERY == 0:
            on_progress(number + 1, allocated)
    if on_progress is not None:
        on_progress(len(arrivals), allocated)
    return Simulation(
        policy=policy.name,
        capacity_milli=WHOLE_MILLI * sum(node.gpus for node in nodes),
        demand_milli=sum(arrival.milli for arrival in arrivals),
        allocated_milli=allocated,
        placements=placements,
        decision_seconds=times,
        busy_seconds=busy,
        seconds=time.perf_counter() - began,
    )


def _placement(arrival: Arrival, decision: Placed) -> Placement:
    grants = decision.grants
    indices = tuple(sorted(grant.index for grant in grants if grant.device))
    return Placement(arrival.name, grants[0].host, indices)


def _reason(rejection: Rejection) -> str:
    if rejection.code is RejectionCode.IMPOSSIBLE:
        return "impossible"
    codes = {reason.code for reason in rejection.reasons}
    return next((code for code in NEAREST if code in codes), next(iter(sorted(codes)), str(rejection.code)))


def write_placements(path: Path, placements: Sequence[Placement]) -> None:
    """Write the table of placements: `name, node, gpu_indices` (`;`-separated; node empty for a drop).

    Raises:
        OSError: it can't be written.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "node", "gpu_indices"))
        for placement in placements:
            writer.writerow((placement.name, placement.node, ";".join(map(str, placement.gpu_indices))))
