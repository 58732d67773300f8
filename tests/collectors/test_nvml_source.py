"""The NVML source through pynvml's real ctypes path, against a library of C functions that the tests control."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import pynvml
import pytest
from corral.collectors.nvml.calls import SIGNATURES, probe
from corral.collectors.nvml.source import NvmlSource
from corral.collectors.source import SourceEvent, SourceUnavailable, Tick
from corral.schemas import columns
from corral.schemas.metrics import METRICS, DeviceSample
from corral.schemas.rows import Call, FieldValue
from corral.schemas.telemetry import Link, SampleBatch, Severity
from support.fake_nvml import (
    LOST,
    NO_DATA,
    NO_PERMISSION,
    NOT_LOADED,
    NOT_SUPPORTED,
    OK,
    RESET_REQUIRED,
    UNINITIALIZED,
    UNKNOWN,
    FakeDevice,
    FakeInstance,
    FakeNvml,
)

ALL_LINKS = 0xFFFFFFFF


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
    source = NvmlSource("node-1", {"rack": "r1"})
    yield source
    source.close()
    assert nvml.open_sets == 0, "an event set was left behind"
    assert nvml.samples == 0, "GPM samples were left behind"
    assert nvml.initialized == 0, "nvmlInit without nvmlShutdown"


def rows(tick: Tick) -> list[DeviceSample]:
    """A tick as rows, by way of the check that every receiver makes."""
    batch = SampleBatch(
        host=tick.host,
        agent="a",
        sequence=1,
        source="nvml",
        devices=tick.devices,
        times_ns=tick.times_ns,
        columns=tick.columns,
        nulls=tick.nulls,
    )
    columns.check(batch)
    return list(columns.rows(batch))


def read(source: NvmlSource) -> list[DeviceSample]:
    return rows(source.read()[0])


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def full_device() -> FakeDevice:
    """A device that supports every metric of the catalogue, each with a value of its own."""
    device = FakeDevice(0, gpm={}, links={0: (True, 2, "00000000:FF:00.0")}, vgpus=[11, 12], licensed=1)
    device.numbers["nvmlDeviceGetFanSpeed"] = 33
    for at, (name, metric) in enumerate(METRICS.items()):
        for reading in metric.row.nvml:
            if isinstance(reading, FieldValue):
                number = getattr(pynvml, reading.field)
                device.fields[number, reading.scope] = (3, 1 if metric.maximum == 1 else at + 2)
            elif not isinstance(reading, Call) and hasattr(reading, "metric"):
                device.gpm[getattr(pynvml, reading.metric)] = 1.0 + at / 10
        assert name
    return device


def test_every_metric_is_read_and_has_the_value_that_the_library_gave(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    device = full_device()
    nvml.devices = [device]
    source.open(events.append)
    source.read()
    time.sleep(0.12)
    (sample,) = read(source)
    assert [name for name in METRICS if getattr(sample, name) is None] == []
    assert (sample.gpu_utilization_percent, sample.memory_utilization_percent) == (87, 42)
    assert sample.memory_used_bytes == 60 * 2**30
    assert sample.memory_reserved_bytes == 2**29
    assert sample.memory_used_bytes + sample.memory_reserved_bytes + sample.memory_free_bytes == 80 * 2**30
    assert sample.power_watts == pytest.approx(512.345)
    assert (sample.power_limit_min_watts, sample.power_limit_max_watts) == (200, 700)
    assert sample.energy_millijoules == 123_456_789_012
    assert (sample.sm_clock_megahertz, sample.memory_clock_megahertz) == (1755, 2619)
    assert (sample.temperature_slowdown_celsius, sample.temperature_shutdown_celsius) == (90, 95)
    assert (sample.ecc_corrected_count, sample.ecc_corrected_volatile_count) == (5, 2)
    assert sample.remapped_rows_corrected_count == 1
    assert (sample.pcie_generation, sample.pcie_width) == (5, 16)
    assert sample.vgpu_count == 2
    assert sample.nvlink_active_count == 1
    index = list(METRICS).index("sm_active_percent")
    assert sample.sm_active_percent == pytest.approx(1.0 + index / 10)
    index = list(METRICS).index("nvlink_rx_bytes")
    assert sample.nvlink_rx_bytes == (index + 2) * 1024
    index = list(METRICS).index("power_violation_nanoseconds")
    assert sample.power_violation_nanoseconds == index + 2


def test_times_are_of_each_device_and_columns_match_what_the_wrapper_says(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    source.open(events.append)
    before = time.time_ns()
    first, second = read(source)
    assert before <= first.time_ns <= second.time_ns <= time.time_ns()
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)
    assert second.memory_used_bytes == pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).used
    assert second.power_watts == pytest.approx(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    assert second.energy_millijoules == pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def test_each_direct_call_gives_what_pynvml_gives(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    """The C signatures that are written down here against the wrappers, for every call of the catalogue."""
    device = full_device()
    device.violations = {policy: 1000 + policy for policy in range(12)}
    nvml.devices = [device]
    source.open(events.append)
    library = source._library
    assert library is not None
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    calls = {
        (reading.function, reading.args, reading.attribute): reading
        for metric in METRICS.values()
        for reading in metric.row.nvml
        if isinstance(reading, Call)
    }
    direct = 0
    for call in calls.values():
        found = probe(library, handle, call)
        assert found is not None, call
        assert found.function(*found.args) == OK, call
        holder, take = found.output(call.attribute)
        arguments = [getattr(pynvml, arg) if isinstance(arg, str) else arg for arg in call.args]
        result = getattr(pynvml, call.function)(handle, *arguments)
        for step in (call.attribute or "").split(".") if call.attribute else ():
            result = len(result) if step == "len" else result[int(step)] if step.isdigit() else getattr(result, step)
        assert take(holder) == result, call
        direct += call.function in SIGNATURES
    assert direct > 30


def test_a_shared_call_is_made_once_a_tick_and_slow_ones_are_not_made_in_each(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    source.open(events.append)
    source.read()
    nvml.calls.clear()
    for _ in range(10):
        source.read()
    assert nvml.calls["nvmlDeviceGetUtilizationRates"] == 20
    assert nvml.calls["nvmlDeviceGetMemoryInfo_v2"] == 20
    assert nvml.calls["nvmlDeviceGetTotalEccErrors"] == 0
    assert nvml.calls["nvmlDeviceGetTemperature"] == 0


def test_not_supported_is_null_and_never_asked_again(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    nvml.devices[0].energy = None
    nvml.devices[0].errors["nvmlDeviceGetPowerUsage"] = NO_PERMISSION
    source.open(events.append)
    first, second = read(source)
    assert first.energy_millijoules is None
    assert first.power_watts is None
    assert second.energy_millijoules == 123_456_789_012
    uuid = nvml.devices[0].uuid
    asked = nvml.asked["nvmlDeviceGetTotalEnergyConsumption", uuid]
    source.read()
    source.read()
    assert nvml.asked["nvmlDeviceGetTotalEnergyConsumption", uuid] == asked
    assert source.read_errors == 0
    # The same at run time: a call that stops being supported is dropped, with the value.
    nvml.devices[1].errors["nvmlDeviceGetTotalEnergyConsumption"] = NOT_SUPPORTED
    tick = source.read()[0]
    assert "energy_millijoules" not in tick.columns
    asked = nvml.asked["nvmlDeviceGetTotalEnergyConsumption", nvml.devices[1].uuid]
    source.read()
    assert nvml.asked["nvmlDeviceGetTotalEnergyConsumption", nvml.devices[1].uuid] == asked


def test_older_driver_falls_back_to_older_calls(nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]) -> None:
    nvml.missing |= {"nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetCurrentClocksEventReasons"}
    nvml.devices[0].violations = {0: 17_000}
    source.open(events.append)
    first, _ = read(source)
    assert first.memory_used_bytes == 60 * 2**30 + 2**29
    assert first.memory_reserved_bytes is None
    assert first.throttle_reasons_bitmask == 4
    assert first.power_violation_nanoseconds == 17_000


def test_passing_errors_are_null_for_a_tick_unknown_ones_counted_and_told_once(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], caplog: pytest.LogCaptureFixture
) -> None:
    source.open(events.append)
    device = nvml.devices[0]
    device.errors = {"nvmlDeviceGetPowerUsage": UNKNOWN, "nvmlDeviceGetUtilizationRates": NO_DATA}
    for _ in range(3):
        first, second = read(source)
        assert first.power_watts is None
        assert first.gpu_utilization_percent is None
        assert second.power_watts == pytest.approx(512.345)
    assert source.read_errors == 3
    assert sum("nvmlDeviceGetPowerUsage" in record.message for record in caplog.records) == 1
    device.errors = {}
    assert read(source)[0].power_watts == pytest.approx(512.345)
    assert [event.kind for event in events if event.severity is Severity.HARDWARE] == []


def test_values_that_can_not_be_are_null_and_counted_those_that_can_stay(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    device = nvml.devices[0]
    device.energy = 2**64 - 1  # NVML's "not available"
    device.utilization = (250, 10)
    device.numbers["nvmlDeviceGetPowerUsage"] = device.numbers["nvmlDeviceGetPcieReplayCounter"] = 2**32 - 1
    device.fields[pynvml.NVML_FI_DEV_POWER_INSTANT, 0] = (1, 3_700_000_000)
    device.gpm = {pynvml.NVML_GPM_METRIC_SM_UTIL: 117.0, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 4e9}
    source.open(events.append)
    source.read()
    source.impossible.clear()
    until(lambda: read(source)[0].sm_active_percent is not None)
    source.impossible.clear()
    first, second = read(source)
    assert (first.energy_millijoules, first.gpu_utilization_percent, first.power_watts) == (None, None, None)
    assert (first.power_instant_watts, first.tensor_active_percent, first.pcie_replay_count) == (None, None, None)
    assert (first.memory_utilization_percent, first.sm_active_percent) == (10, 117.0)
    assert second.power_watts is not None
    once = ("energy_millijoules", "gpu_utilization_percent", "power_watts", "power_instant_watts")
    assert {name: source.impossible[name] for name in once} == dict.fromkeys(once, 1)


@pytest.mark.parametrize(("code", "severity"), [(LOST, Severity.HARDWARE), (RESET_REQUIRED, Severity.RESET)])
def test_a_lost_device_is_told_and_left_out_the_rest_goes_on_until_it_returns(
    nvml: FakeNvml,
    source: NvmlSource,
    events: list[SourceEvent],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    severity: Severity,
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.source.RETURN_SECONDS", 0.0)
    nvml.devices[0].gpm = {pynvml.NVML_GPM_METRIC_SM_UTIL: 50.0}
    source.open(events.append)
    assert len(read(source)) == 2
    assert nvml.samples == 2
    events.clear()
    nvml.devices[0].dead = code
    (left,) = read(source)
    assert left.device == nvml.devices[1].uuid
    assert left.power_watts == pytest.approx(512.345)
    assert nvml.samples == 0
    (event,) = events
    assert (event.kind, event.severity, event.device) == ("device_lost", severity, nvml.devices[0].uuid)
    # The others are listened to anew, without it: a set with a lost device in it tells of nothing else.
    nvml.raise_event(nvml.devices[1], pynvml.nvmlEventTypeXidCriticalError, 13)
    until(lambda: any(event.kind == "xid" for event in events))
    assert nvml.asked["nvmlDeviceRegisterEvents", nvml.devices[0].uuid] == 1
    assert nvml.asked["nvmlDeviceRegisterEvents", nvml.devices[1].uuid] == 2
    # It is still known: an operator looks for it in the inventory.
    assert [d.uuid for d in source.inventory()[0].devices] == [d.uuid for d in nvml.devices]
    assert len(read(source)) == 1
    events.clear()
    nvml.devices[0].dead = OK
    assert [sample.device for sample in read(source)] == [d.uuid for d in nvml.devices]
    returned = [event for event in events if event.kind == "device_returned"]
    assert [(e.device, e.severity) for e in returned] == [(nvml.devices[0].uuid, Severity.CLEARED)]


def test_a_device_that_an_inventory_misses_first_is_told_lost_and_returned(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.source.RETURN_SECONDS", 0.0)
    source.open(events.append)
    assert len(read(source)) == 2
    events.clear()
    nvml.devices[0].dead = LOST
    assert [d.uuid for d in source.inventory()[0].devices] == [d.uuid for d in nvml.devices]
    assert [(e.kind, e.severity, e.device) for e in events] == [
        ("device_lost", Severity.HARDWARE, nvml.devices[0].uuid)
    ]
    assert [sample.device for sample in read(source)] == [nvml.devices[1].uuid]
    events.clear()
    nvml.devices[0].dead = OK
    assert len(read(source)) == 2
    assert [e.device for e in events if e.kind == "device_returned"] == [nvml.devices[0].uuid]


def test_a_device_whose_every_call_fails_is_lost(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.device.SILENT_SECONDS", 0.0)
    source.open(events.append)
    nvml.devices[1].dead = UNKNOWN
    assert [len(read(source)) for _ in range(3)] == [2, 2, 1]
    assert events[-1].kind == "device_lost"


def test_a_device_that_gives_fields_alone_is_lost_when_they_fail(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.device.SILENT_SECONDS", 0.0)
    power = METRICS["power_instant_watts"].row.nvml[0]
    assert isinstance(power, FieldValue)
    device = nvml.devices[1]
    device.utilization = device.energy = device.throttle = None
    device.numbers, device.clocks = {}, {}
    nvml.errors["nvmlDeviceGetMemoryInfo"] = nvml.errors["nvmlDeviceGetMemoryInfo_v2"] = NOT_SUPPORTED
    device.fields = {(getattr(pynvml, power.field), 0): (1, 300_000)}
    source.open(events.append)
    assert read(source)[1].power_instant_watts == 300
    device.dead = UNKNOWN
    assert [len(read(source)) for _ in range(3)] == [2, 2, 1]
    assert events[-1].kind == "device_lost"


@pytest.mark.parametrize("code", [UNINITIALIZED, NOT_LOADED])
def test_driver_gone_is_unavailable_and_open_starts_again(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], code: int
) -> None:
    source.open(events.append)
    nvml.errors["nvmlDeviceGetUtilizationRates"] = code
    with pytest.raises(SourceUnavailable):
        source.read()
    source.close()
    nvml.init_code = NOT_LOADED
    with pytest.raises(SourceUnavailable, match="driver is not loaded"):
        source.open(events.append)
    nvml.init_code = OK
    nvml.errors.clear()
    source.open(events.append)
    assert len(read(source)) == 2


def test_without_library_or_after_a_driver_update_the_message_says_what_to_do(
    nvml: FakeNvml, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.init_code = 18
    pynvml.nvmlLib._handle = ctypes.CDLL(None)._handle
    with pytest.raises(SourceUnavailable, match="reload the driver"):
        NvmlSource("h").open(events.append)
    assert pynvml.nvmlLib is None, "the next start must load the new library"

    def no_library(_name: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    with pytest.raises(SourceUnavailable, match="install the NVIDIA driver"):
        NvmlSource("h").open(events.append)


def test_inventory_says_what_a_device_is(nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]) -> None:
    source.open(events.append)
    inventory = source.inventory()[0]
    assert inventory.host.name == "node-1"
    assert inventory.host.labels == {"rack": "r1"}
    assert inventory.host.cpus > 0
    assert inventory.host.memory_bytes > 2**28
    assert inventory.host.driver == "575.57.08"
    device = inventory.devices[1]
    assert (device.index, device.architecture, device.compute_capability, device.sm_count) == (1, "Hopper", "9.0", 132)
    assert device.memory_bandwidth_bytes_per_second == 5120 // 8 * 2619 * 10**6 * 2  # 3.35 TB/s, as NVIDIA states
    assert device.power_limit_max_watts == 700
    assert device.sm_clock_max_megahertz == 1980
    assert (device.numa_node, device.cpu_affinity) == (1, [0, 1, 2, 3])
    assert device.pcie_address == "00000000:11:00.0"


def test_the_nvlink_domain_is_a_label_that_the_site_may_replace(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent]
) -> None:
    cluster, completed, in_progress = bytes(range(1, 17)), 3, 2
    source.open(events.append)

    def labels(*fabric: tuple[bytes, int, int, int] | None) -> dict[str, str]:
        for device, info in zip(nvml.devices, fabric, strict=True):
            device.fabric = info
        return source.inventory()[0].host.labels

    of_site = {"rack": "r1"}
    assert labels((cluster, 7, completed, OK), (cluster, 7, completed, OK)) == {
        "nvlink_domain": "01020304-0506-0708-090a-0b0c0d0e0f10.7",
        **of_site,
    }
    assert labels((cluster, 7, completed, OK), (cluster, 8, completed, OK)) == of_site
    assert labels((cluster, 7, completed, OK), (cluster, 7, in_progress, OK)) == of_site
    assert labels((cluster, 7, completed, OK), (cluster, 7, completed, UNKNOWN)) == of_site
    assert labels((cluster, 7, completed, OK), None) == of_site
    assert labels((bytes(16), 0, completed, OK), (bytes(16), 0, completed, OK)) == of_site  # one host alone
    source.labels = {"nvlink_domain": "mine"}
    assert labels((cluster, 7, completed, OK), (cluster, 7, completed, OK)) == source.labels


def test_links_by_nvlink_switch_and_common_ancestor(nvml: FakeNvml, events: list[SourceEvent]) -> None:
    four = [FakeDevice(i) for i in range(4)]
    # 0 and 1 are joined directly by two links, 2 and 3 through a switch, by three and two links.
    four[0].links = {0: (True, 0, "0000:11:00.0"), 1: (True, 0, "0000:11:00.0"), 2: (False, 0, "")}
    four[1].links = {0: (True, 0, "0000:10:00.0"), 1: (True, 0, "0000:10:00.0")}
    four[2].links = dict.fromkeys(range(3), (True, 2, "0000:F0:00.0"))
    four[3].links = dict.fromkeys(range(2), (True, 2, "0000:F0:00.0"))
    levels = {(0, 2): 50, (0, 3): 50, (1, 2): 30, (1, 3): 40, (0, 1): 10, (2, 3): 10}
    for (i, j), level in levels.items():
        four[i].ancestors[j] = four[j].ancestors[i] = level
    nvml.devices = four
    source = NvmlSource("h")
    source.open(events.append)
    inventory = source.inventory()[0]
    source.close()
    n, y, b, m, s = Link.NVLINK, Link.SYSTEM, Link.HOST_BRIDGE, Link.NUMA, Link.SAME
    assert inventory.links == [[s, n, y, y], [n, s, b, m], [y, b, s, n], [y, m, n, s]]
    assert inventory.nvlink_counts == [[0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]]


def test_nvlinks_are_told_one_by_one_and_a_link_that_goes_down_at_once(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.device.CHECK_SECONDS", 0.0)
    device = nvml.devices[0]
    device.links = {0: (True, 2, "0000:F0:00.0"), 1: (True, 2, "0000:F0:00.0")}
    for link in (0, 1):
        device.fields[pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, link] = (3, 1000 + link)
        device.fields[pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, link] = (3, link)
        device.fields[pynvml.NVML_FI_DEV_NVLINK_COUNT_XMIT_BYTES, link] = (3, 77)  # as newer devices have it
    source.open(events.append)
    first, second = read(source)
    assert (first.nvlink_active_count, second.nvlink_active_count) == (2, None)
    # The driver gives no totals: they are the sums.
    assert (first.nvlink_rx_bytes, first.nvlink_replay_errors_count) == (2001 * 1024, 1)
    assert (first.nvlink_tx_bytes, second.nvlink_rx_bytes) == (2 * 77, None)
    (event,) = [e for e in events if e.kind == "nvlink"]
    assert event.data == {
        "link": "0,1",
        "state": "active,active",
        "remote": "0000:F0:00.0,0000:F0:00.0",
        "rx_bytes": f"{1000 * 1024},{1001 * 1024}",
        "tx_bytes": "77,77",
        "replay_errors": "0,1",
    }
    events.clear()
    device.links[1] = (False, 0, "")
    assert read(source)[0].nvlink_active_count == 1
    assert next((e.kind, e.severity) for e in events) == ("nvlink_down", Severity.WARNING)
    assert events[-1].data["state"] == "active,inactive"
    # Errors are told of when they grow, but not each time that one looks.
    monkeypatch.setattr("corral.collectors.nvml.device.LINKS_MIN_SECONDS", 0.0)
    events.clear()
    device.fields[pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, 0] = (3, 5)
    for _ in range(4):
        read(source)
    assert [e.data.get("replay_errors") for e in events] == ["5,1"]


def test_mig_instances_are_devices_and_a_new_layout_is_noticed(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nvml.devices[0]
    whole.mig_mode, whole.gpm, whole.utilization = (1, 1), {}, None
    whole.instances = [FakeInstance(whole, 0, "1g.10gb", 10, 16), FakeInstance(whole, 1, "3g.40gb", 40, 60)]
    whole.instances[1].gpm = {pynvml.NVML_GPM_METRIC_SM_UTIL: 77.0}
    source.open(events.append)
    parent, small, large, other = source.inventory()[0].devices
    assert parent.mig_enabled
    assert (small.mig_parent, small.mig_profile, small.memory_bytes) == (whole.uuid, "1g.10gb", 10 * 2**30)
    assert (large.mig_profile, large.sm_count) == ("3g.40gb", 60)
    assert (parent.mig_instance, small.mig_instance, large.mig_instance) == (None, 7, 8), "the driver's own numbers"
    assert large.memory_bandwidth_bytes_per_second == parent.memory_bandwidth_bytes_per_second // 2
    assert not other.mig_enabled
    source.read()
    time.sleep(0.12)
    samples = read(source)
    assert [sample.memory_total_bytes for sample in samples] == [80 * 2**30, 10 * 2**30, 40 * 2**30, 80 * 2**30]
    assert samples[1].gpu_utilization_percent is None
    assert samples[2].sm_active_percent == 77
    # The layout changes without an event: the next look finds it.
    monkeypatch.setattr("corral.collectors.nvml.source.LAYOUT_SECONDS", 0.0)
    source._layout_due = 0.0
    del whole.instances[0]
    assert len(read(source)) == 3
    assert [(e.kind, e.device) for e in events if e.kind == "mig_changed"] == [("mig_changed", whole.uuid)]
    # With an event: at once.
    monkeypatch.setattr("corral.collectors.nvml.source.LAYOUT_SECONDS", 1000.0)
    source._layout_due = time.monotonic() + 1000
    events.clear()
    whole.mig_mode, whole.instances, whole.utilization = (0, 0), [], (5, 5)
    nvml.raise_event(whole, pynvml.nvmlEventMigConfigChange, 0)
    until(lambda: any(e.kind == "mig_changed" for e in events))
    until(lambda: source._layout_changed.is_set())
    assert [s.gpu_utilization_percent for s in read(source)] == [5, 87]
    assert [e.kind for e in events].count("mig_changed") == 1
    assert [d.mig_enabled for d in source.inventory()[0].devices] == [False, False]


def test_a_mig_instance_that_is_taken_apart_is_no_fault_and_a_lost_device_takes_its_instances_along(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.collectors.nvml.source.RETURN_SECONDS", 0.0)
    monkeypatch.setattr("corral.collectors.nvml.device.SILENT_SECONDS", 0.0)
    whole = nvml.devices[0]
    whole.mig_mode = (1, 1)
    whole.instances = [FakeInstance(whole, 0, "1g.10gb", 10, 16), FakeInstance(whole, 1, "1g.10gb", 10, 16)]
    source.open(events.append)
    assert len(read(source)) == 4
    events.clear()
    gone = whole.instances.pop()  # its handle is stale from now on, and no event says why
    gone.dead = UNKNOWN
    nvml.devices[1].instances.append(gone)
    for _ in range(5):
        read(source)
    assert [sample.device for sample in read(source)] == [whole.uuid, whole.instances[0].uuid, nvml.devices[1].uuid]
    assert [e.kind for e in events if e.severity is Severity.HARDWARE] == []
    assert [e.device for e in events if e.kind == "mig_changed"] == [whole.uuid]
    # An instance that stays in the layout and does not answer is a fault of its own.
    events.clear()
    whole.instances[0].dead = LOST
    assert [sample.device for sample in read(source)] == [whole.uuid, nvml.devices[1].uuid]
    assert [(e.kind, e.device) for e in events] == [("device_lost", whole.instances[0].uuid)]
    whole.instances[0].dead = OK
    assert len(read(source)) == 3
    events.clear()
    whole.dead = whole.instances[0].dead = LOST
    assert [sample.device for sample in read(source)] == [nvml.devices[1].uuid]
    assert [(e.kind, e.device) for e in events] == [
        ("device_lost", whole.uuid),
        ("device_lost", whole.instances[0].uuid),
    ]
    source._layout_due = 0.0
    read(source)
    assert not [e for e in events if e.kind == "mig_changed"]
    whole.dead = whole.instances[0].dead = OK
    events.clear()
    assert len(read(source)) == 3
    assert [e.device for e in events if e.kind == "device_returned"] == [whole.uuid, whole.instances[0].uuid]


def test_pcie_throughput_comes_from_counters_where_there_are_wide_ones(
    nvml: FakeNvml, source: NvmlSource, events: list[SourceEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = nvml.devices
    key = (pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0)
    wide.fields[key], narrow.fields[key] = (3, 10**12), (1, 10**9)
    clock = [1000.0]
    monkeypatch.setattr("corral.collectors.nvml.source.monotonic", lambda: clock[0])
    source.open(events.append)
    assert read(source)[0].pcie_rx_bytes_per_second is None  # nothing to compare with yet
    until(lambda: read(source)[1].pcie_rx_bytes_per_second is not None)
    wide.fields[key] = (3, 10**12 + 6 * 10**9)
    clock[0] += 2.0
    first, second = read(source)
    assert first.pcie_rx_bytes_per_second == pytest.approx(3e9)
    # 32 bits wrap within a second on a fast bus: the other device is measured by the driver, in a thread aside.
    assert second.pcie_rx_bytes_per_second == 222_000
    assert nvml.asked["nvmlDeviceGetPcieThroughput", narrow.uuid] == 2

    def after(counted: int) -> float | None:
        wide.fields[key] = (3, counted)
        clock[0] += 2.0
        return read(source)[0].pcie_rx_bytes_per_second

    # One lower reading says nothing, whatever comes next: the counter goes on as before, or it started anew.
    assert after(5) is None
    assert after(10**12 + 10 * 10**9) == pytest.approx(1e9)
    assert after(5) is None
    assert after(5 + 2 * 10**9) == pytest.approx(1e9)
    assert after(5 + 6 * 10**9) == pytest.approx(2e9)
