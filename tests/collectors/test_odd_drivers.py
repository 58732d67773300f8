"""Answers of drivers and systems that their manuals do not allow: one of them must not cost a host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pynvml
import pytest
from corral.bus import process_identity
from corral.collectors.amd import source as amd_source
from corral.collectors.amd.library import AmdFailure, AmdLibrary
from corral.collectors.amd.source import AmdSource
from corral.collectors.nvml import source as nvml_source
from corral.collectors.nvml.running import entry_bytes, written_bytes
from corral.collectors.nvml.source import NvmlSource
from corral.collectors.processes import proc
from corral.collectors.retry import FIRST_SECONDS, MAX_SECONDS, SOON_SECONDS, Retry
from corral.collectors.source import SourceEvent, Tick
from corral.collectors.text import MAX_CHARACTERS, clean, cleaned
from corral.schemas import codec, columns
from corral.schemas.inventory import check, possible
from corral.schemas.metrics import DeviceSample
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, ProcessBatch, ProcessSample, SampleBatch
from hypothesis import given
from hypothesis import strategies as st
from support.fake_amdsmi import FakeAmd
from support.fake_amdsmi import available as amd_available
from support.fake_amdsmi import install as install_amd
from support.fake_nvml import INVALID, NO_PERMISSION, NOT_SUPPORTED, UNKNOWN, FakeDevice, FakeInstance, FakeNvml

ODD = b"\xf8\x95\xa0\x81 A100\n"
needs_amd = pytest.mark.skipif(not amd_available(), reason="the package amdsmi is not installed (corral[amd])")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml([])
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> FakeAmd:
    fake = FakeAmd()
    install_amd(fake, monkeypatch)
    return fake


class Clock:
    """The monotonic clock of the sources, set forward by hand."""

    def __init__(self) -> None:
        self.seconds = 1e6

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    for module in (nvml_source, amd_source):
        monkeypatch.setattr(module, "monotonic", clock)
    monkeypatch.setattr("corral.collectors.nvml.processes.monotonic", clock)
    return clock


def rows(tick: Tick) -> dict[str, DeviceSample]:
    batch = SampleBatch(
        host=tick.host,
        agent="a",
        sequence=1,
        source="x",
        devices=tick.devices,
        times_ns=tick.times_ns,
        columns=tick.columns,
        nulls=tick.nulls,
    )
    columns.check(batch)
    return {row.device: row for row in columns.rows(batch)}


def opened(source: NvmlSource | AmdSource) -> list[SourceEvent]:
    events: list[SourceEvent] = []
    source.open(events.append)
    return events


# -- text


@given(st.one_of(st.binary(), st.text(st.characters(codec=None)), st.text().map(os.fsencode).map(os.fsdecode)))
def test_any_text_becomes_one_that_a_message_and_a_table_take(value: bytes | str) -> None:
    text = clean(value)
    assert len(text) <= MAX_CHARACTERS
    assert "\0" not in text
    assert codec.decode(codec.encode(text), str) == text
    assert clean(text) == text


def test_a_message_with_a_name_that_nobody_has_cleaned_is_sent_all_the_same() -> None:
    sample = ProcessSample(device="GPU-1", pid=7, name="tr\udcff\udcfeain", memory_used_bytes=5)
    message = ProcessBatch(host="h", agent="a", sequence=1, time_ns=1, processes=[sample])
    with pytest.raises(UnicodeEncodeError):
        codec.encode(message)
    found = codec.decode(codec.encode(cleaned(message)), ProcessBatch)
    assert (found.processes[0].pid, found.processes[0].memory_used_bytes) == (7, 5)
    assert found.processes[0].name == "tr\ufffd\ufffdain"


def test_odd_texts_of_nvml_leave_the_device_and_its_host(nvml: FakeNvml) -> None:
    nvml.driver = b"5\xff5.1"
    nvml.devices = [
        FakeDevice(0, name=ODD, serial=b"\xff" * 20),
        FakeDevice(1, name=b"\xc3" * 95),
        FakeDevice(2, name=""),
    ]
    nvml.devices[1].vbios = b"96.00\xff"
    source = NvmlSource("node-1", {"row": "a\udcff"})
    opened(source)
    inventory = codec.decode(codec.encode(source.inventory()[0]), Inventory)
    source.close()
    first, second, third = inventory.devices
    assert first.name.endswith("A100")
    assert first.serial == "\ufffd" * 20
    assert (first.firmware, second.firmware) == ({}, {"vbios": "96.00\ufffd"})
    assert (second.uuid, third.uuid) == (nvml.devices[1].uuid, nvml.devices[2].uuid)
    assert len(second.name) <= MAX_CHARACTERS
    assert inventory.host.driver == "5\ufffd5.1"
    assert inventory.host.labels == {"row": "a\ufffd"}


@needs_amd
def test_odd_texts_of_amdsmi_leave_the_device_and_its_host(amd: FakeAmd) -> None:
    first, second = amd.devices
    first.name, first.serial = ODD, b"\xff12"
    second.processes = [(4_000_001, b"/opt/\xfftrain", 7 * 2**30, 152), (4_000_002, "serve", 1, 0)]
    source = AmdSource("node-2")
    opened(source)
    inventory = codec.decode(codec.encode(source.inventory()[0]), Inventory)
    processes = source.processes()["node-2"]
    source.close()
    assert inventory.devices[0].name.endswith("A100")
    assert (inventory.devices[0].sm_count, inventory.devices[0].architecture) == (304, "gfx942")
    assert [d.uuid for d in inventory.devices] == [first.uuid, second.uuid]
    assert [(p.name, p.memory_used_bytes) for p in processes] == [("\ufffdtrain", 7 * 2**30), ("serve", 1)]
    assert processes[0].sm_utilization_percent == 50


@needs_amd
def test_processes_that_amdsmi_can_not_list_either_way_are_not_taken_for_none(
    amd: FakeAmd, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "amdsmi_get_gpu_process_list"
    real = AmdLibrary.call

    def call(library: AmdLibrary, function: str, *args: object) -> object:
        if function == name:
            raise AmdFailure(None, name, "a text in the answer is no UTF-8")
        return real(library, function, *args)

    monkeypatch.setattr(AmdLibrary, "call", call)
    first, second = amd.devices
    first.processes = [(4_000_001, "serve", 2**64 - 1, 0)]
    second.errors[name] = 15
    source = AmdSource("node-2")
    opened(source)
    processes = source.processes()["node-2"]
    source.close()
    assert [(p.device, p.memory_used_bytes) for p in processes] == [(first.uuid, None)]
    assert source.unreadable == [second.uuid]


numbers = st.sampled_from([-1, 0, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 * 10**9])


@given(numbers, numbers, numbers, numbers | st.none(), numbers | st.none(), st.lists(numbers))
def test_no_number_of_a_driver_keeps_a_host_out(
    memory: int, bandwidth: int, clock: int, instance: int | None, node: int | None, cores: list[int]
) -> None:
    device = DeviceInfo(
        uuid="GPU-1",
        host="h",
        index=3,
        sm_count=132,
        memory_bytes=memory,
        memory_bandwidth_bytes_per_second=bandwidth,
        sm_clock_max_megahertz=clock,
        mig_instance=instance,
        numa_node=node,
        cpu_affinity=cores,
    )
    told = Inventory(host=HostInfo(name="h"), agent="a", time_ns=1, devices=[possible(device)])
    check(codec.decode(codec.encode(told), Inventory))
    kept = told.devices[0]
    assert (kept.index, kept.sm_count) == (3, 132)
    assert kept.memory_bytes == (memory if 0 <= memory < 2**63 else 0)
    assert kept.sm_clock_max_megahertz == (clock if 0 <= clock < 2**31 else 0)
    assert kept.mig_instance == (instance if instance is not None and 0 <= instance < 2**31 else None)


def test_a_program_whose_file_name_is_no_text_is_a_process_like_any_other(tmp_path: Path) -> None:
    program = os.path.join(os.fsencode(tmp_path), b"tr\xffain")
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    with subprocess.Popen([program, b"30"], env={"CORRAL_LEASE": "l\udcff1"}) as process:
        try:
            facts = proc.ProcessTable(with_commands=True).facts(process.pid)
        finally:
            process.kill()
    assert (facts.name, facts.lease) == ("tr\ufffdain", "l\ufffd1")
    assert msgspec.msgpack.decode(codec.encode(facts))["command"].endswith("tr\ufffdain 30")


# -- refusals


def test_a_refusal_is_tried_again_ever_more_seldom_but_for_ever() -> None:
    retry = Retry(0.0)
    pauses: list[float] = []
    for _ in range(9):
        now = retry.due
        retry.refused(now)
        pauses.append(retry.due - now)
    assert pauses[:3] == [2 * FIRST_SECONDS, 4 * FIRST_SECONDS, 8 * FIRST_SECONDS]
    assert pauses[-3:] == [MAX_SECONDS] * 3
    now = retry.due - MAX_SECONDS + 1
    retry.soon(now)
    assert retry.due == now + SOON_SECONDS


CALLS: dict[str, Callable[[FakeDevice, int], None]] = {
    "gpu_utilization_percent": lambda d, code: d.errors.update(nvmlDeviceGetUtilizationRates=code),
    "memory_used_bytes": lambda d, code: d.errors.update(nvmlDeviceGetMemoryInfo_v2=code, nvmlDeviceGetMemoryInfo=code),
    "energy_millijoules": lambda d, code: d.errors.update(nvmlDeviceGetTotalEnergyConsumption=code),
    "memory_temperature_celsius": lambda d, code: d.errors.update(nvmlDeviceGetFieldValues=code),
    "pcie_replay_count": lambda d, code: d.errors.update(nvmlDeviceGetPcieReplayCounter=code),
    "sm_active_percent": lambda d, code: d.errors.update(nvmlGpmQueryDeviceSupport=code),
}


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, INVALID, UNKNOWN])
@pytest.mark.parametrize("at_the_start", [True, False], ids=["at the start", "later"])
def test_what_was_refused_once_has_a_value_again(nvml: FakeNvml, clock: Clock, code: int, at_the_start: bool) -> None:
    device = FakeDevice(0, gpm={pynvml.NVML_GPM_METRIC_SM_UTIL: 50.0})
    device.fields[pynvml.NVML_FI_DEV_MEMORY_TEMP, 0] = (1, 70)
    nvml.devices = [device, FakeDevice(1)]
    source = NvmlSource("node-1", with_events=False)

    def refuse() -> None:
        for refused in CALLS.values():
            refused(device, code)

    if at_the_start:
        refuse()
        opened(source)
    else:
        opened(source)
        for _ in range(3):
            clock.seconds += 1
            source.read()
        refuse()
    clock.seconds += 1
    (tick,) = source.read()
    assert rows(tick)[device.uuid].gpu_utilization_percent is None
    assert rows(tick)[nvml.devices[1].uuid].gpu_utilization_percent == 87
    device.errors.clear()
    clock.seconds += 75
    for _ in range(3):
        clock.seconds += 61
        (tick,) = source.read()
    found = rows(tick)[device.uuid]
    source.close()
    assert [name for name in CALLS if getattr(found, name) is None] == []


def test_one_metric_of_the_performance_monitor_that_was_refused_is_read_again(nvml: FakeNvml, clock: Clock) -> None:
    metrics = {pynvml.NVML_GPM_METRIC_SM_UTIL: 50.0, pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: 20.0}
    device = FakeDevice(0, gpm={pynvml.NVML_GPM_METRIC_SM_UTIL: 50.0})
    nvml.devices = [device]
    source = NvmlSource("node-1", with_events=False)
    opened(source)

    def read() -> DeviceSample:
        clock.seconds += 30
        return rows(source.read()[0])[device.uuid]

    read()
    assert (read().sm_active_percent, read().sm_occupancy_percent) == (50, None)
    device.gpm = metrics
    for _ in range(4):
        found = read()
    assert (found.sm_active_percent, found.sm_occupancy_percent) == (50, 20)
    source.close()


@needs_amd
def test_what_amdsmi_refused_at_the_start_has_a_value_later(amd: FakeAmd, clock: Clock) -> None:
    power, amd.devices[0].power = amd.devices[0].power, None
    source = AmdSource("node-2", with_events=False)
    opened(source)
    uuid = str(amd.devices[0].uuid)
    assert rows(source.read()[0])[uuid].power_watts is None
    amd.devices[0].power = power
    clock.seconds += FIRST_SECONDS + 1
    assert rows(source.read()[0])[uuid].power_watts == 612
    source.close()


def test_a_list_of_processes_that_was_refused_comes_back(nvml: FakeNvml, clock: Clock) -> None:
    device = FakeDevice(0, compute=[(4_000_001, 7)], errors={"nvmlDeviceGetComputeRunningProcesses_v3": NO_PERMISSION})
    nvml.devices = [device]
    source = NvmlSource("node-1", with_events=False)
    opened(source)
    assert source.processes() == {"node-1": []}
    device.errors.clear()
    clock.seconds += FIRST_SECONDS + 1
    assert [p.pid for p in source.processes()["node-1"]] == [4_000_001]
    source.close()


# -- devices that were lost


def no_memory(device: FakeDevice) -> None:
    device.errors.update(nvmlDeviceGetMemoryInfo=NOT_SUPPORTED, nvmlDeviceGetMemoryInfo_v2=NOT_SUPPORTED)


def not_allowed(device: FakeDevice) -> None:
    device.errors.update(nvmlDeviceGetMemoryInfo=NO_PERMISSION, nvmlDeviceGetMemoryInfo_v2=NO_PERMISSION)


def nothing_but_memory(device: FakeDevice) -> None:
    device.utilization = device.energy = device.throttle = None
    device.numbers, device.clocks = {}, {}


@pytest.mark.parametrize("odd", [no_memory, not_allowed, nothing_but_memory])
@pytest.mark.parametrize("code", [15, 16, UNKNOWN])
def test_a_lost_device_returns_whatever_it_does_not_tell(
    nvml: FakeNvml, clock: Clock, odd: Callable[[FakeDevice], None], code: int
) -> None:
    nvml.devices = [FakeDevice(0, name="NVIDIA GB10"), FakeDevice(1)]
    odd(nvml.devices[0])
    source = NvmlSource("node-1", with_events=False)
    events = opened(source)
    nvml.devices[0].dead = code
    for _ in range(4):
        clock.seconds += 1
        source.read()
    assert [e.kind for e in events].count("device_lost") == 1
    nvml.devices[0].dead = 0
    clock.seconds += 6
    (tick,) = source.read()
    source.close()
    assert tick.devices == [d.uuid for d in nvml.devices]
    assert [e.kind for e in events].count("device_returned") == 1


def test_an_instance_alone_is_lost_where_the_memory_of_its_board_is_out_of_bounds(nvml: FakeNvml, clock: Clock) -> None:
    board = FakeDevice(0, mig_mode=(1, 1), utilization=None)
    board.instances = [FakeInstance(board, n, "1g.10gb", 10, 16) for n in range(3)]
    not_allowed(board)
    nvml.devices = [board]
    source = NvmlSource("node-1", with_events=False)
    events = opened(source)
    board.instances[1].dead = 15
    clock.seconds += 1
    source.read()
    assert [e.device for e in events if e.kind == "device_lost"] == [board.instances[1].uuid]
    board.instances[1].dead = 0
    clock.seconds += 6
    (tick,) = source.read()
    source.close()
    assert set(tick.devices) == {board.uuid, *(one.uuid for one in board.instances)}


@needs_amd
@pytest.mark.parametrize("used", [0, None])
def test_a_lost_amd_device_returns_with_nothing_in_use(amd: FakeAmd, clock: Clock, used: int | None) -> None:
    source = AmdSource("node-2", with_events=False)
    if used is None:  # one that shares the host's memory
        amd.devices[1].memory = {}
    opened(source)
    amd.devices[1].dead = 45
    for _ in range(4):
        clock.seconds += 1
        source.read()
    assert source.read()[0].devices == [amd.devices[0].uuid]
    amd.devices[1].dead = 0
    if used is not None:
        amd.devices[1].memory[0] = (192 * 2**30, used)
    clock.seconds += 6
    assert source.read()[0].devices == [d.uuid for d in amd.devices]
    source.close()


# -- the form of process entries


@pytest.mark.parametrize(
    ("driver", "written"),
    [
        (b"535.54.03", 32),
        (b"535.43.02", 32),
        (b"535.86.10", 32),
        (b"535.98", 24),
        (b"535.104.05", 24),
        (b"575.57.08", 24),
        (b"470.57.02", 24),
        (b"", 32),
        (b"580.1", 32),  # none does; what is written is seen all the same
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_process_entries_are_read_in_the_form_that_the_driver_writes(
    nvml: FakeNvml, driver: bytes, written: int, count: int
) -> None:
    running = [(4_000_000 + n, (n + 1) << 30) for n in range(count)]
    nvml.devices = [FakeDevice(0, compute=running)]
    nvml.driver, nvml.entry_bytes = driver, written
    source = NvmlSource("node-1", with_events=False)
    opened(source)
    found = [(p.pid, p.memory_used_bytes) for p in source.processes()["node-1"]]
    source.close()
    assert found == running


def test_where_the_bytes_can_not_tell_the_version_does() -> None:
    assert entry_bytes("535.54.03", "_v3", protected=False, detailed=False) == 32
    assert entry_bytes("535.54.03", "_v2", protected=True, detailed=False) == 24
    assert entry_bytes("450.1", "", protected=False, detailed=False) == 16
    assert entry_bytes("?", "_v3", protected=True, detailed=False) == 32
    assert entry_bytes("?", "_v3", protected=True, detailed=True) == 24
    everything = b"\0" * 200
    assert [written_bytes(everything, 2, size) for size in (16, 24, 32)] == [16, 24, 32]
    # A driver that writes no more than id and memory of each.
    sparse = bytearray(b"\x5a" * 200)
    for start in (0, 32):
        sparse[start : start + 4] = b"\1\0\0\0"
    assert written_bytes(bytes(sparse), 2, 32) == 32


# -- process ids of a container


def test_process_ids_of_another_namespace_name_nobody(
    nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    link = tmp_path / "self/ns/pid"
    link.symlink_to("pid:[4026531836]")
    assert process_identity.sees_host_processes(tmp_path)
    link.unlink()
    assert process_identity.sees_host_processes(tmp_path)
    link.symlink_to("pid:[4026532178]")
    assert not process_identity.sees_host_processes(tmp_path)
    monkeypatch.setattr(process_identity, "sees_host_processes", lambda _root=None: False)
    nvml.devices = [FakeDevice(0, compute=[(os.getpid(), 7)])]
    source = NvmlSource("node-1", with_events=False)
    opened(source)
    (process,) = source.processes()["node-1"]
    assert source.identifies_processes is False
    assert source.ancestry([os.getpid()]) == {}
    source.close()
    assert process == ProcessSample(device=nvml.devices[0].uuid, pid=os.getpid(), memory_used_bytes=7)


def test_only_an_id_names_a_machine(tmp_path: Path) -> None:
    installed, boot = tmp_path / "etc" / "machine-id", tmp_path / "proc" / "sys" / "kernel" / "random" / "boot_id"
    for file in (installed, boot):
        file.parent.mkdir(parents=True)
    boot.write_text("0f0b7cf4-93c5-4f0e-a6f4-6a2b1d3f9e55\n")
    for none in ("", "uninitialized\n", "0" * 32 + "\n"):
        installed.write_text(none)
        assert len(proc.machine_ids(tmp_path)) == 1, "machines made of one image would all be one"
    installed.write_text("b0a1" * 8 + "\n")
    assert len(set(proc.machine_ids(tmp_path))) == 2
