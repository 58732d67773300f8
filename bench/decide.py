"""How long does a decision take in process, and how does that grow with the fleet?

A fleet of mixed hosts, warm and partly busy by its samples, is filled to where requests begin to be turned down, and
then lives: leases end, requests come, samples arrive, all seeded. Timed are `decide` alone (grants and rejections), the
fold of a lease, and the fold of a host's samples. Beside them stands the limit that a decision can not beat in this
language: the time to look once at every host that a request might go to (a naive scan of all hosts' states).

With `--runs` the same sequence is decided several times from the start, and of each decision the least time counts:
what others on a shared machine take from the caches differs from run to run, what a decision costs does not. `--kinds`
tells the kinds of requests apart.

    python bench/decide.py [--gpus 100 1000 10000 100000] [--policies best-fit pack ...] [--decisions 4000]
                           [--runs 5] [--kinds]
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import time
from collections import deque
from dataclasses import dataclass, field

import corral.planner.fleet.fleet as fold
from corral.planner.fleet.state import ask_key
from corral.planner.placement.decide import Placed, Policies, decide
from corral.planner.placement.feasible import candidates, host_verdict
from corral.planner.placement.policies import DEFAULT, POLICIES
from corral.schemas import columns
from corral.schemas.metrics import METRICS
from corral.schemas.requests import Placement, WorkRequest
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, SampleBatch

GIB = 2**30
CLOCK = time.thread_time
"""Time on the processor: what others do on the machine meanwhile is not the decision's. --wall takes the wall clock."""
KINDS = (
    # model, devices a host, memory GiB, multiprocessors, MHz, compute capability, cores, RAM GiB, part of the hosts
    ("NVIDIA H100 80GB HBM3", 8, 80, 132, 1980, "9.0", 192, 2048, 0.45),
    ("NVIDIA A100-SXM4-80GB", 8, 80, 108, 1410, "8.0", 128, 1024, 0.25),
    ("NVIDIA L40S", 4, 45, 142, 2520, "8.9", 64, 512, 0.15),
    ("Tesla T4", 4, 15, 40, 1590, "7.5", 48, 192, 0.15),
)
FOREIGN = 0.03
"""Part of the devices on which somebody computes without a lease."""


def inventories(gpus: int, rng: random.Random) -> list[Inventory]:
    found: list[Inventory] = []
    while gpus > 0:
        name, count, memory, sms, clock, capability, cpus, ram, _ = rng.choices(KINDS, [kind[-1] for kind in KINDS])[0]
        count = min(count, gpus)
        host = f"gpu-{len(found):05d}"
        found.append(
            Inventory(
                host=HostInfo(name=host, cpus=cpus, memory_bytes=ram * GIB),
                agent="a",
                time_ns=1,
                devices=[
                    DeviceInfo(
                        uuid=f"GPU-{host}-{index}",
                        host=host,
                        index=index,
                        name=name,
                        memory_bytes=memory * GIB,
                        sm_count=sms,
                        sm_clock_max_megahertz=clock,
                        compute_capability=capability,
                    )
                    for index in range(count)
                ],
            )
        )
        gpus -= count
    return found


def batch(fleet: fold.Fleet, name: str, rng: random.Random, foreign: dict[str, int], now: float) -> SampleBatch:
    """What the host's collector would send: leased devices are busy and warm, some have a stranger on them."""
    devices = fleet.hosts[name].devices
    used, load, heat = [], [], []
    for device in devices:
        busy = device.share_held / 1000
        used.append(400 * 2**20 + int(device.granted * 0.9) + foreign.get(device.uuid, 0))
        load.append(min(100.0, busy * rng.uniform(60, 100) + (40.0 if device.uuid in foreign else 0.0)))
        heat.append(32.0 + 0.4 * load[-1] + rng.uniform(-3, 3))
    packed = {
        "memory_used_bytes": used,
        "memory_reserved_bytes": [512 * 2**20] * len(devices),
        "gpu_utilization_percent": load,
        "temperature_celsius": heat,
        "power_watts": [80 + 5 * value for value in load],
        "throttle_reasons_bitmask": [0] * len(devices),
    }
    return SampleBatch(
        host=name,
        agent="a",
        sequence=1,
        source="simulated",
        devices=[device.uuid for device in devices],
        times_ns=columns.pack_times([int(now * 1e9)] * len(devices)),
        columns={metric: columns.pack(METRICS[metric], values)[0] for metric, values in packed.items()},
    )


