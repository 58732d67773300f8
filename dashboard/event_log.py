"""Events of hosts, devices and leases, newest first, as one list over the tables of the history."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from ..client import Client
from .history import Window, instant, text

SHOWN: Final = 300
"""Maximum number of events that a page shows."""
KINDS: Final = (
    ("", "All"),
    ("faults", "Faults"),
    ("leases", "Leases"),
    ("preemptions", "Preemptions"),
    ("hosts", "Hosts"),
    ("use", "Use without a lease"),
)
"""Kinds of events, as in a URL and as a page names them."""


class Happened(Struct, frozen=True, kw_only=True):
    """An event.

    Attributes:
        time_ms: when it happened, milliseconds since the epoch.
        kind: one of `KINDS`.
        what: such as `xid 79`, `granted`, or the fact of a host that changed.
        severity: as in `DeviceEvent`; `info` for leases.
        hosts: names of the hosts.
        device: uuid of the device; empty if it is about none, or about several.
        index: index of that device on its host; null if unknown.
        lease_id: id of the lease; empty if it is about none.
        owner: owner of that lease.
        name: name of its workload.
        message: in words.
    """

    time_ms: int
    kind: str
    what: str
    severity: str
    hosts: list[str]
    device: str
    index: int | None
    lease_id: str
    owner: str
    name: str
    message: str


async def happened(
    client: Client, window: Window, kind: str, words: str, host: str = ""
) -> tuple[list[Happened], bool]:
    """Query events, newest first.

    Args:
        client: client of the bus.
        window: time window.
        kind: one of `KINDS`; empty for all.
        words: each of them has to be in the host, device, lease, owner, name or message of an event, in any case.
        host: name of a host; empty for all.

    Returns:
        The newest events, and whether there are more.

    Raises:
        CorralError: the history doesn't answer, or not in time.
    """
    result = await client.query(sql(window, kind, words, host), limit=SHOWN, timeout=30)
    found = [Happened(**{name: _plain(name, value) for name, value in row.items()}) for row in result.dicts()]
    return found, result.truncated


def _plain(name: str, value: Any) -> Any:
    if name == "hosts":
        return [one for one in value or () if one]
    return value if value is not None or name == "index" else ""


def sql(window: Window, kind: str, words: str, host: str = "") -> str:
    """SQL of `happened`."""
    start, end = (instant(at) for at in window.bounds)
    within = f"time >= {start} AND time < {end}"
    conditions = ["true"]
    if kind:
        conditions.append(f"kind = {text(kind)}")
    if host:
        conditions.append(f"list_contains(hosts, {text(host)})")
    conditions += [f"contains(lower({_HAYSTACK}), lower({text(word)}))" for word in words.split()[:8]]
    return f"""WITH reported AS (
    SELECT time, CASE WHEN kind LIKE 'process_without_lease%' OR kind LIKE 'lease_memory%' THEN 'use'
            WHEN kind IN ('agent_started', 'agent_stopped', 'clock', 'mig_changed', 'samples_dropped',
                'processes_hidden') THEN 'hosts' ELSE 'faults' END AS kind,
        concat_ws(' ', replace(kind, '_', ' '), nullif(code, 0)) AS what, severity, [host] AS hosts, device,
        json_extract_string(data, '$.lease') AS lease_id, json_extract_string(data, '$.owner') AS owner,
        NULL AS name, message
    FROM events WHERE {within}
), of_leases AS (
    SELECT time, CASE WHEN kind = 'preempting' OR (preemption_notified_at IS NOT NULL AND state <> 'active')
            THEN 'preemptions' ELSE 'leases' END AS kind,
        CASE kind WHEN 'preempting' THEN 'notice of preemption' ELSE replace(kind, '_', ' ') END AS what,
        'info' AS severity, lease_id, owner, name, devices,
        CASE WHEN kind = 'preempting' THEN concat_ws(': ', nullif(preemption_claimant_owner, ''), preemption_reason)
            WHEN state = 'active' THEN NULL ELSE coalesce(nullif(preemption_reason, ''), reason) END AS because
    FROM lease_events WHERE {within} AND kind NOT IN ('renewed', 'expiring', 'resize_offered', 'resize_requested')
), places AS (
    SELECT lease_id, list_sort(list_distinct(list(host))) AS hosts FROM lease_devices
    WHERE lease_id IN (SELECT lease_id FROM of_leases) GROUP BY lease_id
), leased AS (
    SELECT l.* EXCLUDE (devices, because), p.hosts, CASE WHEN len(devices) = 1 THEN devices[1] END AS device,
        concat_ws(', ', len(devices)::VARCHAR || CASE len(devices) WHEN 1 THEN ' GPU' ELSE ' GPUs' END,
            nullif(because, '')) AS message
    FROM of_leases l LEFT JOIN places p USING (lease_id)
), changes AS (
    SELECT *, CASE WHEN fact = 'index' THEN 'device' WHEN fact LIKE 'link to %' THEN 'link'
        WHEN fact = 'memory_bytes' THEN 'memory' ELSE replace(fact, '_', ' ') END AS what,
        CASE WHEN fact = 'index' AND before IS NULL THEN 'came' WHEN fact = 'index' AND after IS NULL THEN 'is gone'
            ELSE concat(coalesce({_value("before")}, 'none'), ' → ', coalesce({_value("after")}, 'none')) END AS words
    FROM host_changes WHERE {within}
), changed AS (
    SELECT time, 'hosts' AS kind, what, 'info' AS severity, [host] AS hosts,
        CASE WHEN count(*) = 1 THEN any_value(device) END AS device,
        words || CASE WHEN count(*) > 1 THEN concat(', on ', count(DISTINCT device), ' GPUs') ELSE '' END AS message
    FROM changes GROUP BY time, host, what, words
), merged AS (
    FROM reported UNION ALL BY NAME FROM leased UNION ALL BY NAME FROM changed
), placed AS (
    SELECT m.*, d.index FROM merged m LEFT JOIN devices d USING (device)
)
SELECT epoch_ms(time) AS time_ms, kind, what, severity, hosts, device, index, lease_id, owner, name, message
FROM placed WHERE {" AND ".join(conditions)} ORDER BY time DESC, hosts, what, device"""


def _value(column: str) -> str:
    """The value of a fact in SQL, as people read it."""
    return f"CASE fact WHEN 'memory_bytes' THEN printf('%.1f GiB', {column}::DOUBLE / 2**30) ELSE {column} END"


_HAYSTACK: Final = "concat_ws(' ', what, severity, array_to_string(hosts, ' '), device, lease_id, owner, name, message)"
