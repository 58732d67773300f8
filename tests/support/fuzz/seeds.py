"""Real messages, from which fuzzing starts."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from corral.schemas import codec, columns, operations, query, requests, telemetry
from corral.schemas.metrics import METRICS
from corral.schemas.work import groups, moves, windows

GIB = 2**30
HOST = "h1"


def inventory(host: str = HOST, devices: int = 2) -> telemetry.Inventory:
    return telemetry.Inventory(
        host=telemetry.HostInfo(name=host, cpus=64, memory_bytes=512 * GIB, labels={"rack": "r1"}),
        agent="a1",
        time_ns=time.time_ns(),
        devices=[
            telemetry.DeviceInfo(
                uuid=f"GPU-{host}-{at}", host=host, index=at, name="NVIDIA H100", memory_bytes=80 * GIB, sm_count=132
            )
            for at in range(devices)
        ],
        links=[[telemetry.Link.SAME, telemetry.Link.NVLINK], [telemetry.Link.NVLINK, telemetry.Link.SAME]],
        nvlink_counts=[[0, 18], [18, 0]],
    )


def samples(host: str = HOST, sequence: int = 1, ticks: int = 2, devices: int = 2) -> telemetry.SampleBatch:
    count = ticks * devices
    found: dict[str, bytes] = {}
    nulls: dict[str, bytes] = {}
    for metric in METRICS.values():
        packed = columns.pack(metric, [1 if at % 3 else None for at in range(count)])
        assert packed is not None
        found[metric.name] = packed[0]
        if packed[1] is not None:
            nulls[metric.name] = packed[1]
    return telemetry.SampleBatch(
        host=host,
        agent="a1",
        sequence=sequence,
        source="simulated",
        devices=[f"GPU-{host}-{at}" for at in range(devices)],
        times_ns=columns.pack_times([time.time_ns() - 10**9] * count),
        columns=found,
        nulls=nulls,
    )


def small_samples() -> telemetry.SampleBatch:
    whole = samples()
    kept = ("gpu_utilization_percent", "memory_used_bytes")
    return telemetry.SampleBatch(
        host=whole.host,
        agent=whole.agent,
        sequence=7,
        source="nvml",
        devices=whole.devices,
        times_ns=whole.times_ns,
        columns={name: whole.columns[name] for name in kept},
        nulls={name: whole.nulls[name] for name in kept},
    )


def lease() -> requests.Lease:
    now = datetime.now(UTC)
    return requests.Lease(
        lease_id="l1",
        owner="alice",
        state=requests.LeaseState.ACTIVE,
        granted_at=now,
        expires_at=now + timedelta(minutes=5),
        ttl_seconds=300,
        grants=[requests.Grant(host=HOST, device=f"GPU-{HOST}-0", memory_bytes=GIB)],
    )


WORK = requests.WorkRequest(
    owner="alice",
    gpus=2,
    gpu_memory_bytes=20 * GIB,
    cpus=4,
    models=["*H100*"],
    hosts=["h*"],
    host_labels={"rack": "r1"},
    min_compute_capability="8.0",
    placement=requests.Placement.SAME_HOST,
    request_id="r-1",
    labels={"team": "ml"},
)
WORK_ITEMS = requests.WorkRequest(
    owner="alice",
    gpus=2,
    distribution=requests.Distribution(
        items=[requests.WorkItem(id=f"i{at}", memory_bytes=GIB, cost=at + 0.5) for at in range(5)],
        method=requests.Method.BALANCED,
    ),
)

TELEMETRY: dict[str, tuple[type[Any], Any]] = {
    "corral.v1.samples.h1": (telemetry.SampleBatch, small_samples()),
    "corral.v1.processes.h1": (
        telemetry.ProcessBatch,
        telemetry.ProcessBatch(
            host=HOST,
            agent="a1",
            sequence=2,
            time_ns=time.time_ns(),
            processes=[
                telemetry.ProcessSample(device="GPU-h1-0", pid=1, memory_used_bytes=GIB, name="python", user="alice")
            ],
        ),
    ),
    "corral.v1.agents.h1": (
        telemetry.AgentReport,
        telemetry.AgentReport(host=HOST, agent="a1", sequence=3, time_ns=time.time_ns(), ticks=7, cpu_seconds=0.5),
    ),
    "corral.v1.inventory.h1": (telemetry.Inventory, inventory()),
    "corral.v1.events.h1": (
        telemetry.DeviceEvent,
        telemetry.DeviceEvent(
            host=HOST,
            agent="a1",
            sequence=4,
            time_ns=time.time_ns(),
            kind="xid",
            severity=telemetry.Severity.RESET,
            device="GPU-h1-1",
            code=79,
            message="fell off the bus",
            data={"a": 1, "b": None, "c": 0.5},
        ),
    ),
    "corral.v1.leases.granted.l1": (
        requests.LeaseEvent,
        requests.LeaseEvent(kind=requests.LeaseEventKind.GRANTED, time=datetime.now(UTC), lease=lease()),
    ),
    "corral.v1.dead.invalid": (
        telemetry.DeadLetter,
        telemetry.DeadLetter(
            subject="s", stream="t", stream_sequence=1, reason="why", code="invalid", payload=b"x", time_ns=1
        ),
    ),
}
ASKED: list[tuple[type[Any], Any]] = [
    (requests.WorkRequest, WORK),
    (requests.WorkRequest, WORK_ITEMS),
    (operations.ExplainRequest, operations.ExplainRequest(request=WORK)),
    (requests.LeaseAction, requests.LeaseAction(lease_id="l1", owner="alice", ttl_seconds=60)),
    (operations.LeaseFilter, operations.LeaseFilter(owner="alice", limit=3)),
    (operations.DeviceFilter, operations.DeviceFilter(hosts=["h*"], models=["*H100*", "[A-C]*"])),
    (
        operations.DrainAction,
        operations.DrainAction(drain=True, hosts=["h1"], devices=["GPU-h1-0"], host_labels={"a": "b"}, reason="why"),
    ),
    (operations.EvictAction, operations.EvictAction(lease_id="l1", reason="maintenance")),
    (operations.PreemptAction, operations.PreemptAction(lease_id="l1", reason="a course")),
    (moves.MovesQuery, moves.MovesQuery(free_hosts=2, hosts=["h*"], models=["*H100*"])),
    (requests.CheckpointAction, requests.CheckpointAction(lease_id="l1", owner="alice", busy_seconds=40)),
    (requests.ResizeAction, requests.ResizeAction(lease_id="l1", owner="alice", number=7, devices=["GPU-h1-0"])),
    (
        groups.GroupChange,
        groups.GroupChange(
            replace=groups.GroupTree(
                groups=[
                    groups.Group(
                        name="lab/vision",
                        guarantee=groups.Resources(gpus={"H100": 16.0, "*": 0.5}, cpus=8.0),
                        members=["ann"],
                    )
                ],
                prices={"*H100*": 2.5},
            ),
            delete=["old"],
            revision=3,
        ),
    ),
    (
        windows.WindowAction,
        windows.WindowAction(
            book=windows.Window(
                starts_at=datetime(2026, 12, 7, 7, tzinfo=UTC),
                ends_at=datetime(2026, 12, 7, 11, tzinfo=UTC),
                repeat=windows.Repeat.WEEKLY,
                repeat_until=datetime(2027, 1, 31, tzinfo=UTC),
                zone="Europe/Berlin",
                gpus=8,
                models=["*H100*"],
                group="lab/vision",
                reason="course",
            )
        ),
    ),
    (query.QueryRequest, query.QueryRequest(sql="SELECT 1", query_id="q1", window=4)),
    (query.CancelRequest, query.CancelRequest(query_id="q1")),
    (query.SnapshotRequest, query.SnapshotRequest()),
    (query.SnapshotRead, query.SnapshotRead(snapshot_id="s", offset=7)),
]
"""What services are asked; the decoders of a client read the answers."""
ANSWERS: list[tuple[type[Any], Any]] = [
    (requests.Lease, lease()),
    (requests.Assignment, requests.Assignment(lease=lease(), warnings=["w"])),
    (
        requests.Rejection,
        requests.Rejection(
            code=requests.RejectionCode.NO_CAPACITY,
            message="no",
            reasons=[requests.Reason(code="memory", devices=2, detail="d")],
        ),
    ),
    (requests.Error, requests.Error(code="invalid", message="no", field="$.gpus")),
    (query.ProcessorStatus, query.ProcessorStatus(processor="p", watermarks={"s": 1})),
    (query.QueryEnd, query.QueryEnd(rows=1, seconds=0.5)),
]
SQL = [
    "SELECT host, avg(power_watts) FROM samples WHERE time > now() - INTERVAL 1 HOUR GROUP BY host",
    "WITH a AS (FROM samples LIMIT 5) SELECT * FROM a JOIN samples USING (host) WHERE device LIKE 'GPU%'",
    "EXPLAIN (FORMAT json) SELECT list_transform([1, 2], lambda x: x + 1)",
    "SUMMARIZE samples",
    "PIVOT samples ON host IN ('h1') USING max(power_watts)",
    "SELECT '{\"a\": [1]}'::JSON -> '$.a', CASE WHEN 1 = 1 THEN 2 ELSE 3 END FROM range(10) ORDER BY ALL",
    "FROM read_csv('/etc/passwd')",
    "COPY samples TO '/tmp/x'; SELECT 1",
]


def both(pairs: list[tuple[type[Any], Any]]) -> list[bytes]:
    """Each as JSON and as MessagePack, behind a byte that says which type and which form it is."""
    found: list[bytes] = []
    for at, (_, message) in enumerate(pairs):
        found.append(bytes([2 * at]) + codec.encode(message, codec.JSON))
        found.append(bytes([2 * at + 1]) + codec.encode(message, codec.MSGPACK))
    return found
