"""A stand-in for libnvidia-ml: C functions with NVML's signatures at real addresses, called through pynvml's ctypes.

Each function is a ctypes callback that is taken by its address and called with undeclared arguments, as `ctypes.CDLL`
does with the real library. So every structure, pointer and integer crosses the C boundary, and no compiler is needed.
"""

from __future__ import annotations

import ctypes
import queue
from collections import Counter
from collections.abc import Callable
from ctypes import c_int, c_uint, c_ulonglong, c_void_p
from typing import Any

import pynvml

OK, UNINITIALIZED, INVALID, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, SMALL, NOT_LOADED = 0, 1, 2, 3, 4, 6, 7, 9
TIMEOUT, LOST, RESET_REQUIRED, NO_DATA, UNKNOWN = 10, 15, 16, 21, 999
NONE = 0xFFFFFFFF
UNTYPED = ctypes.CFUNCTYPE(c_int)
"""As the functions of `ctypes.CDLL`: no declared arguments."""


class Fail(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


class FakeDevice:
    """One device. What is None or missing is not supported. Change anything at any time."""

    def __init__(self, index: int, **values: Any) -> None:
        self.handle = 0x10000 + index * 0x100
        self.index = index
        self.uuid = f"GPU-{index:08x}-0000-0000-0000-000000000000"
        self.name = "NVIDIA H100 80GB HBM3"
        self.bus_id = f"00000000:{0x10 + index:02X}:00.0"
        self.architecture = 9
        self.capability = (9, 0)
        self.cores = 132 * 128
        self.bus_width = 5120
        self.clocks = {0: 1980, 1: 1755, 2: 2619, 3: 1500}
        self.max_clocks = {0: 1980, 1: 1980, 2: 2619, 3: 1800}
        self.memory = (80 * 2**30, 2**29, 60 * 2**30)  # total, reserved, used
        self.utilization: tuple[int, int] | None = (87, 42)
        self.numbers: dict[str, Any] = {
            "nvmlDeviceGetPowerUsage": 512_345,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetCurrPcieLinkGeneration": 5,
            "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetPcieReplayCounter": 7,
            "nvmlDeviceGetFanSpeed": None,
            "nvmlDeviceGetPerformanceState": 0,
        }
        self.energy: int | None = 123_456_789_012
        self.throttle: int | None = 0x4
        self.temperature: int | None = 61
        self.thresholds = {0: 95, 1: 90}
        self.limits: tuple[int, int] | None = (200_000, 700_000)
        self.ecc = {(0, 1): 5, (1, 1): 0, (0, 0): 2, (1, 0): 0}
        self.remapped: tuple[int, int, int, int] | None = (1, 0, 0, 0)
        self.bar1: tuple[int, int] | None = (128 * 2**30, 3 * 2**20)
        self.engines = {"Encoder": 3, "Decoder": 4, "Jpg": 5, "Ofa": 6}
        self.violations: dict[int, int] = {}
        self.pcie_throughput: dict[int, int] | None = {0: 111, 1: 222}
        self.fields: dict[tuple[int, int], tuple[int, Any]] = {}  # (field, scope) -> (value type, value)
        self.gpm: dict[int, float] | None = None
        self.links: dict[int, tuple[bool, int, str]] = {}  # number -> active, remote type, remote bus id
        self.ancestors: dict[int, int] = {}
        self.compute: list[tuple[int, int]] = []
        self.graphics: list[tuple[int, int]] = []
        self.shares: list[tuple[int, int, int, int, int, int]] = []  # time, pid, sm, memory, encoder, decoder
        self.mig_mode: tuple[int, int] | None = (0, 0)
        self.instances: list[FakeInstance] = []
        self.vgpus: list[int] | None = None
        self.affinity: int | None = 0b1111
        self.numa: int | None = 1
        self.event_types = 0x1FF
        self.errors: dict[str, int] = {}
        self.dead: int = 0
        self.__dict__.update(values)


class FakeInstance(FakeDevice):
    """A MIG instance: memory, attributes and processes of its own, and not much else."""

    def __init__(self, parent: FakeDevice, number: int, profile: str, gigabytes: int, multiprocessors: int) -> None:
        super().__init__(parent.index)
        self.handle = parent.handle + 1 + number
        self.uuid = f"MIG-{parent.index:04x}-{number:04x}"
        self.name = f"{parent.name} MIG {profile}"
        self.gpu_instance, self.compute_instance = number + 7, 0
        self.memory = (gigabytes * 2**30, 0, 2**30)
        self.attributes = (multiprocessors, 1, gigabytes * 1024)
        self.utilization = self.energy = self.throttle = self.temperature = self.limits = self.remapped = None
        self.bar1 = self.pcie_throughput = self.mig_mode = None
        self.numbers, self.clocks, self.max_clocks, self.ecc, self.engines, self.thresholds = {}, {}, {}, {}, {}, {}


def c(*types: Any) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        function.types = types
        return function

    return mark


P, U, L = c_void_p, c_uint, c_ulonglong


def put(kind: Any, place: int, value: Any) -> None:
    kind.from_address(place).value = value


class FakeNvml:
    """The library. `install` makes pynvml use it.

    Attributes:
        devices: in the order of their indices.
        calls: how often each function was called, by name.
        asked: which devices each function was called for, by name.
        errors: function name → error code for every device.
        missing: functions that this library does not have.
        init_code: what nvmlInit returns.
    """

    def __init__(self, devices: list[FakeDevice] | None = None) -> None:
        self.devices = devices if devices is not None else [FakeDevice(0), FakeDevice(1)]
        self.calls: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.errors: dict[str, int] = {}
        self.missing: set[str] = set()
        self.init_code = OK
        self.initialized = 0
        self.open_sets = 0
        self.samples = 0
        self.driver = b"575.57.08"
        self.events: queue.Queue[tuple[FakeDevice, int, int, int, int] | int] = queue.Queue()
        self._keep: dict[str, Any] = {}
        self._pointers: dict[str, Any] = {}
        for name in dir(type(self)):
            function = getattr(self, name)
            if hasattr(function, "types"):
                self._define(name, function, function.types)
        for name in FakeDevice(0).numbers:
            self._define(name, lambda d, out, name=name: put(U, out, some(d.numbers.get(name))), (P, U_OUT))
        for engine in ("Encoder", "Decoder", "Jpg", "Ofa"):
            name = f"nvmlDeviceGet{engine}Utilization"
            self._define(name, lambda d, out, period, e=engine: self._engine(d, e, out, period), (P, P, P))

    def _define(self, name: str, function: Any, types: tuple[Any, ...]) -> None:
        def call(*args: Any) -> int:
            self.calls[name] += 1
            try:
                if name in self.errors:
                    raise Fail(self.errors[name])
                if (
                    name.startswith(("nvmlDevice", "nvmlGpmQuery"))
                    and "ByIndex_v2" not in name
                    and "ByUUID" not in name
                ) and name != "nvmlDeviceGetCount_v2":
                    device = self._device(args[0])
                    self.asked[name, device.uuid] += 1
                    if device.dead or name in device.errors:
                        raise Fail(device.dead or device.errors[name])
                    args = (device, *args[1:])
                return function(*args) or OK
            except Fail as fail:
                return fail.code

        callback = ctypes.CFUNCTYPE(c_int, *[P if kind is U_OUT else kind for kind in types])(call)
        self._keep[name] = callback
        self._pointers[name] = UNTYPED(ctypes.cast(callback, c_void_p).value)

    def install(self, monkeypatch: Any) -> None:
        library = _Pointers(self)
        monkeypatch.setattr(pynvml, "nvmlLib", library)
        monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def _device(self, handle: int | None) -> FakeDevice:
        for device in self.devices:
            for one in (device, *device.instances):
                if one.handle == handle:
                    return one
        raise Fail(INVALID)

    def raise_event(self, device: FakeDevice, kind: int, value: int, instance: tuple[int, int] = (NONE, NONE)) -> None:
        self.events.put((device, kind, value, *instance))

    # -- system

    @c(U)
    def nvmlInitWithFlags(self, _flags: int) -> int:  # noqa: N802
        self.initialized += self.init_code == OK
        return self.init_code

    @c()
    def nvmlShutdown(self) -> int:  # noqa: N802
        self.initialized -= 1
        return OK

    @c(P, U)
    def nvmlSystemGetDriverVersion(self, out: int, _size: int) -> None:  # noqa: N802
        ctypes.memmove(out, self.driver + b"\0", len(self.driver) + 1)

    @c(P)
    def nvmlDeviceGetCount_v2(self, out: int) -> None:  # noqa: N802
        put(U, out, len(self.devices))

    @c(U, P)
    def nvmlDeviceGetHandleByIndex_v2(self, index: int, out: int) -> None:  # noqa: N802
        if self.devices[index].dead:
            raise Fail(self.devices[index].dead)
        put(P, out, self.devices[index].handle)

    @c(P, P)
    def nvmlDeviceGetHandleByUUID(self, uuid: int, out: int) -> None:  # noqa: N802
        text = ctypes.string_at(uuid).decode()
        for device in [one for whole in self.devices for one in (whole, *whole.instances)]:
            if device.uuid == text:
                if device.dead:
                    raise Fail(device.dead)
                put(P, out, device.handle)
                return
        raise Fail(NOT_FOUND)

    # -- identity

    @c(P, P, U)
    def nvmlDeviceGetUUID(self, d: FakeDevice, out: int, _size: int) -> None:  # noqa: N802
        ctypes.memmove(out, d.uuid.encode() + b"\0", len(d.uuid) + 1)

    @c(P, P, U)
    def nvmlDeviceGetName(self, d: FakeDevice, out: int, _size: int) -> None:  # noqa: N802
        ctypes.memmove(out, d.name.encode() + b"\0", len(d.name) + 1)

    @c(P, P)
    def nvmlDeviceGetArchitecture(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(U, out, d.architecture)

    @c(P, P, P)
    def nvmlDeviceGetCudaComputeCapability(self, d: FakeDevice, major: int, minor: int) -> None:  # noqa: N802
        put(c_int, major, d.capability[0])
        put(c_int, minor, d.capability[1])

    @c(P, P)
    def nvmlDeviceGetNumGpuCores(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(U, out, d.cores)

    @c(P, P)
    def nvmlDeviceGetMemoryBusWidth(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(U, out, d.bus_width)

    @c(P, P)
    def nvmlDeviceGetPciInfo_v3(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        info = pynvml.nvmlPciInfo_t.from_address(out)
        info.busId = d.bus_id.encode()

    @c(P, P)
    def nvmlDeviceGetNumaNodeId(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(U, out, some(d.numa))

    @c(P, U, P)
    def nvmlDeviceGetCpuAffinity(self, d: FakeDevice, words: int, out: int) -> None:  # noqa: N802
        for word in range(words):
            put(L, out + 8 * word, some(d.affinity) if word == 0 else 0)

    # -- numbers

    @c(P, P)
    def nvmlDeviceGetUtilizationRates(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        both = pynvml.c_nvmlUtilization_t.from_address(out)
        both.gpu, both.memory = some(d.utilization)

    @c(P, P)
    def nvmlDeviceGetMemoryInfo(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        total, reserved, used = d.memory
        memory = pynvml.c_nvmlMemory_t.from_address(out)
        memory.total, memory.used, memory.free = total, used + reserved, total - used - reserved

    @c(P, P)
    def nvmlDeviceGetMemoryInfo_v2(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        memory = pynvml.c_nvmlMemory_v2_t.from_address(out)
        if memory.version != pynvml.nvmlMemory_v2:
            raise Fail(25)
        total, reserved, used = d.memory
        memory.total, memory.reserved, memory.used, memory.free = total, reserved, used, total - used - reserved

    @c(P, P)
    def nvmlDeviceGetBAR1MemoryInfo(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        total, used = some(d.bar1)
        bar1 = pynvml.c_nvmlBAR1Memory_t.from_address(out)
        bar1.bar1Total, bar1.bar1Used, bar1.bar1Free = total, used, total - used

    @c(P, U, P)
    def nvmlDeviceGetClockInfo(self, d: FakeDevice, kind: int, out: int) -> None:  # noqa: N802
        put(U, out, some(d.clocks.get(kind)))

    @c(P, U, P)
    def nvmlDeviceGetMaxClockInfo(self, d: FakeDevice, kind: int, out: int) -> None:  # noqa: N802
        put(U, out, some(d.max_clocks.get(kind)))

    @c(P, U, P)
    def nvmlDeviceGetTemperature(self, d: FakeDevice, _sensor: int, out: int) -> None:  # noqa: N802
        put(U, out, some(d.temperature))

    @c(P, U, P)
    def nvmlDeviceGetTemperatureThreshold(self, d: FakeDevice, kind: int, out: int) -> None:  # noqa: N802
        put(U, out, some(d.thresholds.get(kind)))

    @c(P, P)
    def nvmlDeviceGetTotalEnergyConsumption(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(L, out, some(d.energy))

    @c(P, P)
    def nvmlDeviceGetCurrentClocksEventReasons(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(L, out, some(d.throttle))

    @c(P, P)
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(L, out, some(d.throttle))

    @c(P, P, P)
    def nvmlDeviceGetPowerManagementLimitConstraints(self, d: FakeDevice, low: int, high: int) -> None:  # noqa: N802
        values = some(d.limits)
        put(U, low, values[0])
        put(U, high, values[1])

    @c(P, U, U, P)
    def nvmlDeviceGetTotalEccErrors(self, d: FakeDevice, kind: int, counter: int, out: int) -> None:  # noqa: N802
        put(L, out, some(d.ecc.get((kind, counter))))

    @c(P, P, P, P, P)
    def nvmlDeviceGetRemappedRows(self, d: FakeDevice, *outs: int) -> None:  # noqa: N802
        for out, value in zip(outs, some(d.remapped), strict=True):
            put(U, out, value)

    @c(P, U, P)
    def nvmlDeviceGetViolationStatus(self, d: FakeDevice, policy: int, out: int) -> None:  # noqa: N802
        status = pynvml.c_nvmlViolationTime_t.from_address(out)
        status.violationTime = some(d.violations.get(policy))

    @c(P, U, P)
    def nvmlDeviceGetPcieThroughput(self, d: FakeDevice, way: int, out: int) -> None:  # noqa: N802
        put(U, out, some(d.pcie_throughput)[way])

    def _engine(self, d: FakeDevice, engine: str, out: int, period: int) -> None:
        put(U, out, some(d.engines.get(engine)))
        put(U, period, 100_000)

    @c(P, c_int, P)
    def nvmlDeviceGetFieldValues(self, d: FakeDevice, count: int, out: int) -> None:  # noqa: N802
        members = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
        for item in (pynvml.c_nvmlFieldValue_t * count).from_address(out):
            found = d.fields.get((item.fieldId, item.scopeId))
            if found is None:
                item.nvmlReturn = NOT_SUPPORTED
            elif isinstance(found, int):
                item.nvmlReturn = found
            else:
                item.nvmlReturn = OK
                item.valueType = found[0]
                setattr(item.value, members[found[0]], found[1])

    # -- GPM

    @c(P, P)
    def nvmlGpmQueryDeviceSupport(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        pynvml.c_nvmlGpmSupport_t.from_address(out).isSupportedDevice = d.gpm is not None

    @c(P)
    def nvmlGpmSampleAlloc(self, out: int) -> None:  # noqa: N802
        self.samples += 1
        buffer = (c_ulonglong * 2)()
        self._keep[f"sample {ctypes.addressof(buffer)}"] = buffer
        put(P, out, ctypes.addressof(buffer))

    @c(P)
    def nvmlGpmSampleFree(self, _sample: int) -> None:  # noqa: N802
        self.samples -= 1

    @c(P, P)
    def nvmlGpmSampleGet(self, handle: int, sample: int) -> None:  # noqa: N802
        device = self._device(handle)
        if device.dead:
            raise Fail(device.dead)
        put(L, sample, self.calls["nvmlGpmSampleGet"])
        put(L, sample + 8, handle)

    @c(P, U, P)
    def nvmlGpmMigSampleGet(self, handle: int, instance: int, sample: int) -> None:  # noqa: N802
        for one in self._device(handle).instances:
            if one.gpu_instance == instance:
                put(L, sample, self.calls["nvmlGpmMigSampleGet"])
                put(L, sample + 8, one.handle)
                return
        raise Fail(INVALID)

    @c(P)
    def nvmlGpmMetricsGet(self, request: int) -> None:  # noqa: N802
        got = pynvml.c_nvmlGpmMetricsGet_t.from_address(request)
        first, second = (ctypes.cast(s, c_void_p).value or 0 for s in (got.sample1, got.sample2))
        if got.version != 1 or L.from_address(first).value >= L.from_address(second).value:
            raise Fail(INVALID)  # samples out of order
        device = self._device(L.from_address(second + 8).value)
        for at in range(got.numMetrics):
            metric = got.metrics[at]
            value = (device.gpm or {}).get(metric.metricId)
            metric.nvmlReturn = NOT_SUPPORTED if value is None else OK
            metric.value = value or 0.0

    # -- NVLink and topology

    @c(P, U, P)
    def nvmlDeviceGetNvLinkState(self, d: FakeDevice, link: int, out: int) -> None:  # noqa: N802
        put(U, out, int(some(d.links.get(link))[0]))

    @c(P, U, P)
    def nvmlDeviceGetNvLinkRemoteDeviceType(self, d: FakeDevice, link: int, out: int) -> None:  # noqa: N802
        put(U, out, d.links[link][1])

    @c(P, U, P)
    def nvmlDeviceGetNvLinkRemotePciInfo_v2(self, d: FakeDevice, link: int, out: int) -> None:  # noqa: N802
        pynvml.nvmlPciInfo_t.from_address(out).busId = d.links[link][2].encode()

    @c(P, P, P)
    def nvmlDeviceGetTopologyCommonAncestor(self, d: FakeDevice, other: int, out: int) -> None:  # noqa: N802
        put(U, out, some(d.ancestors.get(self._device(other).index)))

    # -- processes

    @c(P, P, P)
    def nvmlDeviceGetComputeRunningProcesses_v3(self, d: FakeDevice, count: int, out: int) -> int:  # noqa: N802
        return self._processes(d.compute, count, out)

    @c(P, P, P)
    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, d: FakeDevice, count: int, out: int) -> int:  # noqa: N802
        return self._processes(d.graphics, count, out)

    def _processes(self, processes: list[tuple[int, int]], count: int, out: int | None) -> int:
        room = U.from_address(count).value
        put(U, count, len(processes))
        if not processes:
            return OK
        if out is None or room < len(processes):
            return SMALL
        array = (pynvml.c_nvmlProcessInfo_v3_t * len(processes)).from_address(out)
        for item, (pid, memory) in zip(array, processes, strict=True):
            item.pid, item.usedGpuMemory = pid, memory
        return OK

    @c(P, P)
    def nvmlDeviceGetProcessesUtilizationInfo(self, d: FakeDevice, out: int) -> int:  # noqa: N802
        info = pynvml.c_nvmlProcessesUtilizationInfo_v1_t.from_address(out)
        found = [share for share in d.shares if share[0] > info.lastSeenTimeStamp]
        room, info.processSamplesCount = info.processSamplesCount, len(found)
        if not found:
            return NOT_FOUND
        if room < len(found):
            return SMALL
        for at, (when, pid, sm, memory, encoder, decoder) in enumerate(found):
            item = info.procUtilArray[at]
            item.timeStamp, item.pid, item.smUtil, item.memUtil = when, pid, sm, memory
            item.encUtil, item.decUtil = encoder, decoder
        return OK

    @c(P, P, P)
    def nvmlDeviceGetActiveVgpus(self, d: FakeDevice, count: int, out: int) -> int:  # noqa: N802
        vgpus = some(d.vgpus)
        room = U.from_address(count).value
        put(U, count, len(vgpus))
        if not vgpus:
            return OK
        if out is None or room < len(vgpus):
            return SMALL
        for at, vgpu in enumerate(vgpus):
            put(U, out + 4 * at, vgpu)
        return OK

    # -- MIG

    @c(P, P, P)
    def nvmlDeviceGetMigMode(self, d: FakeDevice, now: int, pending: int) -> None:  # noqa: N802
        modes = some(d.mig_mode)
        put(U, now, modes[0])
        put(U, pending, modes[1])

    @c(P, P)
    def nvmlDeviceGetMaxMigDeviceCount(self, _d: FakeDevice, out: int) -> None:  # noqa: N802
        put(U, out, 7)

    @c(P, U, P)
    def nvmlDeviceGetMigDeviceHandleByIndex(self, d: FakeDevice, index: int, out: int) -> None:  # noqa: N802
        if index >= len(d.instances):
            raise Fail(NOT_FOUND)
        put(P, out, d.instances[index].handle)

    @c(P, P)
    def nvmlDeviceGetGpuInstanceId(self, d: Any, out: int) -> None:  # noqa: N802
        put(U, out, d.gpu_instance)

    @c(P, P)
    def nvmlDeviceGetComputeInstanceId(self, d: Any, out: int) -> None:  # noqa: N802
        put(U, out, d.compute_instance)

    @c(P, P)
    def nvmlDeviceGetAttributes_v2(self, d: Any, out: int) -> None:  # noqa: N802
        if not isinstance(d, FakeInstance):
            raise Fail(NOT_SUPPORTED)
        attributes = pynvml.c_nvmlDeviceAttributes.from_address(out)
        attributes.multiprocessorCount, attributes.gpuInstanceSliceCount, attributes.memorySizeMB = d.attributes

    # -- events

    @c(P)
    def nvmlEventSetCreate(self, out: int) -> None:  # noqa: N802
        self.open_sets += 1
        put(P, out, 0x777)

    @c(P)
    def nvmlEventSetFree(self, _set: int) -> None:  # noqa: N802
        self.open_sets -= 1

    @c(P, P)
    def nvmlDeviceGetSupportedEventTypes(self, d: FakeDevice, out: int) -> None:  # noqa: N802
        put(L, out, d.event_types)

    @c(P, L, P)
    def nvmlDeviceRegisterEvents(self, d: FakeDevice, types: int, _set: int) -> None:  # noqa: N802
        if types & ~d.event_types:
            raise Fail(NOT_SUPPORTED)

    @c(P, P, U)
    def nvmlEventSetWait_v2(self, _set: int, out: int, milliseconds: int) -> int:  # noqa: N802
        try:
            event = self.events.get(timeout=milliseconds / 1000)
        except queue.Empty:
            return TIMEOUT
        if isinstance(event, int):
            return event
        data = pynvml.c_nvmlEventData_t.from_address(out)
        device, data.eventType, data.eventData, data.gpuInstanceId, data.computeInstanceId = event
        put(P, out, device.handle)
        return OK


class _Pointers:
    """What pynvml takes for the library: attributes are functions, and nothing else."""

    def __init__(self, fake: FakeNvml) -> None:
        self._fake = fake

    def __getattr__(self, name: str) -> Any:
        if name in self._fake.missing or name not in self._fake._pointers:
            raise AttributeError(name)
        return self._fake._pointers[name]


U_OUT = object()


def some(value: Any) -> Any:
    if value is None:
        raise Fail(NOT_SUPPORTED)
    return value
