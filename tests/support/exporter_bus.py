"""A bus and devices for the exporter's page, fed without a server with the bytes that agents send."""

from __future__ import annotations

from typing import Any

from corral.exporter.families import choose
from corral.exporter.live import LiveFleet
from corral.exporter.page import write
from corral.schemas import codec, columns, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import (
    DeviceInfo,
    HostInfo,
    Inventory,
    SampleBatch,
)

LABELS = ["gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname", "DCGM_FI_DRIVER_VERSION"]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bus:
    """Feeds a `LiveFleet` as its subscriptions do, with the bytes that agents send."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.live = LiveFleet(None, forget_seconds=60, clock=self.clock)  # type: ignore[arg-type]  # it is never started

    def inventory(self, *devices: DeviceInfo, host: str = "h1", time_ns: int = 1) -> None:
        message = Inventory(host=HostInfo(name=host), agent="a", time_ns=time_ns, devices=list(devices))
        self.live.take_inventory(subjects.inventory_subject(host), codec.encode(message))

    def samples(self, devices: list[str], *, host: str = "h1", **values: list[Any]) -> None:
        """Values are ticks × devices."""
        packed = {name: columns.pack(METRICS[name], value) for name, value in values.items()}
        count = len(next(iter(values.values()), devices))
        message = SampleBatch(
            host=host,
            agent="a",
            sequence=1,
            source="nvml",
            devices=devices,
            times_ns=columns.pack_times([10**18] * count),
            columns={name: found[0] for name, found in packed.items() if found},
            nulls={name: found[1] for name, found in packed.items() if found and found[1]},
        )
        self.live.take_samples(subjects.samples_subject(host), codec.encode(message))

    def page(self, *names: str) -> bytes:
        return b"".join(write(self.live.hosts(), choose(names or ["all"])))


def device(index: int, **more: Any) -> DeviceInfo:
    values: dict[str, Any] = {
        "uuid": f"GPU-{index}",
        "host": "h1",
        "index": index,
        "name": "NVIDIA H100",
        "driver": "570.1",
        "pcie_address": f"00000000:{index:02X}:00.0",
    }
    return DeviceInfo(**(values | more))
