"""NVLink domain of a host: the hosts whose GPUs reach each other over NVLink, as in a GB200 NVL72 rack."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Sequence
from typing import Any, Final

from .inventory import Found
from .library import DRIVER_GONE, SUCCESS, Handle, Library, NvmlFailure

DOMAIN_LABEL: Final = "nvlink_domain"
_COMPLETED: Final = 3
"""`NVML_GPU_FABRIC_STATE_COMPLETED`: the fabric manager has registered the device."""


def nvlink_domain(library: Library, devices: Sequence[Found]) -> str:
    """Name of the NVLink domain of a host: its devices' cluster uuid and clique id, as `UUID.CLIQUE`.

    That is the form of NVIDIA's label `nvidia.com/gpu.clique`. Empty if the devices are in no domain of several hosts
    (the uuid is zero then), are not registered yet, or differ.

    Args:
        library: NVML.
        devices: of the host. Those that do not answer, and MIG instances, do not count.

    Raises:
        NvmlFailure: the driver is gone.
    """
    found: set[str] = set()
    for device in devices:
        if device.parent is not None:
            continue
        try:
            found.add(_domain_of(library, device.handle))
        except NvmlFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
    return found.pop() if len(found) == 1 else ""


def _domain_of(library: Library, handle: Handle) -> str:
    structure = getattr(library.pynvml, "c_nvmlGpuFabricInfoV_t", None)  # unknown to old versions of pynvml
    if structure is None:
        return ""
    info: Any = structure()
    if library.ask(None, "nvmlDeviceGetGpuFabricInfoV", handle, ctypes.byref(info)) is None:
        return ""
    # The state is one byte; pynvml reads the padding after it, too.
    if info.state & 0xFF != _COMPLETED or info.status != SUCCESS:
        return ""
    cluster = uuid.UUID(bytes=bytes(info.clusterUuid))
    return f"{cluster}.{info.cliqueId}" if cluster.int else ""
