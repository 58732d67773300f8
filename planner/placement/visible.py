"""Environment variables that make a vendor's runtime show a program some devices of a host and hide the others.

CUDA takes uuids, or numbers in the order of `CUDA_DEVICE_ORDER`. ROCm filters twice: `ROCR_VISIBLE_DEVICES` takes ids
or numbers of all devices, and `HIP_VISIBLE_DEVICES` numbers of those that are left. A program built for HIP reads
`CUDA_VISIBLE_DEVICES` as the latter where that is not set, and many frameworks want the two alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from ...schemas.telemetry import DeviceInfo

AMD = "amd"


def visible(held: Sequence[tuple[str, DeviceInfo | None]], around: AbstractSet[str]) -> dict[str, str]:
    """Environment variables with which a program sees these devices of a host alone.

    Args:
        held: uuid of each device, and its capabilities if known.
        around: vendors of all devices of the host.
    """
    amd = [info for _, info in held if info is not None and info.vendor == AMD]
    others = [(uuid, info) for uuid, info in held if info is None or info.vendor != AMD]
    if not amd and AMD not in around:
        return _cuda(others)
    here = ",".join(map(str, range(len(amd))))
    values = {"ROCR_VISIBLE_DEVICES": ",".join(_rocm(info) for info in amd), "HIP_VISIBLE_DEVICES": here}
    # If there are devices of both vendors, the numbers of one must not show the other.
    return values | (_cuda(others) if others or around - {AMD} else {"CUDA_VISIBLE_DEVICES": here})


def _rocm(info: DeviceInfo) -> str:
    """Name of a device for ROCm, or its number if the collector reports none: amdsmi's uuid would hide all devices."""
    return info.visible_id or str(info.index)


def _cuda(devices: Sequence[tuple[str, DeviceInfo | None]]) -> dict[str, str]:
    if not any(info is not None and info.visible_id for _, info in devices):
        return {"CUDA_VISIBLE_DEVICES": ",".join(uuid for uuid, _ in devices)}
    # A list has uuids or numbers, not both. The numbers are from NVML, which counts by PCI address.
    names = [uuid if info is None else str(info.index) for uuid, info in devices]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(names)}
