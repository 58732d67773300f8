"""What the history knows of a host: its row, devices, links, collector, and how long its leases held devices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from ..client import Client
from .history import text


class HostRecord(Struct, frozen=True, kw_only=True):
    """Records of a host; each may be missing.

    Attributes:
        host: row of `hosts`; empty if the host was never seen.
        devices: rows of `devices` that it has or had last, by index.
        links: `link` and `nvlinks` by the uuids of two devices.
        agent: newest row of `agents`; empty without one within 30 days.
        firmware: version of each part of the firmware by uuid of the device.
    """

    host: dict[str, Any]
    devices: list[dict[str, Any]]
    links: dict[tuple[str, str], str]
    agent: dict[str, Any]
    firmware: dict[str, str]


async def record(client: Client, host: str) -> HostRecord:
    """Query the records of a host.

    Raises:
        CorralError: the history doesn't answer, or not in time.
    """
    name = text(host)
    questions = (
        f"SELECT * EXCLUDE (fingerprint) FROM hosts WHERE host = {name}",
        f"SELECT device, index, name, driver, memory_bytes, pcie_address, numa_node, serial, present, last_seen "
        f"FROM devices WHERE host = {name} ORDER BY present DESC, index, device",
        f"SELECT device, other, link, nvlinks FROM links WHERE host = {name}",
        f"SELECT source, corral_version, ticks, late_ticks, read_errors, dropped_samples, buffered_bytes, time "
        f"FROM agents WHERE host = {name} ORDER BY time DESC LIMIT 1",
        "SELECT device, string_agg(replace(fact, 'firmware ', '') || ' ' || value, ', ' ORDER BY fact) AS firmware "
        f"FROM host_facts WHERE host = {name} AND fact LIKE 'firmware %' AND valid_to IS NULL GROUP BY device",
    )
    answers = await asyncio.gather(*(client.query(sql, limit=5000, timeout=20) for sql in questions))
    hosts, devices, links, agents, firmware = (answer.dicts() for answer in answers)
    return HostRecord(
        host=_first(hosts),
        devices=devices,
        links={(row["device"], row["other"]): _link(row["link"], row["nvlinks"]) for row in links},
        agent=_first(agents),
        firmware={row["device"]: row["firmware"] for row in firmware},
    )


def _first(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return rows[0] if rows else {}


_SHORT = {
    "nvlink": "NV",
    "pcie_switch": "PIX",
    "pcie_bridges": "PXB",
    "host_bridge": "PHB",
    "numa": "NODE",
    "system": "SYS",
    "same": "X",
}
"""Kinds of links as `nvidia-smi topo --matrix` abbreviates them."""


def _link(kind: str, nvlinks: int | None) -> str:
    short = _SHORT.get(kind, "?")
    return f"{short}{nvlinks}" if kind == "nvlink" and nvlinks else short
