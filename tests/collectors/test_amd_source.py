"""The AMD source through the real amdsmi package, against C functions that the tests control."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from corral.collectors.amd.source import AmdSource
from corral.collectors.source import SourceEvent, SourceUnavailable, Tick
from corral.schemas import columns
from corral.schemas.metrics import DeviceSample
from corral.schemas.telemetry import Link, SampleBatch, Severity
from support.fake_amdsmi import IO, NOT_INIT, NOT_LOADED, OK, FakeAmd, FakeAmdDevice, available, install

pytestmark = pytest.mark.skipif(not available(), reason="the package amdsmi is not installed (corral[amd])")


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> FakeAmd:
    fake = FakeAmd()
    install(fake, monkeypatch)
    return fake


@pytest.fixture
def events() -> list[SourceEvent]:
    return []


@pytest.fixture
def source(amd: FakeAmd) -> Iterator[AmdSource]:
    source = AmdSource("node-2", {"rack": "r2"})
    yield source
    source.close()
    assert amd.initialized == 0
    assert amd.listening == 0


def rows(tick: Tick) -> list[DeviceSample]:
    batch = SampleBatch(
        host=tick.host,
        agent="a",
        sequence=1,
        source="amdsmi",
        devices=tick.devices,
        times_ns=tick.times_ns,
        columns=tick.columns,
        nulls=tick.nulls,
    )
    columns.check(batch)
    return list(columns.rows(batch))


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_metrics_have_the_units_of_the_catalogue(amd: FakeAmd, source: AmdSource, events: list[SourceEvent]) -> None:
    amd.devices[1].throttled = True
    source.open(events.append)
    first, second = rows(source.read()[0])
    assert (first.gpu_utilization_percent, first.memory_utilization_percent) == (93, 55)
    assert first.decoder_utilization_percent is None  # "N/A" in amdsmi's words
    assert (first.memory_used_bytes, first.memory_total_bytes) == (150 * 2**30, 192 * 2**30)
    assert first.memory_free_bytes == 42 * 2**30
    assert (first.power_watts, first.power_instant_watts, first.power_limit_watts) == (612, 612, 750)
    assert first.energy_millijoules == 15_250
    assert (first.temperature_celsius, first.memory_temperature_celsius) == (61, 54)  # no edge sensor: the hot spot
    assert (first.temperature_slowdown_celsius, first.temperature_shutdown_celsius) == (100, 105)
    assert (first.sm_clock_megahertz, first.memory_clock_max_megahertz) == (2100, 1300)
    assert (first.pcie_generation, first.pcie_width, first.pcie_replay_count) == (5, 16, 9)
    assert (first.ecc_corrected_volatile_count, first.ecc_uncorrected_volatile_count) == (4, 1)
    assert first.ecc_corrected_count is None
    assert first.retired_pages_count == 0
    assert first.fan_percent is None
    assert (first.throttle_reasons_bitmask, second.throttle_reasons_bitmask) == (0x4, 0x24)
    assert first.sm_active_percent is None


def test_unsupported_is_not_asked_again_and_a_shared_call_is_made_once(
    amd: FakeAmd, source: AmdSource, events: list[SourceEvent]
) -> None:
    for device in amd.devices:
        device.power = None
    source.open(events.append)
    source.read()
    amd.calls.clear()
    for _ in range(5):
        source.read()
    assert amd.calls["amdsmi_get_gpu_activity"] == 10
    assert amd.calls["amdsmi_get_power_info"] == 0
    assert amd.calls["amdsmi_get_gpu_fan_speed"] == 0
    assert amd.calls["amdsmi_get_gpu_total_ecc_count"] == 0  # slow, and just read
    assert source.read_errors == 0


def test_inventory_with_xgmi_and_pcie_links(amd: FakeAmd, events: list[SourceEvent]) -> None:
    three = [FakeAmdDevice(0), FakeAmdDevice(1), FakeAmdDevice(2, numa=1)]
    amd.devices = three
    import amdsmi

    xgmi = int(amdsmi.AmdSmiLinkType.AMDSMI_LINK_TYPE_XGMI)
    pcie = int(amdsmi.AmdSmiLinkType.AMDSMI_LINK_TYPE_PCIE)
    three[1].links, three[2].links = {0: xgmi}, {0: pcie, 1: pcie}
    source = AmdSource("node-2", {"rack": "r2"})
    source.open(events.append)
    inventory = source.inventory()[0]
    source.close()
    device = inventory.devices[1]
    assert (device.vendor, device.name, device.architecture) == ("amd", "AMD Instinct MI300X", "gfx942")
    assert (device.uuid, device.index, device.sm_count) == (three[1].uuid, 1, 304)
    assert (device.memory_bytes, device.memory_bandwidth_bytes_per_second) == (192 * 2**30, 5300 * 10**9)
    assert device.power_limit_max_watts == 750
    assert device.pcie_address == "0000:11:00.0"
    assert inventory.host.driver == "6.12.12"
    assert inventory.host.labels == {"rack": "r2"}
    s, x, y = Link.SAME, Link.NVLINK, Link.SYSTEM
    assert inventory.links == [[s, x, y], [x, s, y], [y, y, s]]


def test_a_process_has_its_device_memory_and_share_of_its_time(
    amd: FakeAmd, source: AmdSource, events: list[SourceEvent]
) -> None:
    amd.devices[1].processes = [(os.getpid(), "/opt/rocm/bin/train", 7 * 2**30, 152)]
    source.open(events.append)
    (process,) = source.processes()["node-2"]
    assert (process.device, process.pid, process.memory_used_bytes) == (amd.devices[1].uuid, os.getpid(), 7 * 2**30)
    assert process.sm_utilization_percent == 50
    assert process.name.startswith("python")


def test_a_device_that_falls_silent_is_lost_and_may_return(
    amd: FakeAmd, source: AmdSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.amd.source.SILENT_SECONDS", 0.0)
    monkeypatch.setattr("corral.collectors.amd.source.RETURN_SECONDS", 0.0)
    source.open(events.append)
    assert len(rows(source.read()[0])) == 2
    amd.devices[0].dead = IO
    for _ in range(2):
        dead, alive = rows(source.read()[0])
        assert dead.power_watts is None
        assert alive.power_watts == 612
    (left,) = rows(source.read()[0])
    assert left.device == amd.devices[1].uuid
    assert (events[-1].kind, events[-1].severity, events[-1].device) == (
        "device_lost",
        Severity.HARDWARE,
        amd.devices[0].uuid,
    )
    assert len(source.inventory()[0].devices) == 2
    amd.devices[0].dead = OK
    assert len(rows(source.read()[0])) == 2
    assert (events[-1].kind, events[-1].severity) == ("device_returned", Severity.CLEARED)


def test_driver_gone_is_unavailable_and_open_starts_again(
    amd: FakeAmd, source: AmdSource, events: list[SourceEvent]
) -> None:
    source.open(events.append)
    amd.devices[0].errors["amdsmi_get_gpu_activity"] = NOT_INIT
    with pytest.raises(SourceUnavailable):
        source.read()
    source.close()
    amd.init_code = NOT_LOADED
    with pytest.raises(SourceUnavailable, match="amdgpu driver"):
        source.open(events.append)
    amd.init_code = OK
    amd.devices[0].errors.clear()
    source.open(events.append)
    assert len(rows(source.read()[0])) == 2


def test_events_of_the_driver(amd: FakeAmd, source: AmdSource, events: list[SourceEvent]) -> None:
    import amdsmi

    kinds = amdsmi.AmdSmiEvtNotificationType
    source.open(events.append)
    events.clear()
    for _ in range(50):
        amd.events.put((amd.devices[1], int(kinds.VMFAULT), b"fault"))
    amd.events.put((amd.devices[0], int(kinds.GPU_PRE_RESET), b"pre"))
    amd.events.put((amd.devices[0], int(kinds.GPU_POST_RESET), b"post"))
    until(lambda: len(events) >= 3)
    assert [(e.kind, e.severity, e.device) for e in events] == [
        ("vm_fault", Severity.APPLICATION, amd.devices[1].uuid),
        ("device_reset", Severity.RESET, amd.devices[0].uuid),
        ("device_reset", Severity.CLEARED, amd.devices[0].uuid),
    ]


def test_without_the_library_the_message_says_what_to_do() -> None:
    script = (
        "from corral.collectors.amd.source import AmdSource\n"
        "try:\n    AmdSource('h').open(print)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True, env={"ROCM_PATH": "/x"}
    )
    assert done.stdout.startswith("SourceUnavailable amdsmi does not find its library libamd_smi.so"), done.stdout