def mix(policy: str) -> tuple[list[WorkRequest], list[float]]:
    """Kinds of requests with weights as clusters see them: most are small, some are shares, a few are whole hosts."""

    def ask(weight: float, **fields: object) -> tuple[float, WorkRequest]:
        return weight, WorkRequest(owner="bench", policy=policy, **fields)  # pyright: ignore[reportArgumentType]

    kinds = [
        ask(10, gpus=1, cpus=8, host_memory_bytes=32 * GIB),
        ask(8, gpus=1, cpus=4, gpu_memory_bytes=20 * GIB),
        ask(6, gpus=1, cpus=12, gpu_memory_bytes=60 * GIB),
        ask(5, gpus=1, cpus=8, models=["*H100*"]),
        ask(4, gpus=1, cpus=6, models=["*A100*", "*H100*"], min_compute_capability="8.0"),
        ask(3, gpus=1, cpus=6, models=["*T4*"]),
        ask(5, gpus=2, cpus=16, gpu_memory_bytes=30 * GIB),
        ask(3, gpus=4, cpus=32, host_memory_bytes=128 * GIB),
        ask(2, gpus=8, cpus=96, models=["*H100*"]),
        ask(1, gpus=8, cpus=64, host_memory_bytes=512 * GIB),
        ask(1, gpus=16, cpus=128, placement=Placement.FEWEST_HOSTS),
        ask(0.5, gpus=4, cpus=16, placement=Placement.SPREAD),
        ask(3, gpus=0, cpus=8, host_memory_bytes=16 * GIB),
    ]
    for share in (0.1, 0.2, 0.25, 0.3, 0.5, 0.75):
        kinds.append(ask(3, gpus=1, gpu_share=share, cpus=2, gpu_memory_bytes=int(share * 14) * GIB))
        kinds.append(ask(1.5, gpus=1, gpu_share=share, cpus=4, gpu_memory_bytes=int(share * 40) * GIB))
    return [request for _, request in kinds], [weight for weight, _ in kinds]


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


@dataclass
class Timings:
    """Of one run, in µs: each decision in turn, each fold of a lease and of samples, and one look at each host.

    Attributes:
        kinds: what each decision was about.
        granted: whether it was granted.
        classes: of equal hosts, at the end.
    """

    kinds: list[str] = field(default_factory=list[str])
    granted: list[bool] = field(default_factory=list[bool])
    decide: list[float] = field(default_factory=list[float])
    hold: list[float] = field(default_factory=list[float])
    sample: list[float] = field(default_factory=list[float])
    scan: float = 0.0
    classes: int = 0

    def least(self, other: Timings) -> None:
        """Take what was faster in another run of the same sequence."""
        assert (self.kinds, self.granted) == (other.kinds, other.granted), "two runs decided differently"
        for mine, its in ((self.decide, other.decide), (self.hold, other.hold), (self.sample, other.sample)):
            mine[:] = [min(a, b) for a, b in zip(mine, its, strict=True)]
        self.scan = min(self.scan, other.scan)


def kind_of(request: WorkRequest) -> str:
    if request.gpus == 0:
        return "cores alone"
    if request.gpus == 1:
        return "one device" if request.gpu_share is None else "a share"
    where = {Placement.SPREAD: "each on another host", Placement.FEWEST_HOSTS: "on the fewest hosts"}
    return f"{request.gpus} devices {where.get(request.placement, 'on one host')}"


