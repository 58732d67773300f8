"""A host in the history: versions, collector, number of leases, and links between its devices."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from ..client import Client
from .history import Window, instant, text

MOST_DEVICES: Final = 32
"""Maximum number of devices whose links are shown."""


class Links(Struct, frozen=True, kw_only=True):
    """Links between the devices of a host.

    Attributes:
        indexes: indexes of the devices, ascending.
        kinds: abbreviation of the link, by the indexes of two devices.
    """

    indexes: list[int]
    kinds: dict[tuple[int, int], str]


async def record(client: Client, host: str, window: Window) -> dict[str, Any]:
    """Query what is known of a host, as one row; empty if it was never seen.

    Its columns are those of `hosts`, those of its collector's last report as `agent_…`, `firmware` (versions in words),
    and in the window `leases` and `owners`, which are the numbers of those who held devices.

    Raises:
        CorralError: the history doesn't answer, or not in time.
    """
    name = text(host)
    start, end = (instant(at) for at in window.bounds)
    report = ", ".join(f"a.{column} AS agent_{column}" for column in _OF_AGENT)
    found = await client.query(
        f"WITH held AS (SELECT count(DISTINCT lease_id) AS leases, count(DISTINCT owner) AS owners FROM lease_spans "
        f"WHERE host = {name} AND started < {end} AND ended > {start}), report AS ("
        f"FROM agents WHERE host = {name} AND time > now() - INTERVAL 1 DAY ORDER BY time DESC LIMIT 1), versions AS ("
        "SELECT string_agg(DISTINCT replace(fact, 'firmware ', '') || ' ' || value, ', ') AS firmware FROM host_facts "
        f"WHERE host = {name} AND fact LIKE 'firmware %' AND valid_to IS NULL) "
        f"SELECT h.* EXCLUDE (fingerprint), {report}, firmware, leases, owners "
        f"FROM hosts h CROSS JOIN held CROSS JOIN versions LEFT JOIN report a USING (host) WHERE host = {name}",
        limit=1,
        timeout=20,
    )
    rows = found.dicts()
    return rows[0] if rows else {}


_OF_AGENT: Final = ("corral_version", "source", "read_errors", "dropped_samples")


async def links(client: Client, host: str) -> Links:
    """Query the links between the devices that a host has now.

    Raises:
        CorralError: the history doesn't answer, or not in time.
    """
    found = await client.query(
        "SELECT a.index, b.index, l.link, l.nvlinks FROM links l JOIN devices a ON a.device = l.device AND a.present "
        f"JOIN devices b ON b.device = l.other AND b.present WHERE l.host = {text(host)} "
        "AND a.mig_parent IS NULL AND b.mig_parent IS NULL",
        limit=MOST_DEVICES**2 * 4,
        timeout=20,
    )
    kinds = {(row[0], row[1]): _short(row[2], row[3]) for row in found.rows}
    return Links(indexes=sorted({index for index, _ in kinds})[:MOST_DEVICES], kinds=kinds)


_SHORT: Final = {
    "nvlink": "NV",
    "pcie_switch": "PIX",
    "pcie_bridges": "PXB",
    "host_bridge": "PHB",
    "numa": "NODE",
    "system": "SYS",
}
"""Kinds of links as `nvidia-smi topo --matrix` abbreviates them."""


def _short(kind: str, nvlinks: int | None) -> str:
    short = _SHORT.get(kind, "?")
    return f"{short}{nvlinks}" if kind == "nvlink" and nvlinks else short
