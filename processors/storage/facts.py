"""Write inventories, hosts' clocks and leases: tables of the present state, whose rows are replaced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas.clocks import REREAD_SECONDS
from ...schemas.requests import Lease, LeaseEvent, LeaseState
from ...schemas.speakers import Owners
from ...schemas.telemetry import DeviceInfo, Inventory
from .protocol import ArrowTable, HostClock
from .statements import put, registered

log = logging.getLogger("corral.storage")

_NAMELESS: Final = "-"
"""Stored for an agent without an id, since an empty id means that the host has left."""

_TIME: Final = pa.timestamp("us", "UTC")
_HOSTS: Final = pa.schema(
    [
        ("host", pa.string()),
        ("address", pa.string()),
        ("cpus", pa.int32()),
        ("memory_bytes", pa.int64()),
        ("driver", pa.string()),
        ("labels", pa.map_(pa.string(), pa.string())),
        ("agent", pa.string()),
        ("source", pa.string()),
        ("interval_seconds", pa.float64()),
        ("devices", pa.int32()),
        ("seen", _TIME),
    ]
)
_DEVICES: Final = pa.schema(
    [
        ("device", pa.string()),
        ("host", pa.string()),
        ("index", pa.int32()),
        ("name", pa.string()),
        ("vendor", pa.string()),
        ("architecture", pa.string()),
        ("compute_capability", pa.string()),
        ("sm_count", pa.int32()),
        ("memory_bytes", pa.int64()),
        ("memory_bandwidth_bytes_per_second", pa.int64()),
        ("sm_clock_max_megahertz", pa.int32()),
        ("power_limit_max_watts", pa.float32()),
        ("driver", pa.string()),
        ("pcie_address", pa.string()),
        ("mig_enabled", pa.bool_()),
        ("mig_parent", pa.string()),
        ("mig_profile", pa.string()),
        ("numa_node", pa.int32()),
        ("cpu_affinity", pa.list_(pa.int32())),
        ("serial", pa.string()),
        ("mig_instance", pa.int32()),
        ("seen", _TIME),
    ]
)
_CLOCKS: Final = pa.schema(
    [("host", pa.string()), ("offset_seconds", pa.float64()), ("since", _TIME), ("until", _TIME)]
)
_CONFLICTS: Final = pa.schema([("host", pa.string()), ("device", pa.string()), ("owner", pa.string()), ("seen", _TIME)])
_LINKS: Final = pa.schema(
    [
        ("host", pa.string()),
        ("device", pa.string()),
        ("other", pa.string()),
        ("link", pa.string()),
        ("nvlinks", pa.int32()),
    ]
)
_LEASE_EVENTS: Final = pa.schema(
    [
        ("time", _TIME),
        ("kind", pa.string()),
        ("lease_id", pa.string()),
        ("owner", pa.string()),
        ("name", pa.string()),
        ("state", pa.string()),
        ("planner", pa.string()),
        ("reason", pa.string()),
        ("expires_at", _TIME),
        ("devices", pa.list_(pa.string())),
    ]
)
_LEASES: Final = pa.schema(
    [
        ("lease_id", pa.string()),
        ("owner", pa.string()),
        ("name", pa.string()),
        ("state", pa.string()),
        ("request_id", pa.string()),
        ("policy", pa.string()),
        ("labels", pa.map_(pa.string(), pa.string())),
        ("ttl_seconds", pa.float64()),
        ("granted_at", _TIME),
        ("expires_at", _TIME),
        ("ended_at", _TIME),
        ("reason", pa.string()),
        ("devices", pa.list_(pa.string())),
        ("changed", _TIME),
    ]
)
_LEASE_DEVICES: Final = pa.schema(
    [
        ("lease_id", pa.string()),
        ("host", pa.string()),
        ("device", pa.string()),
        ("index", pa.int32()),
        ("model", pa.string()),
        ("memory_bytes", pa.int64()),
        ("share", pa.float64()),
        ("cpus", pa.float64()),
        ("host_memory_bytes", pa.int64()),
        ("score", pa.float64()),
    ]
)


def write_inventories(cursor: DuckDBPyConnection, inventories: Sequence[Inventory]) -> None:
    """Update hosts, devices and links. Of several inventories of a host the one that was stored last counts.

    Args:
        cursor: in a transaction.
        inventories: each with the time when the server stored it.
    """
    latest: dict[str, Inventory] = {}
    for inventory in inventories:
        known = latest.get(inventory.host.name)
        if known is None or inventory.time_ns >= known.time_ns:
            latest[inventory.host.name] = inventory
    if not latest:
        return
    times = pa.array([_seen(inventory) for inventory in latest.values()], type=_TIME)
    with registered(cursor, "seen", pa.table({"host": list(latest), "seen": times})):
        older = cursor.execute(
            "SELECT host FROM hosts JOIN seen USING (host) WHERE seen < last_seen "
            f"AND seen >= last_seen - INTERVAL {int(REREAD_SECONDS)} SECOND"
        ).fetchall()
    for (name,) in older:
        del latest[name]
    found = sorted(latest.values(), key=_seen)
    others = _others(cursor, found)
    # A device belongs to one host: if a later inventory may list it, it has moved to that host.
    devices = {d.uuid: (_seen(i), d) for i in found for d in i.devices if d.uuid not in others.get(i.host.name, ())}
    _write_conflicts(cursor, found, others)
    with (
        registered(cursor, "new_hosts", _hosts(found)),
        registered(cursor, "new_devices", _devices(list(devices.values()))),
        registered(cursor, "new_links", _links(found)),
    ):
        seen = "n.* EXCLUDE seen, coalesce(k.first_seen, n.seen) AS first_seen, n.seen AS last_seen"
        put(cursor, "hosts", f"SELECT {seen} FROM new_hosts n LEFT JOIN hosts k USING (host)", ["host"])
        put(
            cursor,
            "devices",
            f"SELECT {seen}, true AS present FROM new_devices n LEFT JOIN devices k USING (device) "
            "UNION ALL BY NAME SELECT * REPLACE (false AS present) FROM devices WHERE present "
            "AND host IN (SELECT host FROM new_hosts) AND device NOT IN (SELECT device FROM new_devices)",
            ["device"],
        )
        # Links hardly ever change, and there are many of them.
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE relinked AS "
            "WITH old AS (FROM links WHERE host IN (SELECT host FROM new_hosts)) "
            "SELECT DISTINCT host FROM ((FROM old EXCEPT FROM new_links) UNION ALL (FROM new_links EXCEPT FROM old))"
        )
        cursor.execute("DELETE FROM links WHERE host IN (SELECT host FROM relinked)")
        cursor.execute("INSERT INTO links FROM new_links WHERE host IN (SELECT host FROM relinked)")


def _others(cursor: DuckDBPyConnection, found: Sequence[Inventory]) -> dict[str, dict[str, str]]:
    """Devices that a host lists although another host owns them, each with its owner; by the host that lists them."""
    owners = Owners()
    hosts = pa.table({"host": pa.array([i.host.name for i in found], pa.string())})
    devices = pa.table({"device": pa.array({d.uuid for i in found for d in i.devices}, pa.string())})
    with registered(cursor, "telling", hosts), registered(cursor, "told", devices):
        rows = cursor.execute(
            "SELECT d.device, d.host, CASE WHEN h.agent = '' THEN '-inf'::DOUBLE "
            "ELSE epoch(coalesce(h.last_seen, d.last_seen)) END FROM devices d LEFT JOIN hosts h "
            "USING (host) WHERE d.present AND (d.host IN (SELECT host FROM telling) "
            "OR d.device IN (SELECT device FROM told))"
        ).fetchall()
    for device, host, heard in rows:
        owners.know(device, host, heard)
    claims: dict[str, dict[str, str]] = {}
    for inventory in found:
        name = inventory.host.name
        claims[name] = owners.claim(name, [d.uuid for d in inventory.devices], _seen(inventory) / 1e6)
        if inventory.leaving:
            owners.leave(name)
    return {host: others for host, others in claims.items() if others}


def _write_conflicts(cursor: DuckDBPyConnection, found: Sequence[Inventory], others: dict[str, dict[str, str]]) -> None:
    """Update the devices that two hosts list, and since when; rows are deleted when only one lists them."""
    rows = [
        (i.host.name, device, owner, _seen(i)) for i in found for device, owner in others.get(i.host.name, {}).items()
    ]
    hosts = pa.table({"host": pa.array([i.host.name for i in found], pa.string())})
    with registered(cursor, "telling", hosts), registered(cursor, "told", _table(_CONFLICTS, rows)):
        cursor.execute(
            "DELETE FROM device_conflicts c WHERE host IN (SELECT host FROM telling) AND NOT EXISTS (FROM told t "
            "WHERE t.host = c.host AND t.device = c.device AND t.owner = c.owner)"
        )
        if not rows:
            return
        new = cursor.execute("SELECT host, device, owner FROM told ANTI JOIN device_conflicts USING (host, device)")
        for host, device, owner in new.fetchall():
            log.warning("%s lists %s, which is a device of %s: it stays that one's", host, device, owner)
        put(
            cursor,
            "device_conflicts",
            "SELECT t.host, t.device, t.owner, coalesce(c.since, t.seen) AS since, t.seen AS last_seen "
            "FROM told t LEFT JOIN device_conflicts c USING (host, device)",
            ["host", "device"],
        )


def _seen(inventory: Inventory) -> int:
    return inventory.time_ns // 1000


def _hosts(inventories: Sequence[Inventory]) -> ArrowTable:
    rows = [
        (
            i.host.name, i.host.address, i.host.cpus, i.host.memory_bytes, i.host.driver, list(i.host.labels.items()),
            "" if i.leaving else i.agent or _NAMELESS, i.source, i.interval_seconds, len(i.devices), _seen(i),
        )
        for i in inventories
    ]  # fmt: skip
    return _table(_HOSTS, rows)


def _devices(devices: Sequence[tuple[int, DeviceInfo]]) -> ArrowTable:
    rows = [
        (
            d.uuid, d.host, d.index, d.name, d.vendor, d.architecture, d.compute_capability, d.sm_count, d.memory_bytes,
            d.memory_bandwidth_bytes_per_second, d.sm_clock_max_megahertz, d.power_limit_max_watts, d.driver,
            d.pcie_address, d.mig_enabled, d.mig_parent, d.mig_profile, d.numa_node, d.cpu_affinity, d.serial,
            d.mig_instance, seen,
        )
        for seen, d in devices
    ]  # fmt: skip
    return _table(_DEVICES, rows)


def _links(inventories: Sequence[Inventory]) -> ArrowTable:
    rows = [
        (
            inventory.host.name,
            inventory.devices[i].uuid,
            inventory.devices[j].uuid,
            link.value,
            inventory.nvlink_counts[i][j] if inventory.nvlink_counts else None,
        )
        for inventory in inventories
        for i, row in enumerate(inventory.links)
        for j, link in enumerate(row)
        if i != j
    ]
    return _table(_LINKS, rows)


def _table(shape: Any, rows: Sequence[tuple[Any, ...]]) -> ArrowTable:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(shape)
    arrays = [pa.array(column, type=field.type) for field, column in zip(shape, columns, strict=True)]
    return pa.Table.from_arrays(arrays, schema=shape)


def read_clocks(cursor: DuckDBPyConnection) -> list[HostClock]:
    """Read the hosts whose clock is off, or was."""
    rows = cursor.execute("SELECT host, offset_seconds, epoch_ns(since), epoch_ns(until) FROM store.clocks").fetchall()
    return [HostClock(*row) for row in rows]


def clocks_table(clocks: Sequence[HostClock]) -> ArrowTable:
    """Rows of `store.clocks`: the last state of each host."""
    last = {clock.host: clock for clock in clocks}.values()
    rows = [
        (clock.host, clock.offset_seconds, clock.since_ns // 1000, clock.until_ns and clock.until_ns // 1000)
        for clock in last
    ]
    return _table(_CLOCKS, rows)


def write_clocks(cursor: DuckDBPyConnection, clocks: Sequence[HostClock]) -> None:
    """Update the state of hosts' clocks."""
    if clocks:
        with registered(cursor, "new_clocks", clocks_table(clocks)):
            put(cursor, "store.clocks", "FROM new_clocks", ["host"])


