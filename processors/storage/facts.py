"""Inventories and leases: the tables that hold the present state are changed, not only appended to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from duckdb import DuckDBPyConnection

from ...schemas.requests import LeaseEvent
from ...schemas.telemetry import Inventory


def write_inventories(cursor: DuckDBPyConnection, inventories: Sequence[Inventory]) -> None:
    """Bring hosts, devices and links up to date. Of several inventories of a host the one read last counts."""
    latest: dict[str, Inventory] = {}
    for inventory in inventories:
        known = latest.get(inventory.host.name)
        if known is None or inventory.time_ns >= known.time_ns:
            latest[inventory.host.name] = inventory
    for name, inventory in latest.items():
        seen = datetime.fromtimestamp(inventory.time_ns // 1000 / 1e6, UTC)
        newer = cursor.execute("SELECT 1 FROM hosts WHERE host = ? AND last_seen > ?", [name, seen]).fetchone()
        if newer is not None:
            continue
        host = inventory.host
        cursor.execute(
            "INSERT INTO hosts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "address = excluded.address, cpus = excluded.cpus, memory_bytes = excluded.memory_bytes, "
            "driver = excluded.driver, labels = excluded.labels, agent = excluded.agent, source = excluded.source, "
            "interval_seconds = excluded.interval_seconds, devices = excluded.devices, last_seen = excluded.last_seen",
            [
                name, host.address, host.cpus, host.memory_bytes, host.driver,
                {"key": list(host.labels), "value": list(host.labels.values())},
                inventory.agent, inventory.source, inventory.interval_seconds, len(inventory.devices), seen, seen,
            ],
        )  # fmt: skip
        cursor.execute("UPDATE devices SET present = false WHERE host = ? AND present", [name])
        for device in inventory.devices:
            cursor.execute(
                "INSERT INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, true) "
                "ON CONFLICT DO UPDATE SET host = excluded.host, index = excluded.index, name = excluded.name, "
                "vendor = excluded.vendor, architecture = excluded.architecture, "
                "compute_capability = excluded.compute_capability, sm_count = excluded.sm_count, "
                "memory_bytes = excluded.memory_bytes, "
                "memory_bandwidth_bytes_per_second = excluded.memory_bandwidth_bytes_per_second, "
                "sm_clock_max_megahertz = excluded.sm_clock_max_megahertz, "
                "power_limit_max_watts = excluded.power_limit_max_watts, driver = excluded.driver, "
                "pcie_address = excluded.pcie_address, mig_enabled = excluded.mig_enabled, "
                "mig_parent = excluded.mig_parent, mig_profile = excluded.mig_profile, "
                "numa_node = excluded.numa_node, cpu_affinity = excluded.cpu_affinity, serial = excluded.serial, "
                "last_seen = excluded.last_seen, present = true",
                [
                    device.uuid, device.host, device.index, device.name, device.vendor, device.architecture,
                    device.compute_capability, device.sm_count, device.memory_bytes,
                    device.memory_bandwidth_bytes_per_second, device.sm_clock_max_megahertz,
                    device.power_limit_max_watts, device.driver, device.pcie_address, device.mig_enabled,
                    device.mig_parent, device.mig_profile, device.numa_node, device.cpu_affinity, device.serial,
                    seen, seen,
                ],
            )  # fmt: skip
        _write_links(cursor, inventory)


def _write_links(cursor: DuckDBPyConnection, inventory: Inventory) -> None:
    name, devices = inventory.host.name, [device.uuid for device in inventory.devices]
    rows = [
        [name, devices[i], devices[j], link.value, inventory.nvlink_counts[i][j] if inventory.nvlink_counts else None]
        for i, row in enumerate(inventory.links)
        for j, link in enumerate(row)
        if i != j
    ]
    cursor.execute("DELETE FROM links WHERE host = ?", [name])
    if rows:
        cursor.executemany("INSERT INTO links VALUES (?, ?, ?, ?, ?)", rows)


def write_leases(cursor: DuckDBPyConnection, events: Sequence[LeaseEvent]) -> None:
    """Append lease events that are not there yet, and bring leases up to date. An ended lease stays ended."""
    for event in events:
        lease = event.lease
        devices = [grant.device for grant in lease.grants if grant.device]
        cursor.execute(
            "INSERT INTO lease_events SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ? WHERE NOT EXISTS "
            "(FROM lease_events WHERE lease_id = ? AND kind = ? AND time = ?)",
            [
                event.time, event.kind.value, lease.lease_id, lease.owner, lease.name, lease.state.value, event.planner,
                lease.reason, lease.expires_at, devices, lease.lease_id, event.kind.value, event.time,
            ],
        )  # fmt: skip
        cursor.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
            "state = excluded.state, ttl_seconds = excluded.ttl_seconds, expires_at = excluded.expires_at, "
            "ended_at = excluded.ended_at, reason = excluded.reason, changed = excluded.changed "
            "WHERE (leases.state = 'active' AND excluded.changed >= leases.changed) "
            "OR (leases.state = 'active' AND excluded.state <> 'active')",
            [
                lease.lease_id, lease.owner, lease.name, lease.state.value, lease.request_id, lease.policy,
                {"key": list(lease.labels), "value": list(lease.labels.values())}, lease.ttl_seconds,
                lease.granted_at, lease.expires_at, lease.ended_at, lease.reason, devices, event.time,
            ],
        )  # fmt: skip
        known = cursor.execute("SELECT 1 FROM lease_devices WHERE lease_id = ? LIMIT 1", [lease.lease_id]).fetchone()
        if known is None and lease.grants:
            cursor.executemany(
                "INSERT INTO lease_devices VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    [
                        lease.lease_id, grant.host, grant.device or None, grant.index, grant.model,
                        grant.memory_bytes, grant.share, grant.cpus, grant.host_memory_bytes, grant.score,
                    ]
                    for grant in lease.grants
                ],
            )  # fmt: skip
