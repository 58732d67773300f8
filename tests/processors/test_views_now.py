"""What views say of now: the last word of each host counts, and what is gone is gone."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.schemas import subjects
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.telemetry import AgentReport, DeviceEvent, ProcessBatch, ProcessSample, Severity
from msgspec.structs import replace
from support.history import History, inventory

S = 10**9
GIB = 2**30


@pytest.fixture
def history(tmp_path: Path) -> Any:
    made = History(tmp_path)
    yield made
    made.database.close()


def listed(sequence: int, seconds_ago: float, *pids: int, host: str = "h1") -> ProcessBatch:
    found = [ProcessSample(device="A0", pid=pid, name="python") for pid in pids]
    at = time.time_ns() - int(seconds_ago * S)
    return ProcessBatch(host=host, agent="a", sequence=sequence, time_ns=at, processes=found)


def test_an_empty_list_of_processes_ends_those_before_it(history: History) -> None:
    now = "SELECT pid FROM processes_now ORDER BY 1"
    history.take(f"{subjects.INVENTORY}.h1", inventory("h1", "A0"))
    history.take(f"{subjects.PROCESSES}.h1", listed(1, 45, 1, 2))
    history.take(f"{subjects.PROCESSES}.h2", listed(1, 30, 9, host="h2"))
    assert history.rows(now) == [(1,), (2,), (9,)]
    history.take(f"{subjects.PROCESSES}.h1", listed(2, 40))
    history.take(f"{subjects.PROCESSES}.h1", listed(3, 38))
    assert history.rows(now) == [(9,)]
    # Of empty lists in a row the first is enough to know.
    assert history.rows("SELECT host, count(*) FROM store.without_processes GROUP BY 1") == [("h1", 1)]
    history.take(f"{subjects.PROCESSES}.h1", listed(4, 35, 3))
    assert history.rows(now) == [(3,), (9,)]
    history.take(f"{subjects.PROCESSES}.h1", listed(5, 30))
    assert history.rows(now) == [(9,)]
    # One that comes late is of before.
    history.take(f"{subjects.PROCESSES}.h1", listed(6, 37, 4))
    assert history.rows(now) == [(9,)]


def test_a_violation_lasts_until_its_collector_was_heard_last(history: History) -> None:
    began = time.time_ns() - 6 * 3600 * S
    history.take(f"{subjects.INVENTORY}.h1", replace(inventory("h1", "A0"), agent="killed"))
    event = DeviceEvent(
        host="h1", agent="killed", sequence=1, time_ns=began + 30 * S, kind="process_without_lease",
        severity=Severity.INFO, device="A0", data={"violation": "p:1", "since_ns": began, "pid": 5},
    )  # fmt: skip
    history.take(f"{subjects.EVENTS}.h1", event)
    for number in range(6):
        at = began + number * 3600 * S
        report = AgentReport(host="h1", agent="killed", sequence=2 + number, time_ns=at, ticks=1)
        history.take(f"{subjects.AGENTS}.h1", report)
    ended = "SELECT until IS NOT NULL, round(hours, 2) FROM lease_violations"
    assert history.rows(ended) == [(True, 5.0)]  # nothing was heard for an hour
    history.take(f"{subjects.INVENTORY}.h1", replace(inventory("h1", "A0"), agent="next"))
    report = AgentReport(host="h1", agent="next", sequence=1, time_ns=time.time_ns() - S, ticks=1)
    history.take(f"{subjects.AGENTS}.h1", report)
    assert history.rows(ended) == [(True, 5.0)]


def lease(history: History, name: str, device: str, share: float, memory: int = 0, cpus: float = 0.0) -> None:
    now = datetime.now(UTC)
    grant = Grant(host="h1", device=device, index=0, memory_bytes=memory, share=share, cpus=cpus)
    held = Lease(
        lease_id=name, owner="ann", state=LeaseState.ACTIVE, granted_at=now - timedelta(minutes=9),
        expires_at=now + timedelta(hours=1), ttl_seconds=300.0, grants=[grant],
    )  # fmt: skip
    event = LeaseEvent(kind=LeaseEventKind.GRANTED, time=held.granted_at, lease=held, planner="p")
    history.take(subjects.lease_subject("granted", name), event)


@pytest.mark.parametrize(("parts", "memory"), [(3, 0), (7, GIB), (10, 0), (10, GIB)])
def test_parts_that_add_up_to_a_device_leave_nothing_of_it(history: History, parts: int, memory: int) -> None:
    found = inventory("h1", "A0")
    found = replace(
        found,
        host=replace(found.host, cpus=16),
        devices=[replace(device, memory_bytes=80 * GIB) for device in found.devices],
    )
    history.take(f"{subjects.INVENTORY}.h1", found)
    asked = "SELECT reason, stranded_share FROM stranded_capacity WHERE reason <> 'silent' ORDER BY 1"
    for part in range(parts):
        if part == parts - 1:
            assert history.rows(asked) == []
        lease(history, f"l{part}", "A0", 1 / parts, memory, 16 / parts)
    assert history.rows(asked) == [("share_full", 0)]


def test_cores_that_are_all_leased_are_so_in_any_parts(history: History) -> None:
    found = inventory("h1", "A0", "B0")
    history.take(f"{subjects.INVENTORY}.h1", replace(found, host=replace(found.host, cpus=1)))
    for part in range(10):
        lease(history, f"l{part}", "A0", 0.05, cpus=0.1)
    asked = "SELECT device FROM stranded_capacity WHERE reason = 'no_cores' ORDER BY 1"
    assert history.rows(asked) == [("A0",), ("B0",)]


def test_a_board_that_was_replaced_is_no_concern_and_one_that_fell_off_the_bus_is(history: History) -> None:
    history.take(f"{subjects.INVENTORY}.h1", inventory("h1", "A0", "B0"))
    for sequence, device in enumerate(("A0", "B0"), start=1):
        event = DeviceEvent(
            host="h1", agent="a", sequence=sequence, time_ns=time.time_ns() - S, kind="xid", code=79,
            severity=Severity.HARDWARE, device=device,
        )  # fmt: skip
        history.take(f"{subjects.EVENTS}.h1", event)
    concerns = "SELECT device, unhealthy, concern FROM device_health ORDER BY 1"
    failing = "hardware fault; Xid 79"
    assert history.rows(concerns) == [("A0", "hardware", failing), ("B0", "hardware", failing)]
    history.take(f"{subjects.INVENTORY}.h1", inventory("h1", "A1"))
    assert history.rows(concerns) == [("A0", None, ""), ("A1", None, ""), ("B0", "hardware", failing)]


def test_the_hour_that_goes_on_is_divided_by_what_has_passed_of_it(history: History) -> None:
    history.take(f"{subjects.INVENTORY}.h1", inventory("h1", "A0"))
    number = history.database.series.number("h1", "A0")
    history.sample(number, datetime.now(UTC) - timedelta(seconds=1), power_watts=100.0)
    lease(history, "l1", "A0", 0.5)
    history.database.cursor().execute("UPDATE leases SET granted_at = now() - INTERVAL 2 HOUR")
    (leased,) = history.rows("SELECT leased_devices FROM fleet_by_hour ORDER BY hour DESC LIMIT 1")
    assert leased == (pytest.approx(0.5, rel=1e-3),)


def test_an_hour_that_is_over_is_divided_by_all_of_it(history: History) -> None:
    history.take(f"{subjects.INVENTORY}.h1", inventory("h1", "A0"))
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    number = history.database.series.number("h1", "A0")
    history.sample(number, hour - timedelta(seconds=1), power_watts=100.0)
    lease(history, "l1", "A0", 1.0)
    granted, ended = hour - timedelta(seconds=60), hour
    history.database.cursor().execute("UPDATE leases SET granted_at = ?, ended_at = ?", [granted, ended])
    assert history.rows("SELECT leased_devices FROM fleet_by_hour") == [(pytest.approx(1 / 60),)]


def test_a_board_that_no_inventory_has_named_is_where_it_was_heard_last(history: History) -> None:
    for seconds, host in ((120, "old"), (20, "new")):
        number = history.database.series.number(host, "A0")
        history.sample(number, datetime.now(UTC) - timedelta(seconds=seconds), power_watts=100.0)
    assert history.rows("SELECT host FROM devices_now") == [("new",)]
    history.take(f"{subjects.INVENTORY}.old", inventory("old", "A0"))
    assert history.rows("SELECT host FROM devices_now") == [("old",)]
