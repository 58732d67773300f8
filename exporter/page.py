"""Devices' series in Prometheus' text format 0.0.4.

Lines are written per host and metric, and kept for as long as the values stay the same: most metrics of an idle device,
and the slow ones of a busy one, are written once and copied from then on.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

from ..schemas import columns
from ..schemas import xids as xid_texts
from ..schemas.metrics import METRICS
from ..schemas.telemetry import DeviceInfo, Inventory, SampleBatch
from .families import MEMORY_SHARE, NVLINK, XID, XID_RECENT, XID_TOTAL, Family
from .live import Host
from .xids import WINDOW_SECONDS

DEVICE_INFO: Final = "corral_device_info"
_HEADERS: Final = {
    DEVICE_INFO: b"# HELP corral_device_info What a device is; its value is 1.\n# TYPE corral_device_info gauge\n"
}
_FORMATS: Final = {"<f4": "f", "<i4": "i", "<i8": "q"}
_XID_FAMILIES: Final = frozenset({XID, XID_RECENT, XID_TOTAL})
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def write(
    hosts: Iterable[Host], families: Sequence[Family], *, info: bool = True, silent: Iterable[Host] = ()
) -> list[bytes]:
    """Write all series of all devices, family by family.

    Args:
        hosts: hosts that were heard lately, as of `LiveFleet.hosts`.
        families: families to write, in this order.
        info: True to write `corral_device_info`, too.
        silent: hosts that are expected and not heard: only their fatal Xids are shown, which silence does not clear.
    """
    shown = [host for host in hosts if host.batch is not None and host.inventory is not None]
    away = [host for host in silent if host.batch is None and host.inventory is not None and host.xids]
    for host in (*shown, *away):
        _label(host)
    parts: list[bytes] = []
    for family in families:
        of = [*shown, *away] if family.metric == XID else shown
        blocks = [block for host in of if (block := _block(host, family))]
        if blocks:
            parts.append(f"# HELP {family.name} {_help(family.help)}\n# TYPE {family.name} {family.kind}\n".encode())
            parts += blocks
    if info and shown:
        parts.append(_HEADERS[DEVICE_INFO])
        parts += [host.static[DEVICE_INFO] for host in shown]
    return parts


def labels_of(device: DeviceInfo, host: str, whole: DeviceInfo, instance: str) -> dict[str, str]:
    """Labels that dcgm-exporter gives a device's series.

    Args:
        device: a whole device or a MIG instance.
        host: the host's name.
        whole: the device that a MIG instance is part of; otherwise the device itself.
        instance: id of the MIG instance among those of its device; empty for a whole device.
    """
    found = {
        "gpu": str(whole.index),
        "UUID": whole.uuid,
        "pci_bus_id": whole.pcie_address,
        "device": f"{whole.vendor}{whole.index}",
        "modelName": whole.name,
    }
    if device.mig_parent is not None:
        found |= {"GPU_I_PROFILE": device.mig_profile, "GPU_I_ID": instance}
    # dcgm-exporter capitalized it until May 2026: dashboards use either.
    found["Hostname"] = found["hostname"] = host
    found["DCGM_FI_DRIVER_VERSION"] = device.driver
    return found


def label_text(labels: dict[str, str]) -> str:
    """Format labels as text behind a series name."""
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


def device_labels(inventory: Inventory) -> dict[str, dict[str, str]]:
    """Labels of every device of a host, by uuid."""
    host = inventory.host.name
    by_uuid = {device.uuid: device for device in inventory.devices}
    numbers: dict[str, int] = {}
    taken: set[tuple[str, str]] = set()
    found: dict[str, dict[str, str]] = {}
    for device in inventory.devices:
        whole, instance = device, ""
        if (parent := device.mig_parent) is not None:
            whole = by_uuid.get(parent, device)
            number = numbers[parent] = numbers.get(parent, -1) + 1
            # Older collectors do not say which instance it is.
            instance = str(number if device.mig_instance is None else device.mig_instance)
            if (parent, instance) in taken:  # one instance, split once more for compute: no series may appear twice
                instance = f"{instance}.{number}"
            taken.add((parent, instance))
        found[device.uuid] = labels_of(device, host, whole, instance)
    return found


def _label(host: Host) -> None:
    if host.labels or host.inventory is None:
        return
    labels = device_labels(host.inventory)
    host.labels = {uuid: label_text(found) for uuid, found in labels.items()}
    lines: list[str] = []
    for device in host.devices:
        more = {
            "device_uuid": device.uuid,
            "vendor": device.vendor,
            "architecture": device.architecture,
            "compute_capability": device.compute_capability,
            "memory_bytes": str(device.memory_bytes),
            "serial": device.serial,
        }
        lines.append(f"{DEVICE_INFO}{label_text(labels[device.uuid] | more)} 1\n")
    host.static = {DEVICE_INFO: "".join(lines).encode()}


def _block(host: Host, family: Family) -> bytes:
    if family.metric in _XID_FAMILIES:
        return _xid_block(host, family)
    batch = host.batch
    assert batch is not None
    if host.order != batch.devices:
        host.order, host.blocks = batch.devices, {}
    column = _column(batch, family.metric)
    if column is None:
        return b""
    raw, nulls, code = column
    kept = host.blocks.get(family.name)
    if kept is not None and kept[0] == raw and kept[1] == nulls:
        return kept[2]
    name, text, labels = family.name, family.text, host.labels
    values: Sequence[float] = memoryview(raw).cast(code)
    lines = [
        f"{name}{found} {text(value)}\n"
        for at, (device, value) in enumerate(zip(batch.devices, values, strict=True))
        if (found := labels.get(device)) is not None and not (nulls and nulls[at])
    ]
    block = "".join(lines).encode()
    host.blocks[family.name] = (raw, nulls, block)
    return block


def _xid_block(host: Host, family: Family) -> bytes:
    """Lines of an Xid family, which has labels of its own; also of devices that can't be read any more."""
    now = time.time()
    lines: list[str] = []
    read = host.batch.devices if host.batch is not None else []
    for device in [*read, *(uuid for uuid in host.xids if uuid not in read)]:
        labels = host.labels.get(device)
        if labels is None:
            continue
        xids = host.xids.get(device)
        if family.metric == XID:
            code = xids.shown(now) if xids is not None else 0
            if code or host.xids_known:
                lines.append(_line(family, labels, code, err_code=str(code), err_msg=xid_texts.text(code)))
        elif family.metric == XID_RECENT:
            window = str(WINDOW_SECONDS * 1000)
            counts = xids.within(now) if xids is not None else {}
            lines += [
                _line(family, labels, count, window_size_in_ms=window, xid=str(code))
                for code, count in sorted(counts.items())
            ] or [_line(family, labels, 0, window_size_in_ms=window)]
        elif xids is not None:
            lines += [_line(family, labels, count, xid=str(code)) for code, count in sorted(xids.counts.items())]
    return "".join(lines).encode()


