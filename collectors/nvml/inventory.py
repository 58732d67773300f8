"""Inventory of NVIDIA devices: identity, capabilities, MIG instances. It is read from the driver in full each time."""

from __future__ import annotations

import os
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.telemetry import DeviceInfo
from ..identity import Identities, Seat
from ..processes import proc
from .library import DRIVER_GONE, FUNCTION_NOT_FOUND, LOST, NOT_SUPPORTED, Handle, Library, NvmlFailure, field_text

ARCHITECTURES: Final = {
    2: "Kepler",
    3: "Maxwell",
    4: "Pascal",
    5: "Volta",
    6: "Turing",
    7: "Ampere",
    8: "Ada",
    9: "Hopper",
    10: "Blackwell",
    13: "Rubin",
}
_CORES_PER_SM: Final = {"3": 192, "5": 128, "6.0": 64, "6": 128, "7": 64, "8.0": 64, "8": 128, "9": 128, "10": 128}
"""CUDA cores in a streaming multiprocessor by compute capability or its major part (CUDA programming guide)."""
_NEWEST_CORES_PER_SM: Final = 128
_FIRMWARE: Final = {
    "vbios": "nvmlDeviceGetVbiosVersion",
    "gsp": "nvmlDeviceGetGspFirmwareVersion",
    "inforom": "nvmlDeviceGetInforomImageVersion",
}
"""Calls for the versions of a device's firmware, by its part."""


Split = tuple[bool, tuple[str, ...]]
"""MIG layout of a device: True if MIG is on, and the uuids of the instances."""


class Found(Struct, kw_only=True):
    """A device that NVML shows.

    Attributes:
        handle: NVML's handle, valid until the device or the driver is gone.
        info: the facts that are published.
        driver_uuid: uuid by which the driver finds it; empty where the driver's uuid is not unique.
        parent: handle of the whole device for a MIG instance.
        gpu_instance: id of its GPU instance for a MIG instance.
        compute_instance: id of its compute instance for a MIG instance.
        mig_capable: True if it can be split into MIG instances.
    """

    handle: Handle
    info: DeviceInfo
    driver_uuid: str = ""
    parent: Handle | None = None
    gpu_instance: int | None = None
    compute_instance: int | None = None
    mig_capable: bool = False


class Unreachable(Struct, frozen=True):
    """An index at which the driver counts a device that does not answer."""

    index: int
    failure: NvmlFailure


def discover(library: Library, host: str, identities: Identities) -> tuple[list[Found], list[Unreachable]]:
    """List every device, whole ones followed by their MIG instances, by index; and the indices that do not answer.

    Args:
        library: NVML.
        host: the host's name.
        identities: names of its devices.

    Raises:
        NvmlFailure: the driver is gone.
    """
    driver = str(library.ask("", "nvmlSystemGetDriverVersion"))
    found: list[Found] = []
    unreachable: list[Unreachable] = []
    for index in range(int(library.call("nvmlDeviceGetCount"))):
        try:
            handle = library.call("nvmlDeviceGetHandleByIndex", index)
            capable = library.ask(None, "nvmlDeviceGetMigMode", handle) is not None
            info = _whole(library, handle, index, host, driver, identities)
            device = Found(handle=handle, info=info, mig_capable=capable)
            found.append(device)
            if device.info.mig_enabled:
                found += _instances(library, device)
        except NvmlFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
            unreachable.append(Unreachable(index, failure))
    return _named(found, identities), unreachable


def _named(found: list[Found], identities: Identities) -> list[Found]:
    """Give the devices unique names. Programs select one whose driver's uuid is not unique by its index."""
    infos = [device.info for device in found]
    names = identities.names(
        [
            Seat(uuid=info.uuid, address=info.pcie_address, serial=info.serial, index=index)
            for index, info in enumerate(infos)
        ]
    )
    named: list[Found] = []
    parent = ""
    for device, info, name in zip(found, infos, names, strict=True):
        own = name == info.uuid
        if device.parent is None:
            parent = name
            info = info if own else replace(info, uuid=name, visible_id=str(info.index))
        else:
            info = replace(info, uuid=name, mig_parent=parent)
        named.append(replace(device, info=info, driver_uuid=name if own else ""))
    return named


