"""Topology of a host's devices, and state, traffic and errors of each NVLink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from ...schemas.telemetry import Link
from .fields import FieldBatch, Key, survey
from .inventory import Found
from .library import SUCCESS, UNSUPPORTED, Handle, Library, field_text

_ANCESTORS: Final = {
    0: Link.PCIE_SWITCH,
    10: Link.PCIE_SWITCH,
    20: Link.PCIE_BRIDGES,
    30: Link.HOST_BRIDGE,
    40: Link.NUMA,
    50: Link.SYSTEM,
}
_SWITCH: Final = 2

DETAILS: Final = {
    "rx_bytes": (("NVLINK_THROUGHPUT_DATA_RX", 1024), ("NVLINK_COUNT_RCV_BYTES", 1)),
    "tx_bytes": (("NVLINK_THROUGHPUT_DATA_TX", 1024), ("NVLINK_COUNT_XMIT_BYTES", 1)),
    "speed_megabytes_per_second": (("NVLINK_GET_SPEED", 1),),
    "replay_errors": (("NVLINK_ERROR_DL_REPLAY", 1),),
    "recovery_errors": (("NVLINK_ERROR_DL_RECOVERY", 1), ("NVLINK_COUNT_LINK_RECOVERY_EVENTS", 1)),
    "crc_errors": (("NVLINK_ERROR_DL_CRC", 1),),
    "receive_errors": (("NVLINK_COUNT_RCV_ERRORS", 1),),
}
"""Fields for each number of a link in the event `nvlink`, each with the factor to our unit. The first that works is
read; the second are those of Blackwell and later."""
SUMS: Final = {
    "rx_bytes": "nvlink_rx_bytes",
    "tx_bytes": "nvlink_tx_bytes",
    "replay_errors": "nvlink_replay_errors_count",
    "recovery_errors": "nvlink_recovery_errors_count",
    "crc_errors": "nvlink_crc_flit_errors_count",
}
"""Metrics that are summed over the links where the driver gives no total."""


class LinkState(Struct, frozen=True, kw_only=True):
    """One NVLink of a device.

    Attributes:
        number: the driver's number.
        active: True if it is up.
        remote: PCI address of the device at its other end; empty if unknown.
        switch: True if that is an NVSwitch.
    """

    number: int
    active: bool
    remote: str = ""
    switch: bool = False


def nvlinks(library: Library, handle: Handle, before: Sequence[LinkState] = ()) -> list[LinkState]:
    """List the NVLinks of a device; empty where it has none.

    Args:
        library: NVML.
        handle: handle of the device.
        before: their last state; the other end of a link that stayed up is not queried again.
    """
    known = {link.number: link for link in before if link.active}
    found: list[LinkState] = []
    for number in range(library.constant("NVML_NVLINK_MAX_LINKS") or 0):
        state = library.ask(None, "nvmlDeviceGetNvLinkState", handle, number)
        if state is None:
            break
        if not state:
            found.append(LinkState(number=number, active=False))
            continue
        if number in known:
            found.append(known[number])
            continue
        remote = library.ask(None, "nvmlDeviceGetNvLinkRemotePciInfo", handle, number)
        kind = library.ask(None, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, number)
        address = "" if remote is None else field_text(remote, "busId")
        found.append(LinkState(number=number, active=True, remote=address, switch=kind == _SWITCH))
    return found


def topology(
    library: Library, devices: list[Found], links: dict[str, list[LinkState]]
) -> tuple[list[list[Link]], list[list[int]]]:
    """Links between devices and the number of NVLinks between each two, D×D as in `Inventory`.

    Two devices on one NVSwitch fabric are joined by as many links as the one with fewer links has to it. MIG instances
    have no peer access: they are as near as their PCIe path.
    """
    count = len(devices)
    kinds = [[Link.UNKNOWN] * count for _ in range(count)]
    joined = [[0] * count for _ in range(count)]
    for i, one in enumerate(devices):
        kinds[i][i] = Link.SAME
        for j in range(i):
            other = devices[j]
            number = _joined(one, other, links)
            kind = Link.NVLINK if number else _ancestor(library, one, other)
            kinds[i][j] = kinds[j][i] = kind
            joined[i][j] = joined[j][i] = number
    return kinds, joined


def _joined(one: Found, other: Found, links: dict[str, list[LinkState]]) -> int:
    if one.parent is not None or other.parent is not None:
        return 0
    ours, theirs = links.get(one.info.uuid, []), links.get(other.info.uuid, [])
    direct = sum(link.active and _same(link.remote, other.info.pcie_address) for link in ours)
    back = sum(link.active and _same(link.remote, one.info.pcie_address) for link in theirs)
    if direct or back:
        return max(direct, back)
    return min(sum(link.active and link.switch for link in ours), sum(link.active and link.switch for link in theirs))


def _same(one: str, other: str) -> bool:
    """True if two PCI addresses are equal: NVML writes a domain with four or with eight digits."""
    return bool(one) and one.lower().lstrip("0") == other.lower().lstrip("0")


def _ancestor(library: Library, one: Found, other: Found) -> Link:
    first, second = one.parent or one.handle, other.parent or other.handle
    if one.info.pcie_address and one.info.pcie_address == other.info.pcie_address:
        return Link.PCIE_SWITCH
    return _ANCESTORS.get(library.ask(None, "nvmlDeviceGetTopologyCommonAncestor", first, second), Link.UNKNOWN)


class LinkDetails:
    """Reads traffic, speed and errors of each NVLink of a device."""

    def __init__(self, library: Library, handle: Handle, links: list[LinkState]) -> None:
        wanted: list[tuple[int, str, list[tuple[Key, int]]]] = []
        for link in links:
            for name, ways in DETAILS.items():
                numbers = [(library.constant(f"NVML_FI_DEV_{field}"), scale) for field, scale in ways]
                wanted.append((link.number, name, [((n, link.number), scale) for n, scale in numbers if n is not None]))
        known = survey(library, handle, list({key: None for _, _, ways in wanted for key, _ in ways}))
        keys: list[Key] = []
        self._entries: list[tuple[int, str, int]] = []
        for number, name, ways in wanted:
            for key, scale in ways:
                if known[key][0] not in UNSUPPORTED:
                    keys.append(key)
                    self._entries.append((number, name, scale))
                    break
        self._batch = FieldBatch(library, handle, keys)

    def read(self) -> dict[tuple[int, str], int]:
        """Read the numbers, by link and name; those that can't be read are left out."""
        if self._batch.read() != SUCCESS:
            return {}
        found: dict[tuple[int, str], int] = {}
        for at, (number, name, scale) in enumerate(self._entries):
            value = self._batch.value(at) if self._batch.code(at) == SUCCESS else None
            if value is not None:
                found[number, name] = int(value * scale)
        return found


def summary(links: list[LinkState], details: dict[tuple[int, str], int]) -> dict[str, Any]:
    """Data of an event about all links: comma-separated lists in the order of `link`.

    The lists are `link`, `state`, `remote` and those of `DETAILS`. A number that a link does not give is empty. In SQL:
    `string_split(data->>'rx_bytes', ',')::BIGINT[]`.
    """
    found: dict[str, Any] = {
        "link": ",".join(str(link.number) for link in links),
        "state": ",".join("active" if link.active else "inactive" for link in links),
        "remote": ",".join(link.remote for link in links),
    }
    for name in DETAILS:
        if any(kind == name for _, kind in details):
            found[name] = ",".join(str(details.get((link.number, name), "")) for link in links)
    return found