def _line(family: Family, labels: str, value: int, **more: str) -> str:
    return f"{family.name}{labels[:-1]},{label_text(more)[1:]} {value}\n"


def _column(batch: SampleBatch, metric: str) -> tuple[bytes, bytes, Any] | None:
    """Values of the last tick as bytes, their nulls, and the format code of a value; None where there are none."""
    count = len(batch.devices)
    if metric == MEMORY_SHARE:
        used, total, reserved = (
            columns.column(batch, f"memory_{what}_bytes") for what in ("used", "total", "reserved")
        )
        if used is None or total is None:
            return None
        kept = reserved[-count:] if reserved is not None else [0] * count
        shares = [_share(*three) for three in zip(used[-count:], total[-count:], kept, strict=True)]
        nulls = bytes(share is None for share in shares)
        return array("d", [share or 0.0 for share in shares]).tobytes(), nulls if any(nulls) else b"", "d"
    if metric == NVLINK:
        received, sent = (columns.column(batch, f"nvlink_{way}_bytes") for way in ("rx", "tx"))
        if received is None or sent is None:
            return None
        both = list(zip(received[-count:], sent[-count:], strict=True))
        nulls = bytes(a is None or b is None for a, b in both)
        sums = array("q", [int((a or 0) + (b or 0)) for a, b in both])
        return sums.tobytes(), nulls if any(nulls) else b"", "q"
    raw = batch.columns.get(metric)
    if raw is None:
        return None
    dtype = METRICS[metric].row.unit.dtype
    nulls = batch.nulls.get(metric)
    return raw[-count * int(dtype[-1]) :], nulls[-count:] if nulls else b"", _FORMATS[dtype]


def _share(used: float | None, total: float | None, reserved: float | None) -> float | None:
    left = (total or 0) - (reserved or 0)
    return None if used is None or left <= 0 else used / left


def _help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")