def run(gpus: int, policy: str, decisions: int, seed: int) -> Timings:
    rng = random.Random(seed)
    fleet = fold.Fleet()
    policies = Policies()
    now = 1_700_000_000.0
    for inventory in inventories(gpus, rng):
        fold.apply(fleet, inventory, now)
    foreign = {uuid: rng.randrange(1, 12) * GIB for uuid in fleet.devices if rng.random() < FOREIGN}
    names = list(fleet.hosts)
    for name in names:
        fold.apply(fleet, batch(fleet, name, rng, foreign, now), now)
    kinds, weights = mix(policy)
    held: deque[str] = deque()
    number = 0

    def lease(placed: Placed) -> float:
        nonlocal number
        number += 1
        start = CLOCK()
        fold.hold(fleet, f"l{number}", placed.grants)
        spent = CLOCK() - start
        held.append(f"l{number}")
        return spent

    refused = 0
    while refused < 20:
        decision = decide(fleet, rng.choices(kinds, weights)[0], now, policies)
        if isinstance(decision, Placed):
            lease(decision)
        else:
            refused += 1
    found = Timings()
    # As in planner/leader_tasks.py: collections are rare, and leave alone what is there for good.
    gc.set_threshold(20_000, 50, 1_000_000)
    gc.collect()
    gc.freeze()
    for step in range(decisions):
        now += 0.0002
        for _ in range(2 if step % 10 == 0 else 1):
            if held and rng.random() < 0.7:
                held.rotate(-rng.randrange(min(len(held), 1000)))
                fold.free(fleet, held.popleft())
        message = batch(fleet, rng.choice(names), rng, foreign, now)
        start = CLOCK()
        fold.apply(fleet, message, now)
        found.sample.append((CLOCK() - start) * 1e6)
        request = rng.choices(kinds, weights)[0]
        start = CLOCK()
        decision = decide(fleet, request, now, policies)
        found.decide.append((CLOCK() - start) * 1e6)
        found.kinds.append(kind_of(request))
        found.granted.append(isinstance(decision, Placed))
        if isinstance(decision, Placed):
            found.hold.append(lease(decision) * 1e6)
    gc.unfreeze()
    ask = fleet.ask(ask_key(kinds[0]))
    start = CLOCK()
    for host in fleet.hosts.values():
        assert host.group is not None
        host_verdict(host.group.state, ask, len(candidates(host.group.state, ask)))
    found.scan = (CLOCK() - start) * 1e6
    found.classes = len(fleet.index.classes)
    return found


def report(gpus: int, policy: str, found: Timings, kinds: bool) -> None:
    everything = found.decide
    granted = [spent for spent, ok in zip(everything, found.granted, strict=True) if ok]
    refused = [spent for spent, ok in zip(everything, found.granted, strict=True) if not ok]
    print(
        f"{gpus:>7} {policy:<14} {percentile(everything, 0.5):>7.0f} {percentile(everything, 0.99):>8.0f} "
        f"{1e6 * len(everything) / sum(everything):>11,.0f} {percentile(granted, 0.99):>10.0f} "
        f"{percentile(refused, 0.99) if refused else 0:>10.0f} {len(refused) / len(everything):>8.1%} "
        f"{percentile(found.hold, 0.5):>8.0f} {percentile(found.sample, 0.5):>8.0f} {found.classes:>8} "
        f"{found.scan:>9.0f}",
        flush=True,
    )
    for kind in sorted(set(found.kinds)) if kinds else ():
        spent = [spent for spent, its in zip(everything, found.kinds, strict=True) if its == kind]
        print(
            f"        {kind:<32} {len(spent):>6} p50 {percentile(spent, 0.5):>5.0f} p99 {percentile(spent, 0.99):>5.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--policies", nargs="+", default=[DEFAULT], choices=[*POLICIES, "all"])
    parser.add_argument("--decisions", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--runs", type=int, default=1, help="of the same sequence; of each decision the least time counts"
    )
    parser.add_argument("--kinds", action="store_true", help="tell the kinds of requests apart")
    parser.add_argument("--wall", action="store_true", help="wall-clock time, on a machine that does nothing else")
    options = parser.parse_args()
    if options.wall:
        global CLOCK
        CLOCK = time.perf_counter
    policies = list(POLICIES) if "all" in options.policies else options.policies
    print(f"Python {platform.python_version()}, {platform.machine()}; times in µs")
    print(
        f"{'GPUs':>7} {'policy':<14} {'p50':>7} {'p99':>8} {'decisions/s':>11} {'p99 grant':>10} {'p99 no':>10} "
        f"{'refused':>8} {'hold p50':>8} {'smp p50':>8} {'classes':>8} {'scan all':>9}"
    )
    for policy in policies:
        for gpus in options.gpus:
            found = run(gpus, policy, options.decisions, options.seed)
            for _ in range(options.runs - 1):
                found.least(run(gpus, policy, options.decisions, options.seed))
            report(gpus, policy, found, options.kinds)


if __name__ == "__main__":
    main()