def layout(library: Library, devices: list[Found]) -> dict[str, Split]:
    """Current MIG layout of the whole devices among these, by uuid. A device that does not answer is left out.

    Raises:
        NvmlFailure: the driver is gone.
    """
    found: dict[str, Split] = {}
    for device in devices:
        if device.parent is not None:
            continue
        if not device.mig_capable:
            found[device.info.uuid] = False, ()
            continue
        try:
            enabled = _mig_enabled(library, device.handle)
            handles = mig_handles(library, device.handle, enabled)
            found[device.info.uuid] = enabled, tuple(str(library.call("nvmlDeviceGetUUID", h)) for h in handles)
        except NvmlFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
    return found


def mig_handles(library: Library, handle: Handle, enabled: bool) -> list[Handle]:
    """Handles of the MIG instances of a device; empty where MIG is off."""
    if not enabled:
        return []
    count = int(library.ask(0, "nvmlDeviceGetMaxMigDeviceCount", handle))
    handles = [library.ask(None, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(count)]
    return [h for h in handles if h is not None]


def handle_of(library: Library, found: Found) -> Handle | None:
    """Find the handle of a known device again; None where the driver no longer finds it.

    Raises:
        NvmlFailure: the device or the driver is gone.
    """
    if found.driver_uuid or found.parent is not None:
        return library.ask(None, "nvmlDeviceGetHandleByUUID", (found.driver_uuid or found.info.uuid).encode())
    at = library.ask(None, "nvmlDeviceGetHandleByPciBusId", found.info.pcie_address.encode())
    return library.ask(None, "nvmlDeviceGetHandleByIndex", found.info.index) if at is None else at


def _uuid(library: Library, handle: Handle, bus: str, identities: Identities) -> str:
    """The driver's uuid of a device; empty for one that has none.

    Raises:
        NvmlFailure: it can't be read now, and is not known from before.
    """
    try:
        found = str(library.call("nvmlDeviceGetUUID", handle))
    except NvmlFailure as failure:
        if failure.code in LOST or failure.code in DRIVER_GONE:
            raise
        known = identities.uuid_at(bus, None)
        if known is None and (failure.code not in (NOT_SUPPORTED, FUNCTION_NOT_FOUND) or not bus):
            raise
        return known or ""
    identities.uuid_at(bus, found)
    return found


def _whole(library: Library, handle: Handle, index: int, host: str, driver: str, identities: Identities) -> DeviceInfo:
    ask = library.ask
    capability = _capability(ask(None, "nvmlDeviceGetCudaComputeCapability", handle))
    bus = _bus(ask(None, "nvmlDeviceGetPciInfo", handle))
    memory = ask(None, "nvmlDeviceGetMemoryInfo", handle)
    limits = ask((0, 0), "nvmlDeviceGetPowerManagementLimitConstraints", handle)
    width = int(ask(0, "nvmlDeviceGetMemoryBusWidth", handle))
    clock = int(ask(0, "nvmlDeviceGetMaxClockInfo", handle, library.constant("NVML_CLOCK_MEM")))
    return DeviceInfo(
        uuid=_uuid(library, handle, bus, identities),
        host=host,
        index=index,
        name=str(ask("", "nvmlDeviceGetName", handle)),
        architecture=ARCHITECTURES.get(ask(0, "nvmlDeviceGetArchitecture", handle), ""),
        compute_capability=capability,
        sm_count=_sm_count(int(ask(0, "nvmlDeviceGetNumGpuCores", handle)), capability),
        memory_bytes=int(memory.total) if memory is not None else 0,
        # Two transfers a clock (double data rate), on every line of the bus.
        memory_bandwidth_bytes_per_second=width * clock * 1_000_000 * 2 // 8,
        sm_clock_max_megahertz=int(ask(0, "nvmlDeviceGetMaxClockInfo", handle, library.constant("NVML_CLOCK_SM"))),
        power_limit_max_watts=limits[1] / 1000,
        driver=driver,
        pcie_address=bus,
        mig_enabled=_mig_enabled(library, handle),
        numa_node=_numa_node(library, handle, bus),
        cpu_affinity=_cpu_affinity(library, handle, bus),
        serial=str(ask("", "nvmlDeviceGetSerial", handle)),
        firmware={part: str(text) for part, call in _FIRMWARE.items() if (text := ask("", call, handle))},
    )


def _instances(library: Library, device: Found) -> list[Found]:
    found: list[Found] = []
    whole = device.info
    for handle in mig_handles(library, device.handle, enabled=True):
        attributes = library.ask(None, "nvmlDeviceGetAttributes", handle)
        memory = library.ask(None, "nvmlDeviceGetMemoryInfo", handle)
        size = int(memory.total) if memory is not None else _attribute(attributes, "memorySizeMB") * 2**20
        name = str(library.ask(whole.name, "nvmlDeviceGetName", handle))
        share = size / whole.memory_bytes if whole.memory_bytes else 0.0
        instance = library.ask(None, "nvmlDeviceGetGpuInstanceId", handle)
        info = DeviceInfo(
            uuid=str(library.call("nvmlDeviceGetUUID", handle)),
            host=whole.host,
            index=whole.index,
            name=name,
            architecture=whole.architecture,
            compute_capability=whole.compute_capability,
            sm_count=_attribute(attributes, "multiprocessorCount"),
            memory_bytes=size,
            # An instance has memory slices of its own, and with them that share of the bandwidth.
            memory_bandwidth_bytes_per_second=int(whole.memory_bandwidth_bytes_per_second * share),
            sm_clock_max_megahertz=whole.sm_clock_max_megahertz,
            driver=whole.driver,
            pcie_address=whole.pcie_address,
            mig_parent=whole.uuid,
            mig_profile=_profile(name, attributes),
            mig_instance=instance,
            numa_node=whole.numa_node,
            cpu_affinity=whole.cpu_affinity,
            serial=whole.serial,
        )
        found.append(
            Found(
                handle=handle,
                info=info,
                parent=device.handle,
                gpu_instance=instance,
                compute_instance=library.ask(None, "nvmlDeviceGetComputeInstanceId", handle),
            )
        )
    return found


def _profile(name: str, attributes: Any) -> str:
    """MIG profile at the end of an instance's name, as in `NVIDIA A100-SXM4-40GB MIG 1g.5gb`; else from attributes."""
    _, found, profile = name.rpartition(" MIG ")
    if found:
        return profile
    slices, memory = _attribute(attributes, "gpuInstanceSliceCount"), _attribute(attributes, "memorySizeMB")
    return f"{slices}g.{round(memory / 1024)}gb" if slices else ""


def _attribute(attributes: Any, name: str) -> int:
    return int(getattr(attributes, name)) if attributes is not None else 0


def _mig_enabled(library: Library, handle: Handle) -> bool:
    mode = library.ask(None, "nvmlDeviceGetMigMode", handle)
    return mode is not None and int(mode[0]) == 1


def _capability(found: Any) -> str:
    return f"{found[0]}.{found[1]}" if found else ""


def _sm_count(cores: int, capability: str) -> int:
    if not cores or not capability:
        return 0
    per_sm = _CORES_PER_SM.get(capability) or _CORES_PER_SM.get(capability.split(".")[0]) or _NEWEST_CORES_PER_SM
    return cores // per_sm


def _bus(info: Any) -> str:
    return "" if info is None else field_text(info, "busId")


def _numa_node(library: Library, handle: Handle, bus: str) -> int | None:
    node = library.ask(None, "nvmlDeviceGetNumaNodeId", handle)
    if node is not None and int(node) < 2**31:
        return int(node)
    return proc.pci_numa_node(bus) if bus else None


def _cpu_affinity(library: Library, handle: Handle, bus: str) -> list[int]:
    words = (max(os.cpu_count() or 1, 1) + 63) // 64
    found = library.ask(None, "nvmlDeviceGetCpuAffinity", handle, words)
    if found is None:
        return proc.pci_cpus(bus) if bus else []
    return [word * 64 + bit for word, value in enumerate(found) for bit in range(64) if value >> bit & 1]