def write_leases(cursor: DuckDBPyConnection, events: Sequence[LeaseEvent]) -> None:
    """Append lease events that are not stored yet, and update leases. An ended lease stays ended.

    One statement per table handles the whole batch: one per event would scan all earlier events each time.
    """
    if not events:
        return
    told = {(event.lease.lease_id, event.kind, event.time): event for event in reversed(events)}
    folded: dict[str, tuple[LeaseEvent, LeaseEvent]] = {}
    grants: dict[str, Lease] = {}
    for event in events:
        lease = event.lease
        first, last = folded.get(lease.lease_id, (event, event))
        folded[lease.lease_id] = (first, event if _overrides(event, last) else last)
        if lease.grants:
            grants.setdefault(lease.lease_id, lease)
    with (
        registered(cursor, "new_events", _lease_events(list(reversed(told.values())))),
        registered(cursor, "new_leases", _leases(list(folded.values()))),
        registered(cursor, "new_grants", _lease_devices(list(grants.values()))),
    ):
        times = [event.time for event in events]
        cursor.execute(
            # Only an event of the same time can be the same one: row groups of other times are skipped.
            "INSERT INTO lease_events SELECT * FROM new_events n WHERE NOT EXISTS (FROM lease_events e "
            "WHERE e.time >= ? AND e.time <= ? AND e.time = n.time AND e.lease_id = n.lease_id AND e.kind = n.kind)",
            [min(times), max(times)],
        )
        cursor.execute(
            "INSERT INTO lease_devices SELECT * FROM new_grants WHERE lease_id NOT IN "
            "(SELECT lease_id FROM lease_devices WHERE lease_id IN (SELECT lease_id FROM new_grants))"
        )
        put(
            cursor,
            "leases",
            "SELECT n.* FROM new_leases n ANTI JOIN leases USING (lease_id) UNION ALL BY NAME "
            "SELECT l.* REPLACE (n.state AS state, n.ttl_seconds AS ttl_seconds, n.expires_at AS expires_at, "
            "n.ended_at AS ended_at, n.reason AS reason, n.changed AS changed) "
            "FROM leases l JOIN new_leases n ON n.lease_id = l.lease_id "
            "WHERE l.state = 'active' AND (n.changed >= l.changed OR n.state <> 'active')",
            ["lease_id"],
        )


