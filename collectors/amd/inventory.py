"""Inventory of AMD devices, the links between them, and the processes on them."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.telemetry import DeviceInfo, Link, ProcessSample
from ..identity import Identities, Seat
from ..processes import proc
from ..text import clean
from .library import DRIVER_GONE, NEVER, AmdFailure, AmdLibrary
from .visible import nodes, place, visible_ids


class Found(Struct, kw_only=True):
    """A device that amdsmi shows: its handle and the facts that are published."""

    handle: Any
    info: DeviceInfo


def discover(library: AmdLibrary, host: str, identities: Identities) -> list[Found]:
    """List every device that answers, in the driver's order.

    Args:
        library: amdsmi.
        host: the host's name.
        identities: names of its devices.

    Raises:
        AmdFailure: the driver is gone, or shows no devices at all.
    """
    found: list[Found] = []
    for index, handle in enumerate(library.call("amdsmi_get_processor_handles")):
        try:
            found.append(Found(handle=handle, info=_device(library, handle, index, host, identities)))
        except AmdFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
    infos = [one.info for one in found]
    seats = [Seat(uuid=info.uuid, address=info.pcie_address, serial=info.serial, index=info.index) for info in infos]
    places = [place(library, one.handle, one.info.index, one.info.pcie_address, one.info.serial) for one in found]
    named = zip(found, identities.names(seats), visible_ids(places, nodes()), strict=True)
    return [Found(handle=one.handle, info=replace(one.info, uuid=uuid, visible_id=id)) for one, uuid, id in named]


def _device(library: AmdLibrary, handle: Any, index: int, host: str, identities: Identities) -> DeviceInfo:
    ask = library.ask
    asic = _facts(library, handle, "amdsmi_get_gpu_asic_info", "amdsmi_asic_info_t")
    vram: dict[str, Any] = ask({}, "amdsmi_get_gpu_vram_info", handle)
    cap: dict[str, Any] = ask({}, "amdsmi_get_power_cap_info", handle)
    driver = _facts(library, handle, "amdsmi_get_gpu_driver_info", "amdsmi_driver_info_t")
    clocks: dict[str, Any] = ask({}, "amdsmi_get_clock_info", handle, library.constant("AmdSmiClkType.GFX"))
    bus = str(ask("", "amdsmi_get_gpu_device_bdf", handle))
    vbios: dict[str, Any] = ask({}, "amdsmi_get_gpu_vbios_info", handle)
    node = ask(-1, "amdsmi_get_gpu_topo_numa_affinity", handle)
    memory = ask(0, "amdsmi_get_gpu_memory_total", handle, library.constant("AmdSmiMemoryType.VRAM"))
    return DeviceInfo(
        uuid=_uuid(library, handle, bus, identities),
        host=host,
        index=index,
        name=_words(asic.get("market_name")),
        vendor="amd",
        architecture=_words(asic.get("target_graphics_version")),
        sm_count=_number(asic.get("num_compute_units", asic.get("num_of_compute_units"))),
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
        firmware={"vbios": version} if (version := _words(vbios.get("version"))) else {},
    )


def _uuid(library: AmdLibrary, handle: Any, bus: str, identities: Identities) -> str:
    """The driver's uuid of a device; empty for one that has none.

    Raises:
        AmdFailure: it can't be read now, and is not known from before.
    """
    try:
        found = clean(str(library.call("amdsmi_get_gpu_device_uuid", handle)))
    except AmdFailure as failure:
        known = identities.uuid_at(bus, None)
        if failure.code in DRIVER_GONE or (known is None and (failure.code not in NEVER or not bus)):
            raise
        return known or ""
    identities.uuid_at(bus, found)
    return found


def _facts(library: AmdLibrary, handle: Any, name: str, structure: str) -> dict[str, Any]:
    """Answer of a call, by field; empty where the device does not support it.

    Where amdsmi can't decode the answer, its structure is read directly.

    Raises:
        AmdFailure: the driver is gone.
    """
    try:
        return library.call(name, handle)
    except AmdFailure as failure:
        if failure.code in DRIVER_GONE:
            raise
        if failure.code is not None:
            return {}
    try:
        found = library.fields(name, structure, handle)
    except AmdFailure:
        return {}
    version = found.get("target_graphics_version")
    return found | ({"target_graphics_version": f"gfx{version:x}"} if isinstance(version, int) else {})


def topology(library: AmdLibrary, devices: list[Found]) -> list[list[Link]]:
    """Links between devices, as in `Inventory`. XGMI, AMD's direct link, counts as `nvlink`."""
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


def processes(library: AmdLibrary, device: Found, table: proc.ProcessTable) -> list[ProcessSample] | None:
    """List the processes on a device; None where they can't be listed.

    Raises:
        AmdFailure: the driver is gone.
    """
    found: list[ProcessSample] = []
    listed = _running(library, device.handle)
    if listed is None:
        return None
    for process in listed:
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
                memory_used_bytes=vram if isinstance(vram, int) and vram < 2**63 else None,
                sm_utilization_percent=share,
                name=facts.name or ("" if name == "N/A" else clean(str(name).rsplit("/", 1)[-1])),
                user=facts.user,
                container=facts.container,
                lease=facts.lease,
                started_ns=facts.started_ns,
                command=facts.command,
            )
        )
    return found


def _running(library: AmdLibrary, handle: Any) -> list[dict[str, Any]] | None:
    try:
        return library.call("amdsmi_get_gpu_process_list", handle)
    except AmdFailure as failure:
        if failure.code in DRIVER_GONE:
            raise
        return library.processes(handle) if failure.code is None else None


def _words(value: Any) -> str:
    return clean(value) if isinstance(value, str) and value != "N/A" else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
