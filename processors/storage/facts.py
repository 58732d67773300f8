"""Inventories and leases: the tables that hold the present state are changed, not only appended to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas.requests import Lease, LeaseEvent, LeaseState
from ...schemas.telemetry import DeviceInfo, Inventory
from .interface import ArrowTable
from .statements import registered

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
    """Bring hosts, devices and links up to date. Of several inventories of a host the one read last counts."""
    latest: dict[str, Inventory] = {}
    for inventory in inventories:
        known = latest.get(inventory.host.name)
        if known is None or inventory.time_ns >= known.time_ns:
            latest[inventory.host.name] = inventory
    if not latest:
        return
    times = pa.array([_seen(inventory) for inventory in latest.values()], type=_TIME)
    with registered(cursor, "seen", pa.table({"host": list(latest), "seen": times})):
        older = cursor.execute("SELECT host FROM hosts JOIN seen USING (host) WHERE last_seen > seen").fetchall()
    for (name,) in older:
        del latest[name]
    found = list(latest.values())
    # A device is on one host; where two inventories name it, the later one is right.
    devices = {d.uuid: (_seen(i), d) for i in sorted(found, key=_seen) for d in i.devices}
    with (
        registered(cursor, "new_hosts", _hosts(found)),
        registered(cursor, "new_devices", _devices(list(devices.values()))),
        registered(cursor, "new_links", _links(found)),
    ):
        cursor.execute(
            "INSERT INTO hosts BY NAME SELECT * EXCLUDE seen, seen AS first_seen, seen AS last_seen FROM new_hosts "
            f"ON CONFLICT DO UPDATE SET {_updates(_HOSTS)}"
        )
        cursor.execute(
            "UPDATE devices SET present = false WHERE present AND host IN (SELECT host FROM new_hosts) "
            "AND device NOT IN (SELECT device FROM new_devices)"
        )
        cursor.execute(
            "INSERT INTO devices BY NAME "
            "SELECT * EXCLUDE seen, seen AS first_seen, seen AS last_seen, true AS present FROM new_devices "
            f"ON CONFLICT DO UPDATE SET {_updates(_DEVICES)}, present = true"
        )
        # Links hardly ever change, and there are many of them.
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE relinked AS "
            "WITH old AS (FROM links WHERE host IN (SELECT host FROM new_hosts)) "
            "SELECT DISTINCT host FROM ((FROM old EXCEPT FROM new_links) UNION ALL (FROM new_links EXCEPT FROM old))"
        )
        cursor.execute("DELETE FROM links WHERE host IN (SELECT host FROM relinked)")
        cursor.execute("INSERT INTO links FROM new_links WHERE host IN (SELECT host FROM relinked)")


def _seen(inventory: Inventory) -> int:
    return inventory.time_ns // 1000


def _updates(shape: Any) -> str:
    """Everything but the key and `first_seen` takes the new value."""
    columns = [name for name in shape.names[1:] if name != "seen"]
    return ", ".join(f"{name} = excluded.{name}" for name in [*columns, "last_seen"])


def _hosts(inventories: Sequence[Inventory]) -> ArrowTable:
    rows = [
        (
            i.host.name, i.host.address, i.host.cpus, i.host.memory_bytes, i.host.driver, list(i.host.labels.items()),
            i.agent, i.source, i.interval_seconds, len(i.devices), _seen(i),
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


def write_leases(cursor: DuckDBPyConnection, events: Sequence[LeaseEvent]) -> None:
    """Append lease events that are not there yet, and bring leases up to date. An ended lease stays ended.

    A statement a table for the whole batch: one for each event would look through all earlier events each time.
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
            # Only what was told in the same time can be the same: row groups of other times are not looked at.
            "INSERT INTO lease_events SELECT * FROM new_events n WHERE NOT EXISTS (FROM lease_events e "
            "WHERE e.time >= ? AND e.time <= ? AND e.time = n.time AND e.lease_id = n.lease_id AND e.kind = n.kind)",
            [min(times), max(times)],
        )
        cursor.execute(
            "INSERT INTO lease_devices SELECT * FROM new_grants WHERE lease_id NOT IN "
            "(SELECT lease_id FROM lease_devices WHERE lease_id IN (SELECT lease_id FROM new_grants))"
        )
        cursor.execute(
            "INSERT INTO leases SELECT * FROM new_leases ON CONFLICT DO UPDATE SET "
            "state = excluded.state, ttl_seconds = excluded.ttl_seconds, expires_at = excluded.expires_at, "
            "ended_at = excluded.ended_at, reason = excluded.reason, changed = excluded.changed "
            "WHERE leases.state = 'active' AND (excluded.changed >= leases.changed OR excluded.state <> 'active')"
        )


def _overrides(event: LeaseEvent, last: LeaseEvent) -> bool:
    """Whether what an event says of its lease goes before what was known: the same rule as of the stored ones."""
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
    """What leases are, from the first event that names them, and how they stand, from the last."""
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
