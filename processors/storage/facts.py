"""Write inventories, hosts' clocks and leases: tables whose rows are replaced, mostly of the present state."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
from duckdb import DuckDBPyConnection
from msgspec.structs import asdict

from ...schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState, Preemption
from ...schemas.speakers import Owners
from ...schemas.telemetry import DeviceInfo, HostInfo, Inventory
from ...schemas.values.clocks import REREAD_SECONDS
from .host_facts import facts_of, fingerprint, write_host_facts
from .protocol import ArrowTable, HostClock
from .rows import TIME, Columns, arrow_schema, table_of
from .statements import put, registered

log = logging.getLogger("corral.storage")

_NAMELESS: Final = "-"
"""Stored for an agent without an id, since an empty id means that the host has left."""

_COMPUTED: Final = ("first_seen", "last_seen", "present")
"""Columns that statements compute from the time `seen`."""

_HOSTS: Final = Columns(
    arrow_schema("hosts", without=_COMPUTED, seen=True),
    HostInfo,
    ("host", "labels", "agent", "source", "interval_seconds", "devices", "seen", "fingerprint"),
)
_DEVICES: Final = Columns(arrow_schema("devices", without=_COMPUTED, seen=True), DeviceInfo, ("device", "seen"))
_NOTICE: Final = tuple(f"preemption_{name}" for name in Preemption.__struct_fields__)
"""Columns of the notice of a preemption in events."""
_LEASE_EVENTS: Final = Columns(
    arrow_schema("lease_events"), Lease, ("time", "kind", "state", "planner", "devices", *_NOTICE)
)
_LEASES: Final = Columns(
    arrow_schema("leases"),
    Lease,
    (
        *("state", "labels", "ttl_seconds", "expires_at", "ended_at", "reason", "devices", "changed"),
        *("saved_at", "preemption_notified_at", "group_name", "gpus_min", "gpus_max"),
    ),
)
_LEASE_DEVICES: Final = Columns(arrow_schema("lease_devices"), Grant, ("lease_id", "device", "until"))
_LINKS: Final = arrow_schema("links")
_CLOCKS: Final = arrow_schema("store.clocks")
_CONFLICTS: Final = pa.schema([("host", pa.string()), ("device", pa.string()), ("owner", pa.string()), ("seen", TIME)])


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
    times = pa.array([_seen(inventory) for inventory in latest.values()], type=TIME)
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
    # A collector that stops takes nothing from its host.
    facts = {
        i.host.name: facts_of(i, {d.uuid: d for d in i.devices if devices.get(d.uuid, (0, None))[1] is d})
        for i in found
        if not i.leaving
    }
    write_host_facts(cursor, facts, {i.host.name: _seen(i) for i in found})
    with (
        registered(cursor, "new_hosts", _hosts(found, {host: fingerprint(told) for host, told in facts.items()})),
        registered(cursor, "new_devices", _devices(list(devices.values()))),
        registered(cursor, "new_links", _links(found)),
    ):
        seen = "coalesce(k.first_seen, n.seen) AS first_seen, n.seen AS last_seen"
        put(
            cursor,
            "hosts",
            f"SELECT n.* EXCLUDE (seen, fingerprint), coalesce(n.fingerprint, k.fingerprint) AS fingerprint, {seen} "
            "FROM new_hosts n LEFT JOIN hosts k USING (host)",
            ["host"],
        )
        put(
            cursor,
            "devices",
            f"SELECT n.* EXCLUDE seen, {seen}, true AS present FROM new_devices n LEFT JOIN devices k USING (device) "
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
    with registered(cursor, "listing_hosts", hosts), registered(cursor, "listed", devices):
        rows = cursor.execute(
            "SELECT d.device, d.host, CASE WHEN h.agent = '' THEN '-inf'::DOUBLE "
            "ELSE epoch(coalesce(h.last_seen, d.last_seen)) END FROM devices d LEFT JOIN hosts h "
            "USING (host) WHERE d.present AND (d.host IN (SELECT host FROM listing_hosts) "
            "OR d.device IN (SELECT device FROM listed))"
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
    with registered(cursor, "listing_hosts", hosts), registered(cursor, "listed", table_of(_CONFLICTS, rows)):
        cursor.execute(
            "DELETE FROM device_conflicts c WHERE host IN (SELECT host FROM listing_hosts) "
            "AND NOT EXISTS (FROM listed t WHERE t.host = c.host AND t.device = c.device AND t.owner = c.owner)"
        )
        if not rows:
            return
        new = cursor.execute("SELECT host, device, owner FROM listed ANTI JOIN device_conflicts USING (host, device)")
        for host, device, owner in new.fetchall():
            log.warning("%s lists %s, which is a device of %s: it stays that one's", host, device, owner)
        put(
            cursor,
            "device_conflicts",
            "SELECT t.host, t.device, t.owner, coalesce(c.since, t.seen) AS since, t.seen AS last_seen "
            "FROM listed t LEFT JOIN device_conflicts c USING (host, device)",
            ["host", "device"],
        )


def _seen(inventory: Inventory) -> int:
    return inventory.time_ns // 1000


def _hosts(inventories: Sequence[Inventory], fingerprints: Mapping[str, str]) -> ArrowTable:
    return _HOSTS.table(
        [
            _HOSTS.row(
                inventory.host,
                host=inventory.host.name,
                labels=list(inventory.host.labels.items()),
                agent="" if inventory.leaving else inventory.agent or _NAMELESS,
                source=inventory.source,
                interval_seconds=inventory.interval_seconds,
                devices=len(inventory.devices),
                seen=_seen(inventory),
                fingerprint=fingerprints.get(inventory.host.name),
            )
            for inventory in inventories
        ]
    )


def _devices(devices: Sequence[tuple[int, DeviceInfo]]) -> ArrowTable:
    return _DEVICES.table([_DEVICES.row(device, device=device.uuid, seen=seen) for seen, device in devices])


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
    return table_of(_LINKS, rows)


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
    return table_of(_CLOCKS, rows)


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
    unique = {(event.lease.lease_id, event.kind, event.time): event for event in reversed(events)}
    folded: dict[str, tuple[LeaseEvent, LeaseEvent]] = {}
    grants: dict[str, Lease] = {}
    for event in events:
        lease = event.lease
        first, last = folded.get(lease.lease_id, (event, event))
        folded[lease.lease_id] = (first, event if _overrides(event, last) else last)
        if lease.grants:
            grants.setdefault(lease.lease_id, lease)
    with (
        registered(cursor, "new_events", _lease_events(list(reversed(unique.values())))),
        registered(cursor, "new_leases", _leases(list(folded.values()))),
        registered(cursor, "new_grants", _lease_devices(list(grants.values()))),
        registered(cursor, "new_shapes", _shapes(events)),
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
        if any(event.kind is LeaseEventKind.RESIZED for event in events):
            _write_shapes(cursor)
        put(
            cursor,
            "leases",
            "SELECT n.* FROM new_leases n ANTI JOIN leases USING (lease_id) UNION ALL BY NAME "
            "SELECT l.* REPLACE (n.state AS state, n.ttl_seconds AS ttl_seconds, n.expires_at AS expires_at, "
            "n.ended_at AS ended_at, n.reason AS reason, n.changed AS changed, n.saved_at AS saved_at, "
            "n.preemption_notified_at AS preemption_notified_at) "
            "FROM leases l JOIN new_leases n ON n.lease_id = l.lease_id "
            "WHERE l.state = 'active' AND (n.changed >= l.changed OR n.state <> 'active')",
            ["lease_id"],
        )


def _write_shapes(cursor: DuckDBPyConnection) -> None:
    """Update the devices of leases that were resized, in whatever order their events come.

    A row is known by lease, device and the time from which the lease had it.
    """
    same = "d.lease_id = {0}.lease_id AND d.device = {0}.device AND d.since IS NOT DISTINCT FROM {0}.since"
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE reshaped AS SELECT n.* REPLACE (least(d.until, n.until) AS until) "
        f"FROM new_shapes n LEFT JOIN lease_devices d ON {same.format('n')}"
    )
    # As in `put`, whose keys are never null.
    cursor.execute(f"DELETE FROM lease_devices d USING reshaped r WHERE {same.format('r')}")
    cursor.execute("INSERT INTO lease_devices BY NAME FROM reshaped")
    cursor.execute("DROP TABLE temp.main.reshaped")


def _shapes(events: Sequence[LeaseEvent]) -> ArrowTable:
    """Rows of the devices of leases that were resized: those that they had then, and those that they gave back."""
    found: dict[tuple[str, str, datetime | None], tuple[Grant, datetime | None]] = {}
    for event in events:
        if event.kind is not LeaseEventKind.RESIZED:
            continue
        lease_id = event.lease.lease_id
        for grant in event.lease.grants:
            found.setdefault((lease_id, grant.device, grant.since), (grant, None))
        for grant in event.returned:
            before = found.get((lease_id, grant.device, grant.since), (grant, None))[1]
            found[lease_id, grant.device, grant.since] = grant, min(before or event.time, event.time)
    return _LEASE_DEVICES.table(
        [
            _LEASE_DEVICES.row(grant, lease_id=lease_id, device=grant.device or None, until=until)
            for (lease_id, _, _), (grant, until) in found.items()
        ]
    )


def _overrides(event: LeaseEvent, last: LeaseEvent) -> bool:
    """True if the lease's state in an event replaces that in an earlier one, by the same rule as for stored leases."""
    if last.lease.state is not LeaseState.ACTIVE:
        return False
    return event.lease.state is not LeaseState.ACTIVE or event.time >= last.time


