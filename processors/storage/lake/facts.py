"""Write inventories, hosts' clocks, leases, drains and jobs to a lake, by the statements of the embedded storage.

The affected rows are copied into temporary tables, the statements of `storage/facts.py` and `storage/jobs.py` change
them there, and only changed rows are replaced in the lake. All of it is part of the batch's transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ....schemas.request_events import RequestEvents
from ....schemas.requests import LeaseEvent
from ....schemas.telemetry import Inventory
from ....schemas.work.jobs import JobEvent
from .. import drains, facts, jobs, schema
from ..protocol import HostClock
from ..statements import registered

_HOST_TABLES: Final = ("hosts", "devices", "host_facts", "device_conflicts", "links")
_LEASE_TABLES: Final = ("leases", "lease_devices", "lease_events")
_JOB_TABLES: Final = ("jobs", "job_tasks")


def write_inventories(cursor: DuckDBPyConnection, inventories: Sequence[Inventory]) -> None:
    """Update hosts, devices, links, and facts over time."""
    if not inventories:
        return
    hosts = pa.table({"host": pa.array({i.host.name for i in inventories}, pa.string())})
    devices = pa.table({"device": pa.array({d.uuid for i in inventories for d in i.devices}, pa.string())})
    with registered(cursor, "named_hosts", hosts), registered(cursor, "named_devices", devices):
        chosen = "host IN (SELECT host FROM named_hosts)"
        # A device may come from another host.
        found = f"({chosen} OR device IN (SELECT device FROM named_devices))"
        owners = f"({chosen} OR host IN (SELECT host FROM lake.main.devices WHERE {found}))"
        which = {"hosts": owners, "devices": found, "device_conflicts": chosen, "links": chosen}
        which["host_facts"] = f"valid_to IS NULL AND {found}"
        _bring(cursor, _HOST_TABLES, which)
        facts.write_inventories(cursor, inventories)
        _replace(cursor, _HOST_TABLES, which)


def write_clocks(cursor: DuckDBPyConnection, clocks: Sequence[HostClock]) -> None:
    """Update the state of hosts' clocks."""
    if clocks:
        with registered(cursor, "new_clocks", facts.clocks_table(clocks)):
            cursor.execute("DELETE FROM store.clocks WHERE host IN (SELECT host FROM new_clocks)")
            cursor.execute("INSERT INTO store.clocks BY NAME FROM new_clocks")


def write_leases(cursor: DuckDBPyConnection, events: Sequence[LeaseEvent]) -> None:
    """Append lease events that are not stored yet, and update leases."""
    if not events:
        return
    leases = pa.table({"lease_id": pa.array({event.lease.lease_id for event in events}, pa.string())})
    with registered(cursor, "named_leases", leases):
        chosen = "lease_id IN (SELECT lease_id FROM named_leases)"
        which: dict[str, str] = dict.fromkeys(_LEASE_TABLES, chosen)
        _bring(cursor, _LEASE_TABLES, which)
        facts.write_leases(cursor, events)
        _replace(cursor, _LEASE_TABLES, which)


def write_jobs(cursor: DuckDBPyConnection, events: Sequence[JobEvent]) -> None:
    """Update jobs and the attempts of their tasks."""
    if not events:
        return
    changed = pa.table({"job_id": pa.array({event.job.job_id for event in events}, pa.string())})
    with registered(cursor, "named_jobs", changed):
        chosen = "job_id IN (SELECT job_id FROM named_jobs)"
        which: dict[str, str] = dict.fromkeys(_JOB_TABLES, chosen)
        _bring(cursor, _JOB_TABLES, which)
        jobs.write_jobs(cursor, events)
        _replace(cursor, _JOB_TABLES, which)


def write_drains(cursor: DuckDBPyConnection, messages: Sequence[RequestEvents]) -> None:
    """Store drains that have begun, and the ends of those that are stored."""
    targets = {span.target for message in messages for span in message.drains}
    if not targets:
        return
    with registered(cursor, "named_targets", pa.table({"target": pa.array(targets, pa.string())})):
        which = {"drains": "target IN (SELECT target FROM named_targets)"}
        _bring(cursor, tuple(which), which)
        drains.write_drains(cursor, messages)
        _replace(cursor, tuple(which), which)


def _bring(cursor: DuckDBPyConnection, tables: Sequence[str], which: Mapping[str, str]) -> None:
    """Copy rows into temporary tables, which take precedence over the lake's in statements without a database name."""
    for table in tables:
        cursor.execute(f"CREATE OR REPLACE TEMP TABLE {table} ({schema.TABLES[table]})")
        cursor.execute(f"INSERT INTO temp.main.{table} FROM lake.main.{table} WHERE {which[table]}")


def _replace(cursor: DuckDBPyConnection, tables: Sequence[str], which: Mapping[str, str]) -> None:
    for table in tables:
        # Unchanged rows are not rewritten: in an inventory most rows are unchanged.
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE before AS FROM lake.main.{table} WHERE {which[table]}; "
            f"CREATE OR REPLACE TEMP TABLE added AS (FROM temp.main.{table} EXCEPT FROM temp.main.before); "
            f"CREATE OR REPLACE TEMP TABLE gone AS (FROM temp.main.before EXCEPT FROM temp.main.{table})"
        )
        row = cursor.execute("SELECT count(*) FROM temp.main.gone").fetchone()
        if row is not None and row[0]:
            key = ", ".join(_KEYS[table])
            cursor.execute(f"DELETE FROM lake.main.{table} WHERE ({key}) IN (SELECT ({key}) FROM temp.main.gone)")
        row = cursor.execute("SELECT count(*) FROM temp.main.added").fetchone()
        if row is not None and row[0]:
            cursor.execute(f"INSERT INTO lake.main.{table} FROM temp.main.added")
        cursor.execute(f"DROP TABLE temp.main.{table}")


_KEYS: Final = {
    "hosts": ("host",),
    "devices": ("device",),
    "host_facts": ("host", "coalesce(device, '')", "fact", "valid_from", "coalesce(valid_to, 'infinity'::TIMESTAMPTZ)"),
    "device_conflicts": ("host", "device"),
    "links": ("host", "device", "other"),
    "leases": ("lease_id",),
    "lease_devices": ("lease_id", "device", "coalesce(since, '-infinity'::TIMESTAMPTZ)"),
    "lease_events": ("lease_id", "kind", "time"),
    "drains": drains.KEYS,
    "jobs": jobs.JOB_KEYS,
    "job_tasks": jobs.TASK_KEYS,
}
"""Columns that identify a row, by table."""
