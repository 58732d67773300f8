"""Facts about hosts over time: drivers, firmware, devices and links, each with the times between which it held.

A host's inventory comes every minute and hardly ever says anything new. So the column `fingerprint` of `hosts` is that
of the facts as they were stored last, and facts are compared with the stored ones only where it differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas.telemetry import DeviceInfo, Inventory, Link
from .rows import arrow_schema, table_of
from .statements import registered

Fact = tuple[str, str | None, str, str]
"""Host, uuid of the device or None for the host itself, name of the fact, and its value."""

_SCHEMA: Final = arrow_schema("host_facts", without=("valid_from", "valid_to"), seen=True)


def facts_of(inventory: Inventory, owned: Mapping[str, DeviceInfo]) -> list[Fact]:
    """Facts that an inventory states. What is unknown is no fact.

    Args:
        inventory: of a host.
        owned: devices that are this host's, by uuid; those that it lists although they are another's are left out.
    """
    host = inventory.host
    found: dict[tuple[str | None, str], str] = {
        (None, "address"): host.address,
        (None, "driver"): host.driver,
        (None, "kernel"): host.kernel,
        (None, "cpus"): _number(host.cpus),
        (None, "memory_bytes"): _number(host.memory_bytes),
        (None, "source"): inventory.source,
        (None, "devices"): str(len(owned)),
        **{(None, f"label {name}"): value for name, value in host.labels.items()},
    }
    for device in owned.values():
        mig = device.mig_profile or ("on" if device.mig_enabled else "")
        for name, value in (
            ("index", str(device.index)),
            ("model", device.name),
            ("driver", device.driver if device.driver != host.driver else ""),
            ("memory_bytes", _number(device.memory_bytes)),
            ("power_limit_max_watts", _number(round(device.power_limit_max_watts))),
            ("sm_clock_max_megahertz", _number(device.sm_clock_max_megahertz)),
            ("pcie_address", device.pcie_address),
            ("numa_node", "" if device.numa_node is None else str(device.numa_node)),
            ("serial", device.serial),
            ("mig", mig),
            *((f"firmware {part}", version) for part, version in device.firmware.items()),
        ):
            found[device.uuid, name] = value
    uuids = [device.uuid for device in inventory.devices]
    for i, kinds in enumerate(inventory.links):
        for j in range(i + 1, len(kinds)):
            if uuids[i] in owned and uuids[j] in owned and kinds[j] is not Link.UNKNOWN:
                count = inventory.nvlink_counts[i][j] if inventory.nvlink_counts else 0
                words = str(kinds[j]).replace("_", " ")
                found[uuids[i], f"link to {uuids[j]}"] = f"{words} × {count}" if count else words
    return [(host.name, device, name, value) for (device, name), value in found.items() if value]


def _number(value: float) -> str:
    return str(value) if value else ""


def fingerprint(facts: Sequence[Fact]) -> str:
    """Fingerprint of the facts of a host."""
    return hashlib.blake2b(msgspec.msgpack.encode(sorted(facts, key=repr)), digest_size=16).hexdigest()


def write_host_facts(cursor: DuckDBPyConnection, facts: Mapping[str, Sequence[Fact]], seen: Mapping[str, int]) -> None:
    """Store what has changed. Call it in a transaction, before the fingerprints in `hosts` are replaced.

    Args:
        cursor: in a transaction.
        facts: all facts of each host.
        seen: time of each host's inventory, in microseconds since the epoch.
    """
    if not facts:
        return
    prints = pa.table({"host": list(facts), "fingerprint": [fingerprint(found) for found in facts.values()]})
    with registered(cursor, "new_prints", prints):
        changed = cursor.execute(
            "SELECT n.host FROM new_prints n LEFT JOIN hosts h USING (host) "
            "WHERE h.fingerprint IS DISTINCT FROM n.fingerprint"
        ).fetchall()
    if not changed:
        return
    rows = [(*fact, seen[host]) for (host,) in changed for fact in facts[host]]
    times = pa.table({"host": [host for (host,) in changed], "seen": [seen[host] for (host,) in changed]})
    same = "o.host = n.host AND o.device IS NOT DISTINCT FROM n.device AND o.fact = n.fact"
    with registered(cursor, "new_facts", table_of(_SCHEMA, rows)), registered(cursor, "changed_hosts", times):
        # A device that is another host's now is no longer the one's that had it.
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE closing AS "
            "SELECT o.* REPLACE (greatest(o.valid_from, make_timestamptz(coalesce(c.seen, d.seen))) AS valid_to) "
            "FROM host_facts o LEFT JOIN changed_hosts c USING (host) LEFT JOIN (SELECT device, max(epoch_us(seen)) "
            "AS seen FROM new_facts WHERE device IS NOT NULL GROUP BY device) d USING (device) "
            "WHERE o.valid_to IS NULL AND coalesce(c.seen, d.seen) IS NOT NULL "
            f"AND NOT EXISTS (FROM new_facts n WHERE {same} AND o.value = n.value)"
        )
        cursor.execute(
            f"DELETE FROM host_facts o USING closing n WHERE {same} AND o.value = n.value "
            "AND o.valid_from = n.valid_from AND o.valid_to IS NULL"
        )
        cursor.execute("INSERT INTO host_facts BY NAME FROM temp.main.closing")
        cursor.execute(
            "INSERT INTO host_facts BY NAME SELECT n.* EXCLUDE seen, n.seen AS valid_from FROM new_facts n "
            f"WHERE NOT EXISTS (FROM host_facts o WHERE o.valid_to IS NULL AND {same} AND o.value = n.value)"
        )
        cursor.execute("DROP TABLE temp.main.closing")
