"""Which AMD devices there are, how they are joined, and the processes on them."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ...schemas.telemetry import DeviceInfo, Link, ProcessSample
from .. import proc
from .library import DRIVER_GONE, AmdFailure, AmdLibrary


class Found(Struct, kw_only=True):
    """A device that amdsmi shows: its handle and what is published of it."""

    handle: Any
    info: DeviceInfo


def discover(library: AmdLibrary, host: str) -> list[Found]:
    """Every device, in the driver's order.

    Raises:
        AmdFailure: the driver is gone, or shows no devices at all.
    """
    found: list[Found] = []
    for index, handle in enumerate(library.call("amdsmi_get_processor_handles")):
        try:
            found.append(Found(handle=handle, info=_device(library, handle, index, host)))
        except AmdFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
    return found


def _device(library: AmdLibrary, handle: Any, index: int, host: str) -> DeviceInfo:
    ask = library.ask
    asic: dict[str, Any] = ask({}, "amdsmi_get_gpu_asic_info", handle)
    vram: dict[str, Any] = ask({}, "amdsmi_get_gpu_vram_info", handle)
    cap: dict[str, Any] = ask({}, "amdsmi_get_power_cap_info", handle)
    driver: dict[str, Any] = ask({}, "amdsmi_get_gpu_driver_info", handle)
    clocks: dict[str, Any] = ask({}, "amdsmi_get_clock_info", handle, library.constant("AmdSmiClkType.GFX"))
    bus = str(ask("", "amdsmi_get_gpu_device_bdf", handle))
    node = ask(-1, "amdsmi_get_gpu_topo_numa_affinity", handle)
    memory = ask(0, "amdsmi_get_gpu_memory_total", handle, library.constant("AmdSmiMemoryType.VRAM"))
    return DeviceInfo(
        uuid=str(library.call("amdsmi_get_gpu_device_uuid", handle)),
        host=host,
        index=index,
        name=_words(asic.get("market_name")),
        vendor="amd",
        architecture=_words(asic.get("target_graphics_version")),
        sm_count=_number(asic.get("num_compute_units")),
        memory_bytes=_number(memory),
        # amdsmi gives gigabytes a second.
        memory_bandwidth_bytes_per_second=_number(vram.get("vram_max_bandwidth")) * 10**9,
        sm_clock_max_megahertz=_number(clocks.get("max_clk")),
        power_limit_max_watts=_number(cap.get("max_power_cap")) / 1e6,
        driver=_words(driver.get("driver_version")),
        pcie_address=bus,
        numa_node=node if isinstance(node, int) and node >= 0 else (proc.pci_numa_node(bus) if bus else None),
        cpu_affinity=proc.pci_cpus(bus) if bus else [],
        serial=_words(asic.get("asic_serial")),
    )


def topology(library: AmdLibrary, devices: list[Found]) -> list[list[Link]]:
    """The links between devices, as in `Inventory`. XGMI, AMD's direct link, counts as `nvlink`."""
    kinds = [[Link.SAME if i == j else Link.UNKNOWN for j in range(len(devices))] for i in range(len(devices))]
    xgmi = library.constant("AmdSmiLinkType.AMDSMI_LINK_TYPE_XGMI")
    pcie = library.constant("AmdSmiLinkType.AMDSMI_LINK_TYPE_PCIE")
    for i, one in enumerate(devices):
        for j in range(i):
            other = devices[j]
            link: dict[str, Any] = library.ask({}, "amdsmi_topo_get_link_type", one.handle, other.handle)
            kind = Link.UNKNOWN
            if link.get("type") == xgmi:
                kind = Link.NVLINK
            elif link.get("type") == pcie:
                near = one.info.numa_node is not None and one.info.numa_node == other.info.numa_node
                kind = Link.NUMA if near else Link.SYSTEM
            kinds[i][j] = kinds[j][i] = kind
    return kinds


def processes(library: AmdLibrary, device: Found, table: proc.ProcessTable) -> list[ProcessSample]:
    """The processes on a device.

    Raises:
        AmdFailure: the driver is gone.
    """
    found: list[ProcessSample] = []
    for process in library.ask([], "amdsmi_get_gpu_process_list", device.handle):
        pid = int(process["pid"])
        facts = table.facts(pid)
        vram = process.get("memory_usage", {}).get("vram_mem") or process.get("mem")
        units = process.get("cu_occupancy")
        share = None
        if isinstance(units, int) and device.info.sm_count:
            share = min(100.0, units / device.info.sm_count * 100)
        name = process.get("name") or ""
        found.append(
            ProcessSample(
                device=device.info.uuid,
                pid=pid,
                memory_used_bytes=int(vram) if isinstance(vram, int) else None,
                sm_utilization_percent=share,
                name=facts.name or ("" if name == "N/A" else str(name).rsplit("/", 1)[-1]),
                user=facts.user,
                container=facts.container,
                lease=facts.lease,
                started_ns=facts.started_ns,
                command=facts.command,
            )
        )
    return found


def _words(value: Any) -> str:
    return value if isinstance(value, str) and value != "N/A" else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
