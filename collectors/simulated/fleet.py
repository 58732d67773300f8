"""Composition of a simulated fleet: hosts, devices and links, all from a seed."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ...schemas.telemetry import DeviceInfo, HostInfo, Inventory, Link
from .jobs import Floats, digest
from .models import MODELS, Model

_DRIVERS: Final = {"nvidia": "570.86.15", "amd": "6.12.12"}
_VBIOS: Final = {"nvidia": "96.00.9F.00.01", "amd": "022.040.003.043.000001"}
_HOT_HOSTS: Final = 0.03
"""Share of hosts with poor air: their boards reach the slowdown temperature at full load."""


class Fleet(Struct, frozen=True, kw_only=True):
    """The fixed part of a simulated fleet.

    Attributes:
        hosts: host names, in order.
        models: model of each host; all its devices are alike.
        per_host: number of devices of each host.
        uuids: uuids of all devices, host by host.
        cooling: factor on the thermal resistance of each device.
        inventories: inventory of each host.
    """

    hosts: list[str]
    models: list[Model]
    per_host: int
    uuids: list[str]
    cooling: Floats
    inventories: list[Inventory]


def build(*, hosts: int, per_host: int, seed: int, mix: dict[str, float], prefix: str, labels: dict[str, str]) -> Fleet:
    """Make a fleet. The same arguments make the same fleet, and a larger fleet begins with the hosts of a smaller one.

    Raises:
        ValueError: an impossible number of hosts or of devices per host.
    """
    if not 1 <= hosts <= 100_000:
        raise ValueError(f"{hosts} hosts are no fleet: ask for 1 to 100000")
    if not 1 <= per_host <= 64:
        raise ValueError(f"{per_host} devices on a host are not possible: ask for 1 to 64")
    # A random stream for each purpose, so that the size of the fleet shifts none of them.
    of_models, of_air, of_boards = (np.random.Generator(np.random.PCG64([seed % 2**64, n])) for n in range(3))
    keys = list(mix)
    weights = np.array([mix[key] for key in keys])
    chosen = _choose(keys, weights / weights.sum(), hosts, of_models)
    width = max(4, len(str(hosts)))
    names = [f"{prefix}-{number:0{width}d}" for number in range(1, hosts + 1)]
    models = [MODELS[key] for key in chosen]
    air = of_air.random(hosts)
    spread = of_boards.normal(1.0, 0.04, (hosts, per_host))
    cooling = np.where(air < _HOT_HOSTS, 1.45, 1.0)[:, None] * np.clip(spread, 0.85, 1.15)
    uuids: list[str] = []
    inventories: list[Inventory] = []
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        mine = [_uuid(seed, name, model, index) for index in range(per_host)]
        uuids += mine
        inventories.append(_inventory(name, model, mine, number, labels))
    return Fleet(
        hosts=names,
        models=models,
        per_host=per_host,
        uuids=uuids,
        cooling=cooling.reshape(-1),
        inventories=inventories,
    )


def without(inventory: Inventory, gone: Collection[str]) -> Inventory:
    """Remove devices that are gone from an inventory, with their links."""
    kept = [at for at, device in enumerate(inventory.devices) if device.uuid not in gone]
    if len(kept) == len(inventory.devices):
        return inventory
    return replace(
        inventory,
        devices=[inventory.devices[at] for at in kept],
        links=[[inventory.links[a][b] for b in kept] for a in kept],
        nvlink_counts=[[inventory.nvlink_counts[a][b] for b in kept] for a in kept],
    )


def _choose(keys: list[str], shares: Floats, hosts: int, rng: np.random.Generator) -> list[str]:
    """Choose a model for each host so that small fleets show the mix, too: each model has its share of any long run."""
    due = np.zeros(len(keys))
    chosen: list[str] = []
    jitter = rng.random((hosts, len(keys))) * 0.3
    for number in range(hosts):
        due += shares
        pick = int(np.argmax(due + jitter[number] * shares))
        due[pick] -= 1.0
        chosen.append(keys[pick])
    return chosen


def _uuid(seed: int, host: str, model: Model, index: int) -> str:
    name = f"{seed}/{host}/{model.key}/{index}"
    prefix = "GPU-" if model.vendor == "nvidia" else ""
    return f"{prefix}{uuid.uuid5(uuid.NAMESPACE_OID, name)}"


def _inventory(name: str, model: Model, uuids: list[str], number: int, labels: dict[str, str]) -> Inventory:
    count = len(uuids)
    cores = max(16, 24 * count)
    half = (count + 1) // 2
    devices = [
        DeviceInfo(
            uuid=device,
            host=name,
            index=index,
            name=model.name,
            vendor=model.vendor,
            architecture=model.architecture,
            compute_capability=model.compute_capability,
            sm_count=model.sm_count,
            memory_bytes=model.memory_bytes,
            memory_bandwidth_bytes_per_second=int(model.bandwidth),
            sm_clock_max_megahertz=model.sm_clock,
            power_limit_max_watts=model.power_limit,
            driver=_DRIVERS[model.vendor],
            pcie_address=f"00000000:{0x10 + 0x0A * index % 0xE0:02X}:00.0",
            numa_node=index // half,
            cpu_affinity=list(range(cores // 2 * (index // half), cores // 2 * (index // half + 1))),
            firmware={"vbios": _VBIOS[model.vendor]},
            serial=f"{16_000_000_000 + digest(device) % 1_000_000_000}",
        )
        for index, device in enumerate(uuids)
    ]
    return Inventory(
        host=HostInfo(
            name=name,
            address=f"{name}.simulated",
            cpus=cores,
            memory_bytes=count * max(64 * 2**30, round(model.memory_bytes * 1.5 / 2**30) * 2**30),
            driver=_DRIVERS[model.vendor],
            labels={"rack": f"r{number // 8 + 1}", "simulated": "true", **labels},
        ),
        agent="",
        time_ns=0,
        devices=devices,
        links=[[_link(model, a, b, half) for b in range(count)] for a in range(count)],
        nvlink_counts=[[0 if a == b else _links(model, count) for b in range(count)] for a in range(count)],
        source="simulated",
    )


def _links(model: Model, count: int) -> int:
    """Number of NVLinks between two devices: through switches, each pair of devices has the full width."""
    return model.nvlinks if model.vendor == "nvidia" and count > 1 else 0


def _link(model: Model, a: int, b: int, half: int) -> Link:
    if a == b:
        return Link.SAME
    if model.nvlinks:
        return Link.NVLINK
    if a // half != b // half:
        return Link.SYSTEM
    return Link.PCIE_SWITCH if a // 2 == b // 2 else Link.HOST_BRIDGE
