"""Examples of messages for the documents: requests as one would write them, replies as a service answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from corral.schemas import health, instruments, operations, query, request_events, requests, telemetry
from corral.schemas.values import durations
from corral.schemas.work import attach, groups, jobs, moves, notifications, reports, runs, windows
from msgspec import Struct

_AT = datetime(2026, 1, 1, 12, 0, 0, 123456, UTC)
_AT_NS = 1_767_268_800_123_456_789
_DEVICE = "GPU-0207e7ee-80e4-5e48-b813-9b837965e03f"
_MODEL = "NVIDIA H100 80GB HBM3"
_GRANT = requests.Grant(host="node1", device=_DEVICE, model=_MODEL, memory_bytes=85_383_949_845, score=0.5)
_LEASE = requests.Lease(
    lease_id="51d4ec4d9b-1-7",
    owner="ann",
    state=requests.LeaseState.ACTIVE,
    granted_at=_AT,
    expires_at=_AT + timedelta(minutes=5),
    ttl_seconds=300.0,
    grants=[_GRANT],
    request_id="train-7",
    environment={"node1": {"CUDA_VISIBLE_DEVICES": _DEVICE, "CORRAL_LEASE": "51d4ec4d9b-1-7"}},
    policy="fragmentation",
)
_WHY = "0/32 devices: 32 leased"
_FULL = requests.Rejection(
    code=requests.RejectionCode.NO_CAPACITY,
    message=_WHY,
    reasons=[requests.Reason(code="leased", devices=32, detail="leased")],
    could_ever_fit=True,
    request_id="train-7",
    nearest="wait for a lease to end",
)

_TASK = jobs.JobTask(
    index=7,
    attempt=1,
    state=jobs.JobState.RUNNING,
    lease_id="51d4ec4d9b-1-7",
    parts=[jobs.TaskPart(host="node1", state=jobs.JobState.RUNNING, started_at=_AT, executor="systemd")],
    pending_since=_AT - timedelta(minutes=2),
    started_at=_AT,
    progress=0.42,
)
_JOB = jobs.Job(
    job_id="1234",
    owner="ann",
    name="sweep",
    state=jobs.JobState.RUNNING,
    submitted_at=_AT - timedelta(minutes=2),
    array="0-99%10",
    counts={"running": 1, "pending": 99},
    gpus=1,
)

REQUESTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "WorkRequest": [
        ("Two GPUs for a minute", {"gpus": 2, "gpu_memory_bytes": 21474836480, "ttl_seconds": 60}),
        (
            "A third of a GPU, in line if need be",
            {"gpu_share": 0.333333, "wait_seconds": 600, "request_id": "a"},
        ),
        ("Items over four GPUs", {"gpus": 4, "distribution": {"items": 100, "method": "capacity"}}),
    ],
    "WithdrawAction": [("A request that waits", {"request_id": "train-7"})],
    "LeaseAction": [
        ("As long as before", {"lease_id": "51d4ec4d9b-1-7"}),
        ("For an hour", {"lease_id": "51d4ec4d9b-1-7", "ttl_seconds": 3600}),
    ],
    "ExplainRequest": [
        ("Why not", {"request": {"gpus": 64}}),
        ("With more", {"request": {"gpus": 64}, "with_more": [{"model": _MODEL, "devices": 64}]}),
    ],
    "JobSpec": [
        ("A script on one GPU", {"request": {"gpus": 1, "name": "train"}, "script": "#!/bin/bash\npython train.py\n"}),
        (
            "A hundred tasks, ten at a time, once another job is done",
            {
                "request": {"gpus": 1, "gpu_memory_bytes": 21474836480},
                "command": ["python", "sweep.py"],
                "array": "0-99%10",
                "after": [{"job_id": "1233"}],
                "retries": 1,
            },
        ),
        (
            "Two hosts with eight GPUs each",
            {"request": {"gpus": 16}, "hosts": 2, "tasks_per_host": 8, "command": ["python", "ddp.py"]},
        ),
    ],
    "JobAction": [
        ("End it", {"job_id": "1234", "verb": "cancel"}),
        ("Queue two tasks again", {"job_id": "1234", "verb": "resubmit", "indexes": [3, 7]}),
    ],
    "OverrideAction": [
        ("End it", {"action": {"job_id": "1234", "verb": "cancel", "reason": "maintenance"}}),
    ],
    "NotifyAction": [
        (
            "A rule that waits for the morning",
            {
                "verb": "set",
                "rule": {
                    "name": "nights",
                    "on": ["preempted", "job-ended"],
                    "to": ["ann-mail"],
                    "quiet": ["22:00-07:00"],
                    "zone": "Europe/Berlin",
                },
            },
        ),
        ("Test it", {"verb": "test", "name": "nights"}),
    ],
    "NotifyOverride": [
        ("List all rules and targets", {"action": {"verb": "list"}}),
    ],
    "JobFilter": [
        ("One's own that have not ended", {"owner": "ann", "active": True}),
        ("The tasks of one that failed", {"job_ids": ["1234"], "tasks": True, "task_states": ["failed"]}),
    ],
    "AttachOpen": [
        ("A shell", {"run_id": "1234_7.1", "terminal": {"rows": 24, "columns": 80}, "terminal_type": "xterm"}),
        ("A command", {"run_id": "1234_7.1", "command": ["nvidia-smi"]}),
    ],
    "AttachStep": [
        ("Wait for output", {"session": "dG9rZW4gb2YgYSBzZXNzaW9u", "received": 3}),
        ("The window has changed", {"session": "dG9rZW4gb2YgYSBzZXNzaW9u", "terminal": {"rows": 50, "columns": 120}}),
    ],
    "RunnerReport": [
        (
            "One job runs",
            {
                "host": "node1",
                "runner": "0f3c",
                "token": "dG9rZW4gb2YgYSBydW5uZXI",
                "executors": ["systemd", "process"],
                "runs": [
                    {
                        "run_id": "1234_7.1",
                        "lease_id": "51d4ec4d9b-1-7",
                        "part": {"host": "node1", "state": "running", "started_at": "2026-01-01T12:00:00.123456Z"},
                        "progress": 0.42,
                    }
                ],
            },
        )
    ],
    "LeaseFilter": [("All that hold devices", {}), ("Those of one owner", {"owner": "ann", "limit": 100})],
    "DeviceFilter": [("All", {}), ("Some models", {"models": ["*H100*"]})],
    "QueueFilter": [("One's own place", {"owner": "ann", "request_id": "train-7"})],
    "DrainAction": [
        ("Keep work off a host", {"drain": True, "hosts": ["node1"], "reason": "fans"}),
        ("Let it on again", {"drain": False, "hosts": ["node1"]}),
    ],
    "EvictAction": [("Take a lease back", {"lease_id": "51d4ec4d9b-1-7", "reason": "maintenance"})],
    "PreemptAction": [("Take a lease back, with notice", {"lease_id": "51d4ec4d9b-1-7", "reason": "a course"})],
    "CheckpointAction": [
        ("The work is saved", {"lease_id": "51d4ec4d9b-1-7", "saved": True}),
        ("It needs 40 seconds", {"lease_id": "51d4ec4d9b-1-7", "busy_seconds": 40}),
    ],
    "ResizeAction": [
        ("Take the devices that are offered", {"lease_id": "51d4ec4d9b-1-7", "number": 12}),
        ("Keep the lease as it is", {"lease_id": "51d4ec4d9b-1-7", "accept": False, "number": 12}),
        ("Give one device back, unasked", {"lease_id": "51d4ec4d9b-1-7", "devices": ["GPU-5a3c"]}),
    ],
    "GroupFilter": [("All", {}), ("One, with those within", {"name": "lab"})],
    "GroupChange": [
        (
            "Add or change a group",
            {
                "set": [
                    {
                        "name": "lab/vision",
                        "weight": 2,
                        "guarantee": {"gpus": {"H100": 16}},
                        "limit": {"gpus": {"H100": 32}},
                        "members": ["ann", "ben"],
                    }
                ],
                "revision": 4,
            },
        ),
        ("What deleting a group would do", {"delete": ["lab/vision"], "dry_run": True}),
    ],
    "MovesQuery": [
        ("For the request that is next", {}),
        ("For two whole hosts", {"free_hosts": 2, "models": ["*H100*"]}),
    ],
    "WindowFilter": [("All", {}), ("Those for one owner", {"owner": "ann"})],
    "WindowAction": [
        (
            "Eight devices for a course, each Monday",
            {
                "book": {
                    "starts_at": "2026-12-07T07:00:00Z",
                    "ends_at": "2026-12-07T11:00:00Z",
                    "repeat": "weekly",
                    "repeat_until": "2027-01-31T22:59:59Z",
                    "zone": "Europe/Berlin",
                    "gpus": 8,
                    "models": ["*H100*"],
                    "group": "lab/vision",
                    "reason": "course",
                }
            },
        ),
        (
            "Maintenance of a host",
            {
                "book": {
                    "starts_at": "2026-12-05T05:00:00Z",
                    "ends_at": "2026-12-05T11:00:00Z",
                    "maintenance": True,
                    "hosts": ["node1"],
                    "reason": "new fans",
                }
            },
        ),
        ("Cancel a window", {"cancel": "4f1c09aa"}),
    ],
    "QueryRequest": [
        ("Watts by host", {"sql": "SELECT host, avg(power_watts) FROM samples GROUP BY host"}),
        ("As Arrow, in parts", {"sql": "FROM samples", "format": "arrow", "limit": 1000000, "window": 8}),
    ],
    "CancelRequest": [("By the id that it was given", {"query_id": "q-1"})],
    "DurationsRequest": [("All groups", {}), ("The hundred with the most weight", {"max_groups": 100})],
    "SnapshotRequest": [("All", {}), ("Without archived days", {"archive": False})],
    "SnapshotRead": [("The first piece", {"snapshot_id": "18865c2f0d5a9d15", "offset": 0})],
}

_REPLIES: tuple[tuple[str, Struct], ...] = (
    ("Granted", requests.Assignment(lease=_LEASE)),
    ("Nothing free", _FULL),
    ("Wrong", requests.Error(code="invalid", message="Expected a number of at least 0 - at `$.gpus`", field="$.gpus")),
    ("Renewed", _LEASE),
    ("One", operations.Leases(leases=[_LEASE])),
    ("One", operations.Devices(devices=[operations.DeviceStatus(uuid=_DEVICE, host="node1", index=0, model=_MODEL)])),
    (
        "Idle",
        operations.FleetSummary(hosts=4, devices=32, usable_devices=32, models={_MODEL: 32}, planner="51d4ec4d9b"),
    ),
    (
        "One waits",
        operations.Queue(
            entries=[
                operations.QueueEntry(
                    request_id="train-7",
                    owner="ann",
                    position=1,
                    waiting_seconds=12.5,
                    message=_WHY,
                )
            ],
            total=1,
        ),
    ),
    ("Refused", operations.Explanation(granted=False, message=_WHY, rejection=_FULL)),
    ("One host", operations.Drains(drains={"host:node1": "fans (by olga)"})),
    (
        "One lends",
        groups.Groups(
            groups=[
                groups.GroupStatus(group=groups.Group(name=groups.DEFAULT_GROUP), gpus_used={_MODEL: 2.0}),
                groups.GroupStatus(
                    group=groups.Group(
                        name="lab", guarantee=groups.Resources(gpus={"H100": 16.0}), members=["ann", "ben"]
                    ),
                    gpus_guaranteed=16.0,
                ),
            ],
            revision=1,
        ),
    ),
    (
        "One is to come",
        windows.Windows(
            windows=[
                windows.WindowStatus(
                    window=windows.Window(
                        window_id="4f1c09aa",
                        starts_at=_AT + timedelta(days=1),
                        ends_at=_AT + timedelta(days=1, hours=4),
                        gpus=1,
                        owners=["ann"],
                        devices=[_DEVICE],
                        reason="course",
                        operator="olga",
                    ),
                    state=windows.WindowState.BOOKED,
                    starts_at=_AT + timedelta(days=1),
                    ends_at=_AT + timedelta(days=1, hours=4),
                    occurrences=1,
                    hosts=["node1"],
                )
            ]
        ),
    ),
    (
        "One lease to preempt",
        moves.Moves(
            possible=True,
            message="the request of ann for 2 devices could start if 1 lease went, which would lose 0.5 GPU-hours "
            "of work",
            moves=[
                moves.Move(
                    lease_id="51d4ec4d9b-1-7",
                    owner="ben",
                    name="tuning",
                    devices=2.0,
                    hosts=["node1"],
                    since=_AT,
                    price_gpu_seconds=1800.0,
                    grace_seconds=60.0,
                )
            ],
            price_gpu_seconds=1800.0,
            request_id="train-7",
            owner="ann",
        ),
    ),
    (
        "A row",
        query.QueryResult(
            columns=["host", "at"],
            types=["VARCHAR", "TIMESTAMP WITH TIME ZONE"],
            rows=[["node1", "2026-01-01T12:00:00.123456Z"]],
            truncated=False,
        ),
    ),
    ("Ends", query.Cancelled(query_id="q-1")),
    ("Ready", query.Snapshot(snapshot_id="18865c2f0d5a9d15", bytes=1_060_864, samples=12_500)),
    ("Up to date", query.ProcessorStatus(processor="p-1", watermarks={"CORRAL_TELEMETRY": 581}, samples=12_500)),
    (
        "Ready",
        health.ServiceHealth(
            service=instruments.ServiceKind.PLANNER,
            instance="51d4ec4d9b",
            host="node1",
            ready=True,
            role="leader",
            started_at=_AT,
        ),
    ),
    (
        "Granted",
        requests.LeaseEvent(kind=requests.LeaseEventKind.GRANTED, time=_AT, lease=_LEASE, planner="51d4ec4d9b"),
    ),
    (
        "Granted after a wait",
        request_events.RequestEvents(
            planner="51d4ec4d9b",
            events=[
                request_events.RequestEvent(
                    uid="51d4ec4d9b-1-7",
                    request=request_events.AskedRequest(owner="ann", gpus=1, request_id="train-7", wait_seconds=3600.0),
                    asked_at=_AT,
                    ended_at=_AT + timedelta(minutes=3),
                    outcome=request_events.RequestOutcome.GRANTED,
                    queued=True,
                    position=2,
                    lease_id="51d4ec4d9b-1-7",
                    forecast=request_events.Forecast(
                        expected_start=_AT + timedelta(minutes=4),
                        earliest_start=_AT + timedelta(minutes=1),
                        latest_start=_AT + timedelta(minutes=9),
                        made_at=_AT,
                    ),
                )
            ],
        ),
    ),
    (
        "A report of a month",
        reports.ReportWritten(
            report_id="7f3a2b9c51d4ec4d9b",
            name="fleet",
            period="2025-12",
            start=_AT - timedelta(days=31),
            end=_AT,
            written_at=_AT + timedelta(hours=2),
            title="GPU usage, 2025-12",
            facts=[("GPU-hours granted", "5,952.0")],
            files=[reports.ReportFile(name="fleet-2025-12.pdf", size_bytes=1_048_576)],
        ),
    ),
    ("One task runs", _JOB),
    ("One task runs", jobs.Jobs(jobs=[jobs.JobListing(job=_JOB, tasks=[_TASK], total_tasks=100)], total=1)),
    ("Ten tasks were ended", jobs.JobDetails(job=_JOB, changed=10)),
    (
        "A task was started",
        jobs.JobEvent(
            kind=jobs.JobEventKind.CHANGED, time=_AT, job=_JOB, version=3, tasks=[_TASK], planner="51d4ec4d9b"
        ),
    ),
    (
        "A rule and the target that it names",
        notifications.Notifications(
            rules=[
                notifications.OwnedRule(
                    owner="ann",
                    rule=notifications.NotifyRule(
                        name="nights", on=[notifications.NewsKind.JOB_ENDED], to=["ann-mail"], quiet=["22:00-07:00"]
                    ),
                )
            ],
            targets=[notifications.TargetStatus(name="ann-mail", service="E-Mail")],
        ),
    ),
    (
        "Start a task",
        runs.RunOrders(
            planner="51d4ec4d9b",
            term=12,
            token="dG9rZW4gb2YgYSBydW5uZXI",
            runs=[
                runs.Run(
                    run_id="1234_7.1",
                    verb=runs.RunVerb.START,
                    owner="ann",
                    job_id="1234",
                    index=7,
                    lease_id="51d4ec4d9b-1-7",
                    grants=[_GRANT],
                    hosts=["node1"],
                    spec=jobs.JobSpec(request=requests.WorkRequest(owner="ann"), command=["python", "sweep.py"]),
                )
            ],
            complete=True,
        ),
    ),
    ("A session has begun", attach.AttachOpened(session="dG9rZW4gb2YgYSBzZXNzaW9u", executor="systemd")),
    (
        "Its command has ended",
        attach.AttachNews(exit=attach.AttachExit(end=attach.AttachEnd.EXITED, exit_code=0)),
    ),
    (
        "One workload",
        durations.DurationDigest(
            time=_AT,
            groups=[durations.DurationGroup(owner="ann", name="train", shape="1", ended=[(50, 3.0), (51, 1.0)])],
        ),
    ),
    (
        "A process",
        telemetry.ProcessBatch(
            host="node1",
            agent="0f3c",
            sequence=8,
            time_ns=_AT_NS,
            processes=[telemetry.ProcessSample(device=_DEVICE, pid=4711, name="python", started_ns=_AT_NS)],
        ),
    ),
    ("After ten seconds", telemetry.AgentReport(host="node1", agent="0f3c", sequence=9, time_ns=_AT_NS, ticks=10)),
    (
        "One device",
        telemetry.Inventory(
            host=telemetry.HostInfo(name="node1", cpus=64, memory_bytes=2**39),
            agent="0f3c",
            time_ns=_AT_NS,
            devices=[telemetry.DeviceInfo(uuid=_DEVICE, host="node1", index=0, name=_MODEL)],
        ),
    ),
    (
        "An Xid",
        telemetry.DeviceEvent(
            host="node1",
            agent="0f3c",
            sequence=10,
            time_ns=_AT_NS,
            kind="xid",
            severity=telemetry.Severity.HARDWARE,
            device=_DEVICE,
            code=79,
            message="GPU has fallen off the bus",
        ),
    ),
)


def examples() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Of each message that JSON can show, with what each is an example of. Bytes it can't show."""
    found = {name: list(given) for name, given in REQUESTS.items()}
    for summary, reply in _REPLIES:
        body: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(reply))
        found.setdefault(type(reply).__name__, []).append((summary, body))
    return found