def _lease_events(events: Sequence[LeaseEvent]) -> ArrowTable:
    return _LEASE_EVENTS.table(
        [
            _LEASE_EVENTS.row(
                event.lease,
                time=event.time,
                kind=event.kind.value,
                state=event.lease.state.value,
                planner=event.planner,
                devices=_uuids(event.lease),
                **_notice(event.lease.preemption),
            )
            for event in events
        ]
    )


def _notice(preemption: Preemption | None) -> dict[str, Any]:
    """Values of the columns of a notice: null without one, and empty texts are null."""
    if preemption is None:
        return dict.fromkeys(_NOTICE)
    return {f"preemption_{name}": None if value == "" else value for name, value in asdict(preemption).items()}


def _leases(folded: Sequence[tuple[LeaseEvent, LeaseEvent]]) -> ArrowTable:
    """Rows of leases: fixed fields from the first event that names the lease, changing ones from the last."""
    return _LEASES.table(
        [
            _LEASES.row(
                first.lease,
                state=last.lease.state.value,
                labels=list(first.lease.labels.items()),
                ttl_seconds=last.lease.ttl_seconds,
                expires_at=last.lease.expires_at,
                ended_at=last.lease.ended_at,
                reason=last.lease.reason,
                devices=_uuids(first.lease),
                changed=last.time,
                saved_at=last.lease.saved_at,
                preemption_notified_at=None if last.lease.preemption is None else last.lease.preemption.notified_at,
                group_name=first.lease.group or None,
                gpus_min=None if first.lease.elastic is None else first.lease.elastic.min,
                gpus_max=None if first.lease.elastic is None else first.lease.elastic.max,
            )
            for first, last in folded
        ]
    )


def _lease_devices(leases: Sequence[Lease]) -> ArrowTable:
    return _LEASE_DEVICES.table(
        [
            _LEASE_DEVICES.row(grant, lease_id=lease.lease_id, device=grant.device or None, until=None)
            for lease in leases
            for grant in lease.grants
        ]
    )


def _uuids(lease: Lease) -> list[str]:
    return [grant.device for grant in lease.grants if grant.device]
