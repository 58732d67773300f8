"""Events of the driver, and the health of a device by its slowly changing numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pynvml
import pytest
from corral.collectors.nvml.events import NOTICES
from corral.collectors.nvml.health import Health, changes
from corral.collectors.nvml.source import NvmlSource
from corral.collectors.nvml.xid import XIDS, describe
from corral.collectors.processes.proc import machine_ids
from corral.collectors.source import SourceEvent
from corral.schemas.telemetry import Severity
from support.fake_nvml import LOST, NOT_SUPPORTED, OK, UNINITIALIZED, UNKNOWN, FakeInstance, FakeNvml

RECOVERY = (230, 0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def events() -> list[SourceEvent]:
    return []


@pytest.fixture
def source(nvml: FakeNvml) -> Iterator[NvmlSource]:
    source = NvmlSource("node-1")
    yield source
    source.close()
    assert nvml.open_sets == 0
    assert nvml.initialized == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("corral-nvml")]


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def of(events: list[SourceEvent], kind: str) -> list[SourceEvent]:
    return [event for event in events if event.kind == kind]


@pytest.mark.parametrize(
    ("code", "severity"),
    [
        (13, Severity.APPLICATION),
        (31, Severity.APPLICATION),
        (43, Severity.APPLICATION),
        (48, Severity.RESET),
        (63, Severity.WARNING),
        (64, Severity.RESET),
        (74, Severity.RESET),
        (79, Severity.HARDWARE),
        (94, Severity.APPLICATION),
        (95, Severity.RESET),
        (119, Severity.RESET),
        (9999, Severity.WARNING),
    ],
)
def test_an_xid_is_published_with_meaning_and_severity_at_once(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], code: int, severity: Severity
) -> None:
    source.open(events.append)
    before = time.time_ns()
    nvml.raise_event(nvml.devices[1], pynvml.nvmlEventTypeXidCriticalError, code)
    until(lambda: of(events, "xid"))  # nobody has read a tick
    (event,) = of(events, "xid")
    assert (event.code, event.severity, event.device) == (code, severity, nvml.devices[1].uuid)
    assert event.host == "node-1"
    assert event.time_ns >= before
    assert event.message == f"Xid {code}: {describe(code).meaning}"


def test_the_catalogue_has_every_code_that_nvidia_documents() -> None:
    assert set(range(1, 173)) <= XIDS.keys()
    assert all(xid.meaning and code == xid.code for code, xid in XIDS.items())


def test_every_event_type_of_the_library_has_a_notice_and_is_published(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    nvml.devices[0].event_types = pynvml.nvmlEventTypeAll
    source.open(events.append)
    events.clear()
    covered = 0
    for notice in NOTICES:
        number = getattr(pynvml, notice.constant)
        covered |= number
        nvml.raise_event(nvml.devices[0], number, 0)
    until(lambda: len(events) >= len(NOTICES))
    assert [event.kind for event in events] == [notice.kind for notice in NOTICES]
    assert covered == pynvml.nvmlEventTypeAll


def test_an_event_of_a_mig_instance_names_the_instance(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    whole = nvml.devices[0]
    whole.mig_mode = (1, 1)
    whole.instances = [FakeInstance(whole, 0, "1g.10gb", 10, 16), FakeInstance(whole, 1, "1g.10gb", 10, 16)]
    source.open(events.append)
    nvml.raise_event(whole, pynvml.nvmlEventTypeXidCriticalError, 31, (8, 0))
    until(lambda: of(events, "xid"))
    (event,) = of(events, "xid")
    assert event.device == whole.instances[1].uuid
    assert event.data == {"gpu_instance": 8, "compute_instance": 0}


def test_clock_changes_do_not_flood_the_bus(nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]) -> None:
    source.open(events.append)
    for _ in range(500):
        nvml.raise_event(nvml.devices[0], pynvml.nvmlEventTypeClock, 0)
    nvml.raise_event(nvml.devices[0], pynvml.nvmlEventTypeXidCriticalError, 13)
    until(lambda: of(events, "xid"))
    assert len(of(events, "clock")) == 1


def test_the_thread_survives_errors_without_spinning_and_ends_with_the_source(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    source.open(events.append)
    nvml.events.put(UNKNOWN)
    nvml.events.put(LOST)
    until(lambda: nvml.events.empty())
    calls = nvml.calls["nvmlEventSetWait_v2"]
    assert calls < 10
    nvml.raise_event(nvml.devices[0], pynvml.nvmlEventTypeXidCriticalError, 79)
    until(lambda: of(events, "xid"))
    source.close()
    source.open(events.append)
    nvml.raise_event(nvml.devices[0], pynvml.nvmlEventTypeXidCriticalError, 13)
    until(lambda: len(of(events, "xid")) == 2)
    nvml.events.put(UNINITIALIZED)
    until(lambda: not [t for t in threading.enumerate() if t.name == "corral-nvml-events"])


def test_devices_without_events_are_read_all_the_same(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    nvml.errors["nvmlDeviceGetSupportedEventTypes"] = NOT_SUPPORTED
    source.open(events.append)
    assert len(source.read()[0].devices) == 2


def test_a_fault_is_cleared_when_the_driver_asks_for_nothing(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.device.CHECK_SECONDS", 0.0)
    monkeypatch.setattr("corral.collectors.nvml.device.SETTLE_SECONDS", 0.0)
    device = nvml.devices[0]
    device.fields[RECOVERY] = (1, 0)
    source.open(events.append)
    source.read()
    events.clear()
    nvml.raise_event(device, pynvml.nvmlEventTypeXidCriticalError, 95)
    until(lambda: of(events, "xid"))
    until(lambda: source._devices[0].faulted_at is not None)
    source.read()
    (cleared,) = of(events, "recovery_action")
    assert (cleared.severity, cleared.device) == (Severity.CLEARED, device.uuid)


def test_events_carry_what_tells_a_reset_from_a_restart(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    """The counter of energy at an Xid and at each start, and the boot: a later start compares them."""
    device = nvml.devices[0]
    source.open(events.append)
    source.read()
    energy = source._devices[0].energy_millijoules
    assert energy
    nvml.raise_event(device, pynvml.nvmlEventTypeXidCriticalError, 95)
    until(lambda: of(events, "xid"))
    (xid,) = of(events, "xid")
    assert xid.data == {"energy_millijoules": energy}
    (started,) = [event for event in of(events, "device_started") if event.device == device.uuid]
    assert started.data["energy_millijoules"] == energy
    assert started.data["boot"] in machine_ids()
    assert (started.data["index"], started.data["name"]) == (0, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(("code", "reset"), [(LOST, True), (UNKNOWN, False)])
def test_a_device_that_was_only_silent_was_not_reset(
    nvml: FakeNvml,
    source: NvmlSource,
    events: list[SourceEvent],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    reset: bool,
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.source.RETURN_SECONDS", 0.0)
    monkeypatch.setattr("corral.collectors.nvml.device.SILENT_SECONDS", 0.0)
    device = nvml.devices[0]
    source.open(events.append)
    source.read()
    device.dead = code
    until(lambda: source.read() is not None and of(events, "device_lost"))
    device.dead = OK
    until(lambda: source.read() is not None and of(events, "device_returned"))
    (returned,) = of(events, "device_returned")
    assert (returned.severity, returned.data) == (Severity.CLEARED, {"reset": reset})


def test_what_the_driver_asks_for_is_told_when_it_changes(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    device = nvml.devices[0]
    device.fields[RECOVERY] = (1, 1)
    device.remapped = (0, 1, 1, 0)
    source.open(events.append)
    source.read()
    mine = [event for event in events if event.device == device.uuid]
    assert [(e.kind, e.severity) for e in mine] == [
        ("row_remap_pending", Severity.WARNING),
        ("recovery_action", Severity.RESET),
    ]


def test_health_from_reading_to_reading() -> None:
    well = Health(recovery_action=0, remap_failure=0, remap_pending=0, uncorrected=0)
    assert [f.severity for f in changes(None, well)] == [Severity.CLEARED]
    assert not changes(well, well)
    broken = Health(recovery_action=0, remap_failure=1, remap_pending=0, uncorrected=1)
    assert [f.kind for f in changes(well, broken)] == ["row_remap_failure"]
    assert not changes(broken, broken)
    assert [f.severity for f in changes(None, broken)] == [Severity.HARDWARE]
    # A driver that does not tell, and errors since its start: an earlier report stands.
    assert not changes(None, Health(uncorrected=3))
    reboot = Health(recovery_action=2)
    assert [(f.kind, f.severity) for f in changes(well, reboot)] == [("recovery_action", Severity.HARDWARE)]
    for action in (*range(1, 8), 8, 200):
        asked = Health(recovery_action=action)
        for before in (None, well, Health(recovery_action=action % 7 + 1)):
            (found,) = changes(before, asked)
            assert (found.kind, found.severity in (Severity.RESET, Severity.HARDWARE)) == ("recovery_action", True)
    assert [f.severity for f in changes(reboot, well)] == [Severity.CLEARED]
    assert [f.severity for f in changes(well, well, faulted=True)] == [Severity.CLEARED]
    # A board that failed for good is not cleared by what the driver asks for.
    assert not changes(broken, broken, faulted=True)
