"""Values of `ROCR_VISIBLE_DEVICES` that select a device: `GPU-` and 16 hexadecimal digits, or its rank among the nodes.

From ROCR-Runtime, `core/runtime/amd_filter_device.cpp`: a token that begins with G is compared with the unique ids of
the kernel's nodes, and must match exactly one; any other must be a whole number, which counts the kernel's GPU nodes in
their order. The first token that is neither ends the list. So amdsmi's uuid hides every device, and so does the unique
id of a board whose partitions share it, or an id of zero.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from .library import AmdLibrary

NODES: Final = Path("/sys/class/kfd/kfd/topology/nodes")
_HIP_UUID: Final = re.compile(r"GPU-([0-9a-f]{16})", re.IGNORECASE)
_SERIAL: Final = re.compile(r"(?:0x)?([0-9a-f]{1,16})", re.IGNORECASE)


class Node(Struct, frozen=True, kw_only=True):
    """A GPU among the kernel's compute nodes.

    Attributes:
        number: number of the node.
        unique_id: unique id of the device; 0 if it has none.
        address: address on the PCI bus, such as `0000:19:00`; empty if unknown.
        partition: number of the partition of its board.
    """

    number: int
    unique_id: int = 0
    address: str = ""
    partition: int = 0


class Place(Struct, frozen=True, kw_only=True):
    """Position of a device among the compute nodes, as amdsmi gives it.

    Attributes:
        index: amdsmi's index of the device.
        node: number of its compute node; None if unknown.
        rank: its rank among all GPU nodes; None if unknown.
        unique_id: unique id of the device; 0 if unknown.
        address: address on the PCI bus, such as `0000:19:00.0`; empty if unknown.
    """

    index: int
    node: int | None = None
    rank: int | None = None
    unique_id: int = 0
    address: str = ""


def nodes(root: Path = NODES) -> list[Node]:
    """List the GPU nodes, in ROCm's order; empty where the kernel shows none."""
    found: list[Node] = []
    try:
        numbers = sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdigit())
    except OSError:
        return []
    for number in numbers:
        try:
            lines = (root / str(number) / "properties").read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        values = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
        if not values.get("simd_count"):
            continue
        location = values.get("location_id", 0)
        where = f"{values.get('domain', 0):04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}"
        found.append(
            Node(number=number, unique_id=values.get("unique_id", 0), address=where, partition=location >> 28 & 0xF)
        )
    return found


def place(library: AmdLibrary, handle: Any, index: int, address: str, serial: str) -> Place:
    """Find the position of a device among the compute nodes, as far as amdsmi knows it.

    Raises:
        AmdFailure: the driver is gone.
    """
    named: dict[str, Any] = library.ask({}, "amdsmi_get_gpu_enumeration_info", handle)  # since ROCm 6.4
    node = named.get("hsa_id")
    if not isinstance(node, int):
        node = library.ask({}, "amdsmi_get_gpu_kfd_info", handle).get("node_id")
    rank = named.get("hip_id")
    hip = _HIP_UUID.fullmatch(str(named.get("hip_uuid", "")))
    own = hip or _SERIAL.fullmatch(serial)
    return Place(
        index=index,
        rank=rank if isinstance(rank, int) else None,
        node=node if isinstance(node, int) else None,
        unique_id=int(own[1], 16) if own else 0,
        address=address,
    )


def visible_ids(places: Sequence[Place], known: Sequence[Node]) -> list[str]:
    """Values that select each device of a host in `ROCR_VISIBLE_DEVICES`, in amdsmi's order.

    Args:
        places: positions of the devices.
        known: the kernel's nodes. Where they do not match the devices one to one, amdsmi's ranks and ids are used.
    """
    matched = [_node(one, known) for one in places]
    if known and None not in matched and len({node.number for node in matched if node is not None}) == len(places):
        order = {node.number: rank for rank, node in enumerate(known)}
        ranks = [order[node.number] for node in matched if node is not None]
        ids = [node.unique_id for node in matched if node is not None]
        counts = Counter(node.unique_id for node in known)
    else:
        ranks = [one.index if one.rank is None else one.rank for one in places]
        if len(set(ranks)) < len(ranks):
            ranks = [one.index for one in places]
        ids = [one.unique_id for one in places]
        counts = Counter(ids)
    return [f"GPU-{own:016x}" if own and counts[own] == 1 else str(rank) for own, rank in zip(ids, ranks, strict=True)]


def _node(one: Place, known: Sequence[Node]) -> Node | None:
    for node in known:
        if one.node == node.number:
            return node
    there, _, function = one.address.lower().partition(".")
    at = [node for node in known if node.address == there]
    if len(at) == 1:
        return at[0]
    # amdsmi gives the partition of a board as the function of its PCI address.
    return next((node for node in at if str(node.partition) == function), None)
