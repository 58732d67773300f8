"""What a host says concerns that host alone: who owns a device, and what the views make of the others' words."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.cli.operate.doctor import LISTED_TWICE, WRONG_CLOCKS
from corral.processors import views
from corral.schemas import subjects
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.speakers import SILENT_SECONDS, Owners
from corral.schemas.telemetry import (
    DeviceEvent,
    Inventory,
    ProcessBatch,
    ProcessSample,
    Severity,
)
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import History, inventory

S = 10**9
HOSTS = ("a", "b", "c")

steps = st.lists(
    st.tuples(st.sampled_from(HOSTS), st.sets(st.sampled_from("xyz")), st.sampled_from((1, 60, 200))), max_size=30
)


@given(steps)
def test_a_device_stays_with_the_host_that_listed_it_first(claims: list[tuple[str, set[str], int]]) -> None:
    """Until that one lists it no more, or is silent; then it moves with the next claim."""
    owners, at = Owners(), 0
    listed: dict[str, set[str]] = {}
    heard: dict[str, int] = {}
    for host, devices, pause in claims:
        at += pause
        before = {device: owners.owner(device) for device in "xyz"}
        others = owners.claim(host, devices, at)
        listed[host], heard[host] = devices, at
        for device in "xyz":
            owner = before[device]
            held = owner is not None and owner != host and at - heard[owner] <= SILENT_SECONDS
            if device not in devices:
                assert owners.owner(device) == (None if owner == host else owner)
            elif held:
                assert owners.owner(device) == others[device] == owner
            else:
                assert owners.owner(device) == host
                assert device not in others


def test_nothing_that_a_host_says_of_anothers_device_counts(tmp_path: Path) -> None:
    history = History(tmp_path)
    now = datetime.now(UTC)
    at = time.time_ns() - S
    history.take(f"{subjects.INVENTORY}.good", inventory("good", "A0"))
    grant = Grant(host="good", device="A0", index=0, memory_bytes=20 * 2**30, share=0.5)
    lease = Lease(
        lease_id="l1", owner="alice", state=LeaseState.ACTIVE, granted_at=now - timedelta(minutes=9),
        expires_at=now + timedelta(hours=1), ttl_seconds=300.0, name="train", grants=[grant],
    )  # fmt: skip
    event = LeaseEvent(kind=LeaseEventKind.GRANTED, time=now - timedelta(minutes=9), lease=lease, planner="p")
    history.take(subjects.lease_subject("granted", "l1"), event)

    def processes(host: str, memory: int) -> ProcessBatch:
        found = [ProcessSample(device="A0", pid=1, memory_used_bytes=memory, lease="l1", name="python")]
        return ProcessBatch(host=host, agent=host, sequence=1, time_ns=at, processes=found)

    def told(host: str, kind: str, severity: Severity, **data: Any) -> DeviceEvent:
        return DeviceEvent(
            host=host, agent=host, sequence=2, time_ns=at, kind=kind, severity=severity, device="A0", code=79,
            data={"violation": "v", "lease": "l1", "owner": "alice", "since_ns": at, "until_ns": at} | data,
        )  # fmt: skip

    history.take(f"{subjects.PROCESSES}.good", processes("good", 3 * 2**30))
    # What names another host is refused, whatever it is.
    for message in (inventory("good", "A0"), processes("good", 1), told("good", "xid", Severity.HARDWARE)):
        prefix = {Inventory: subjects.INVENTORY, ProcessBatch: subjects.PROCESSES}.get(type(message), subjects.EVENTS)
        assert history.take(f"{prefix}.evil", message) == ["invalid"]
    listed = inventory("evil", "E0")
    assert history.take(f"{subjects.INVENTORY}.evil", inventory("good", "A0")) == ["invalid"]
    # What is of the host itself is stored, and says nothing of the other's device.
    assert not history.take(f"{subjects.INVENTORY}.evil", inventory("evil", "E0", "A0", name="Made up"))
    assert not history.take(f"{subjects.PROCESSES}.evil", processes("evil", 79 * 2**30))
    assert not history.take(f"{subjects.EVENTS}.evil", told("evil", "xid", Severity.HARDWARE))
    assert not history.take(f"{subjects.EVENTS}.evil", told("evil", "lease_memory_exceeded", Severity.APPLICATION))
    assert history.rows("SELECT device, host, name FROM devices ORDER BY 1") == [
        ("A0", "good", "H100"), ("E0", "evil", "Made up"),
    ]  # fmt: skip
    assert history.rows("SELECT host, device, owner FROM device_conflicts") == [("evil", "A0", "good")]
    assert history.rows("SELECT unhealthy, xid_events FROM device_health WHERE device = 'A0'") == [(None, 0)]
    assert history.rows("SELECT memory_used_bytes_peak FROM lease_usage") == [(3 * 2**30,)]
    assert history.rows("FROM lease_violations") == []
    assert history.rows("SELECT host, owner, concern FROM processes_now ORDER BY 1") == [
        ("evil", None, "not a device of its lease"), ("good", "alice", ""),
    ]  # fmt: skip
    # Who is gone is found no fault with, though nobody says that it is over.
    history.database.cursor().execute(
        "INSERT INTO store.clocks SELECT unnest(['evil', 'good']), 60, now() - INTERVAL 1 DAY, NULL"
    )
    assert len(history.rows(LISTED_TWICE)) == 1
    assert len(history.rows(WRONG_CLOCKS)) == 2
    for table in ("hosts", "device_conflicts"):
        history.database.cursor().execute(
            f"UPDATE {table} SET last_seen = last_seen - INTERVAL 1 HOUR WHERE host = 'evil'"
        )
    assert history.rows(LISTED_TWICE) == []
    assert history.rows(WRONG_CLOCKS) == [("good", 60.0)]
    # The board moves for real: its host lists it no more.
    history.take(f"{subjects.INVENTORY}.good", inventory("good"))
    history.take(f"{subjects.INVENTORY}.evil", with_device(listed, "A0"))
    assert history.rows("SELECT host FROM devices WHERE device = 'A0'") == [("evil",)]
    assert history.rows("FROM device_conflicts") == []
    history.database.close()


def with_device(listed: Inventory, device: str) -> Inventory:
    return inventory(listed.host.name, *(found.uuid for found in listed.devices), device)


def test_no_value_that_a_host_sends_breaks_a_view_for_everybody(tmp_path: Path) -> None:
    history = History(tmp_path)
    at = time.time_ns() - S
    odd = [float("nan"), float("inf"), 1e300, "soon", True, None, 2**63 - 1, -(2**63)]
    for interval in (float("nan"), float("inf"), -1.0, 1e300):
        message = replace(inventory("evil", "E0"), interval_seconds=interval)
        assert history.take(f"{subjects.INVENTORY}.evil", message) == ["out_of_range"]
    history.take(f"{subjects.INVENTORY}.evil", inventory("evil", "E0"))
    now = datetime.now(UTC)
    grant = Grant(host="evil", device="E0", index=0, memory_bytes=2**30)
    lease = Lease(
        lease_id="l1", owner="alice", state=LeaseState.ACTIVE, granted_at=now - timedelta(minutes=9),
        expires_at=now + timedelta(hours=1), ttl_seconds=300.0, name="train", grants=[grant],
    )  # fmt: skip
    event = LeaseEvent(kind=LeaseEventKind.GRANTED, time=now - timedelta(minutes=9), lease=lease, planner="p")
    history.take(subjects.lease_subject("granted", "l1"), event)
    for number, value in enumerate(odd):
        names = ("since_ns", "until_ns", "pid", "memory_used_bytes", "memory_granted_bytes", "owner", "name")
        for kind in ("process_without_lease", "lease_memory_exceeded"):
            told = DeviceEvent(
                host="evil", agent="a", sequence=number + 1, time_ns=at, kind=kind, severity=Severity.APPLICATION,
                device="E0", data={"violation": f"v{number}", "lease": "l1"} | dict.fromkeys(names, value),
            )  # fmt: skip
            assert not history.take(f"{subjects.EVENTS}.evil", told)
    most = [
        ProcessSample(device="E0", pid=pid, memory_used_bytes=2**63 - 1, lease="l1", name="x") for pid in range(1, 4)
    ]
    batch = ProcessBatch(host="evil", agent="a", sequence=1, time_ns=at, processes=most)
    assert not history.take(f"{subjects.PROCESSES}.evil", batch)
    for view in views.VIEWS:
        history.rows(f"FROM {view}")
    assert history.rows("SELECT count(*) FROM events WHERE NOT json_valid(data)") == [(0,)]
    history.database.close()


def test_a_host_whose_agent_has_no_id_keeps_its_devices(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.take(f"{subjects.INVENTORY}.old", replace(inventory("old", "A0"), agent=""))
    history.take(f"{subjects.INVENTORY}.new", inventory("new", "A0"))
    assert history.rows("SELECT host FROM devices") == [("old",)]
    history.take(f"{subjects.INVENTORY}.old", replace(inventory("old", "A0"), agent="", leaving=True))
    history.take(f"{subjects.INVENTORY}.new", inventory("new", "A0"))
    assert history.rows("SELECT host FROM devices") == [("new",)]
    history.database.close()


def test_a_time_that_lies_far_ahead_keeps_no_devices_for_ever() -> None:
    """An older Corral stored times by hosts' own clocks, and a server's may be set back."""
    owners, year = Owners(), 365 * 86400.0
    owners.know("x", "a", year)
    assert owners.claim("b", ["x"], 0) == {}
    # A clock that is set back by a little makes nobody silent, and who is heard again is heard by the new time.
    owners.claim("b", ["x"], 3600)
    assert owners.claim("c", ["x"], 0) == {"x": "b"}
    owners.claim("b", ["x"], 1)
    assert owners.claim("c", ["x"], SILENT_SECONDS + 2) == {}


@pytest.mark.parametrize("silent", [False, True])
def test_a_board_moves_from_a_host_that_is_silent(tmp_path: Path, silent: bool) -> None:
    history = History(tmp_path)
    history.take(f"{subjects.INVENTORY}.old", inventory("old", "A0"))
    history.take(f"{subjects.INVENTORY}.new", inventory("new", "A0"), after=SILENT_SECONDS + (1 if silent else -1))
    assert history.rows("SELECT host FROM devices") == [("new" if silent else "old",)]
    history.database.close()


def test_a_fault_told_by_a_wrong_clock_is_cleared_by_a_right_one(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.take(f"{subjects.INVENTORY}.h1", inventory("h1", "A0"))
    for sequence, (ahead, severity) in enumerate(
        ((3600, "reset"), (0, "cleared"), (5, "hardware"), (-3600, "cleared"))
    ):
        event = DeviceEvent(
            host="h1", agent="a", sequence=sequence + 1, time_ns=history.stored_ns + ahead * S, kind="x",
            severity=Severity(severity), device="A0",
        )  # fmt: skip
        history.take(f"{subjects.EVENTS}.h1", event)
        expected = None if severity == "cleared" else severity
        assert history.rows("SELECT unhealthy FROM device_health") == [(expected,)], (ahead, severity)
    assert history.rows("SELECT count(*) FROM events WHERE time > now()") == [(0,)]
    history.database.close()