def _overrides(event: LeaseEvent, last: LeaseEvent) -> bool:
    """True if the lease's state in an event replaces that in an earlier one, by the same rule as for stored leases."""
    if last.lease.state is not LeaseState.ACTIVE:
        return False
    return event.lease.state is not LeaseState.ACTIVE or event.time >= last.time


def _lease_events(events: Sequence[LeaseEvent]) -> ArrowTable:
    rows = [
        (
            event.time, event.kind.value, event.lease.lease_id, event.lease.owner, event.lease.name,
            event.lease.state.value, event.planner, event.lease.reason, event.lease.expires_at, _uuids(event.lease),
        )
        for event in events
    ]  # fmt: skip
    return _table(_LEASE_EVENTS, rows)


def _leases(folded: Sequence[tuple[LeaseEvent, LeaseEvent]]) -> ArrowTable:
    """Rows of leases: fixed fields from the first event that names the lease, changing ones from the last."""
    rows = [
        (
            was.lease_id, was.owner, was.name, now.lease.state.value, was.request_id, was.policy,
            list(was.labels.items()), now.lease.ttl_seconds, was.granted_at, now.lease.expires_at, now.lease.ended_at,
            now.lease.reason, _uuids(was), now.time,
        )
        for was, now in ((first.lease, last) for first, last in folded)
    ]  # fmt: skip
    return _table(_LEASES, rows)


def _lease_devices(leases: Sequence[Lease]) -> ArrowTable:
    rows = [
        (
            lease.lease_id, grant.host, grant.device or None, grant.index, grant.model, grant.memory_bytes,
            grant.share, grant.cpus, grant.host_memory_bytes, grant.score,
        )
        for lease in leases
        for grant in lease.grants
    ]  # fmt: skip
    return _table(_LEASE_DEVICES, rows)


def _uuids(lease: Lease) -> list[str]:
    return [grant.device for grant in lease.grants if grant.device]
