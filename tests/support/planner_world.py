"""Small fleets and requests for the planner's tests, as hypothesis strategies and as plain calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import corral.planner.fleet.fleet as fold
from corral.planner.placement.decide import Decision, Placed, Policies, decide
from corral.schemas import columns
from corral.schemas.metrics import METRICS
from corral.schemas.requests import Placement, WorkRequest
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, Link, ProcessBatch, ProcessSample, SampleBatch
from hypothesis import strategies as st

GIB = 2**30
MIB = 2**20
NOW = 1_700_000_000.0
MODELS = {
    "NVIDIA H100 80GB HBM3": ("9.0", 80 * GIB, 132, 1980),
    "NVIDIA A100-SXM4-40GB": ("8.0", 40 * GIB, 108, 1410),
    "Tesla T4": ("7.5", 16 * GIB - 300 * MIB, 40, 1590),
    "AMD Instinct MI300X": ("", 192 * GIB, 304, 2100),
}


def inventory(
    host: str,
    models: Sequence[str],
    *,
    cpus: int = 32,
    memory: int = 256 * GIB,
    labels: dict[str, str] | None = None,
    links: list[list[Link]] | None = None,
    agent: str = "a1",
    time_ns: int = 1,
) -> Inventory:
    devices: list[DeviceInfo] = []
    for index, name in enumerate(models):
        capability, size, count, clock = MODELS[name]
        devices.append(
            DeviceInfo(
                uuid=f"GPU-{host}-{index}",
                host=host,
                index=index,
                name=name,
                vendor="amd" if "AMD" in name else "nvidia",
                compute_capability=capability,
                memory_bytes=size,
                sm_count=count,
                sm_clock_max_megahertz=clock,
                memory_bandwidth_bytes_per_second=10**12,
            )
        )
    return Inventory(
        host=HostInfo(name=host, cpus=cpus, memory_bytes=memory, labels=labels or {}),
        agent=agent,
        time_ns=time_ns,
        devices=devices,
        links=links or [],
    )


def samples(
    host: str,
    devices: Sequence[str],
    at: float,
    *,
    used: Sequence[int | None] | None = None,
    reserved: Sequence[int | None] | None = None,
    utilization: Sequence[float | None] | None = None,
    temperature: Sequence[float | None] | None = None,
    throttle: Sequence[int | None] | None = None,
    agent: str = "a1",
) -> SampleBatch:
    given: dict[str, Sequence[float | int | None] | None] = {
        "memory_used_bytes": used if used is not None else [0] * len(devices),
        "memory_reserved_bytes": reserved,
        "gpu_utilization_percent": utilization,
        "temperature_celsius": temperature,
        "throttle_reasons_bitmask": throttle,
    }
    packed: dict[str, bytes] = {}
    nulls: dict[str, bytes] = {}
    for name, values in given.items():
        column = None if values is None else columns.pack(METRICS[name], values)
        if column is not None:
            packed[name] = column[0]
            if column[1] is not None:
                nulls[name] = column[1]
    return SampleBatch(
        host=host,
        agent=agent,
        sequence=1,
        source="simulated",
        devices=list(devices),
        times_ns=columns.pack_times([int(at * 1e9)] * len(devices)),
        columns=packed,
        nulls=nulls,
    )


def processes(host: str, at: float, found: Sequence[tuple[str, str, int | None]]) -> ProcessBatch:
    """(device, lease, bytes) each."""
    return ProcessBatch(
        host=host,
        agent="a1",
        sequence=1,
        time_ns=int(at * 1e9),
        processes=[
            ProcessSample(device=device, pid=pid, lease=lease, memory_used_bytes=memory)
            for pid, (device, lease, memory) in enumerate(found)
        ],
    )


def fleet_of(*inventories: Inventory, live: bool = False) -> fold.Fleet:
    """A fleet that needs no samples, unless it is live: then each device has one."""
    fleet = fold.Fleet() if live else fold.Fleet(stale_after=math.inf)
    for event in inventories:
        fold.apply(fleet, event, NOW)
        if live and event.devices:
            fold.apply(fleet, samples(event.host.name, [device.uuid for device in event.devices], NOW), NOW)
    return fleet


def placed(decision: Decision) -> Placed:
    assert isinstance(decision, Placed), decision
    return decision


def ask(fleet: fold.Fleet, now: float = NOW, **fields: object) -> Decision:
    request = WorkRequest(owner="me", **fields)  # pyright: ignore[reportArgumentType]
    return decide(fleet, request, now, Policies())


small_models = st.sampled_from(list(MODELS))
amounts = st.sampled_from(
    [0, 1 * GIB, 5 * GIB, 15 * GIB, 16 * GIB - 400 * MIB, 39 * GIB, 40 * GIB, 80 * GIB, 100 * GIB]
)
link_kinds = st.sampled_from([Link.NVLINK, Link.PCIE_SWITCH, Link.HOST_BRIDGE, Link.SYSTEM])


@st.composite
def link_matrices(draw: st.DrawFn, count: int) -> list[list[Link]]:
    links = [[Link.SAME] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            links[i][j] = links[j][i] = draw(link_kinds)
    return links


@st.composite
def inventories(draw: st.DrawFn, hosts: int = 5, devices: int = 5) -> list[Inventory]:
    found: list[Inventory] = []
    for number in range(draw(st.integers(1, hosts))):
        count = draw(st.integers(0, devices))
        one = draw(small_models)
        models = [one] * count if draw(st.booleans()) else [draw(small_models) for _ in range(count)]
        found.append(
            inventory(
                f"h{number}",
                models,
                cpus=draw(st.sampled_from([0, 4, 16, 33])),
                memory=draw(st.sampled_from([0, 16 * GIB, 256 * GIB])),
                labels={"rack": draw(st.sampled_from(["r1", "r2"]))} if draw(st.booleans()) else {},
                links=draw(link_matrices(count)) if count > 2 and draw(st.booleans()) else None,
            )
        )
    return found


@st.composite
def requests(draw: st.DrawFn, policies: Sequence[str] = ("best-fit",)) -> WorkRequest:
    share = draw(st.sampled_from([None, None, 0.1, 0.25, 1 / 3, 0.5, 1.0]))
    gpus = 1 if share is not None else draw(st.integers(0, 7))
    placement = draw(st.sampled_from(list(Placement)))
    several = placement is not Placement.SAME_HOST
    each = draw(st.integers(1, 3)) if placement is Placement.SPREAD and gpus and share is None else None
    return WorkRequest(
        owner="me",
        gpus=gpus * (each or 1),
        gpus_per_host=each,
        gpu_share=share,
        gpu_memory_bytes=draw(amounts) if gpus else 0,
        cpus=draw(st.sampled_from([0.5, 1.0, 3.3, 8.0, 40.0] if not gpus else [0.0, 0.5, 3.3, 8.0, 40.0])),
        host_memory_bytes=draw(st.sampled_from([0, 0, 1 * GIB, 20 * GIB])),
        models=draw(st.sampled_from([[], [], ["*h100*"], ["*A100*", "tesla*"]])),
        vendors=draw(st.sampled_from([[], [], ["nvidia"], ["AMD"]])),
        hosts=draw(st.sampled_from([[], [], ["h1"], ["h[02]"]])),
        host_labels=draw(st.sampled_from([{}, {}, {"rack": "r1"}])),
        min_compute_capability=draw(st.sampled_from([None, None, "8.0"])),
        placement=placement,
        within=draw(st.sampled_from([None, None, "rack"])) if several else None,
        prefer_within=draw(st.sampled_from([None, None, "rack"])) if several else None,
        policy=draw(st.sampled_from(list(policies))),
        allow_in_use=draw(st.sampled_from([False, False, True])),
    )
