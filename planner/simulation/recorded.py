"""Jobs and nodes from Corral's own history: what its leases asked for, on the devices that the fleet has.

A lease counts as a job that ran from its grant to its end. It is submitted when its request arrived, if the history has
`requests`; else when it was granted, so that waits of the past are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from ..fleet.state import WHOLE_MILLI
from .jobs import Job
from .trace import MIB, Node, TraceError

_LEASES: Final = """
WITH asked AS ({asked}),
held AS (
    SELECT lease_id, count(*) FILTER (device <> '') AS devices, min(share) AS share, sum(cpus) AS cpus,
        sum(host_memory_bytes) AS memory, list_distinct(list(model) FILTER (model <> '')) AS models
    -- What an elastic lease got later it did not ask for. Older histories have no such column.
    FROM (SELECT NULL::TIMESTAMPTZ AS since WHERE false UNION ALL BY NAME FROM lease_devices)
    WHERE since IS NULL GROUP BY lease_id
)
SELECT epoch(coalesce(a.submitted, l.granted_at)), epoch(coalesce(l.ended_at, least(l.expires_at, now()))),
    epoch(l.granted_at), coalesce(nullif(l.name, ''), l.lease_id), l.owner, h.devices, h.share, h.cpus, h.memory,
    h.models, coalesce(a.priority, 0), a.expected
FROM leases l JOIN held h USING (lease_id) LEFT JOIN asked a USING (lease_id)
WHERE l.granted_at >= (SELECT max(granted_at) FROM leases) - to_seconds({since})
ORDER BY 1, l.lease_id
"""
_NO_REQUESTS: Final = "SELECT NULL AS lease_id, NULL::TIMESTAMPTZ AS submitted, 0 AS priority, NULL AS expected LIMIT 0"
_NODES: Final = """
SELECT d.host, count(*), any_value(d.name), coalesce(max(h.cpus), 0), coalesce(max(h.memory_bytes), 0),
    count(DISTINCT d.name)
FROM devices d LEFT JOIN hosts h USING (host)
WHERE d.present AND d.mig_parent IS NULL
GROUP BY d.host ORDER BY d.host
"""
_ADDED: Final = re.compile(r"(\d{1,5})x(.{1,128})")
NODE_DEVICES: Final = 8


def read_history(path: Path, since_seconds: float) -> tuple[list[Node], list[Job]]:
    """Read nodes, and the jobs that were granted in the last seconds before the newest grant.

    Raises:
        TraceError: the file is no history, or is in use by a processor, or has no leases.
    """
    duckdb = _duckdb()
    if not path.is_file():
        raise TraceError(f"{path} can't be read: there is no such file")
    try:
        with duckdb.connect(str(path), read_only=True) as database:
            nodes = _nodes(database.execute(_NODES).fetchall())
            # DuckDB imports pandas, if it is there, to bind a parameter.
            statement = _LEASES.format(asked=_asked(database), since=float(since_seconds))
            rows = database.execute(statement).fetchall()
    except duckdb.IOException as error:
        hint = "a processor has it open; take a copy with `corral snapshot`" if "lock" in str(error) else error
        raise TraceError(f"{path} can't be read: {hint}") from None
    except duckdb.Error as error:
        raise TraceError(f"{path} is no history of Corral: {error}") from None
    jobs = [job for row in rows if (job := _job(row)) is not None]
    jobs = [_renumbered(job, number, jobs[0].submit_seconds) for number, job in enumerate(jobs)]
    if not jobs or not nodes:
        raise TraceError(f"{path} has no {'leases' if nodes else 'devices'} to simulate")
    return nodes, jobs


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise TraceError("a history is a DuckDB file: install corral[processor]") from None
    return duckdb


def _asked(database: Any) -> str:
    """Query of what requests asked, if the history has them."""
    known = database.execute(
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'requests'"
    ).fetchall()
    names = {row[0] for row in known}
    if not {"lease_id", "asked_at"} <= names:
        return _NO_REQUESTS
    priority = "priority" if "priority" in names else "0 AS priority"
    expected = "expected_seconds AS expected" if "expected_seconds" in names else "NULL AS expected"
    return f"SELECT lease_id, asked_at AS submitted, {priority}, {expected} FROM requests WHERE lease_id <> ''"


def _nodes(rows: Sequence[tuple[Any, ...]]) -> list[Node]:
    return [
        Node(
            name=host,
            # 0 is unknown, and then limits nothing.
            cpus_milli=cpus * 1000 or 10**9,
            memory_mib=memory // MIB or 10**9,
            gpus=count,
            model=name or "",
        )
        for host, count, name, cpus, memory, _ in rows
    ]


def _job(row: tuple[Any, ...]) -> Job | None:
    submitted, ended, granted, name, owner, devices, share, cpus, memory, models, priority, expected = row
    if ended is None or granted is None or ended < granted:
        return None
    return Job(
        number=0,
        name=name,
        submit_seconds=submitted,
        duration_seconds=ended - granted,
        gpus=devices,
        share_milli=_milli(devices, share),
        cpus_milli=round((cpus or 0) * 1000),
        memory_mib=(memory or 0) // MIB,
        models=tuple(sorted(models or ())),
        owner=owner or "",
        priority=priority or 0,
        expected_seconds=expected,
    )


def _milli(devices: int, share: float | None) -> int:
    """Thousandths of each device; 0 without devices."""
    if devices == 1 and share is not None:
        return min(WHOLE_MILLI, max(1, round(share * WHOLE_MILLI)))
    return WHOLE_MILLI if devices else 0


def _renumbered(job: Job, number: int, first: float) -> Job:
    return replace(job, number=number, submit_seconds=job.submit_seconds - first)


def added(text: str, nodes: Sequence[Node], number: int) -> list[Node]:
    """Nodes of more devices, such as `8xH100`: up to `NODE_DEVICES` on each, with cores and RAM as those of that model.

    Args:
        text: number and model; a part of a model's name will do, if it is in the fleet.
        nodes: of the fleet.
        number: makes the names unique.

    Raises:
        TraceError: it is not of that form.
    """
    match = _ADDED.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise TraceError(f"{text!r} is no number of devices and a model: write it like 8xH100")
    count, model = int(match[1]), match[2].strip()
    like = next((node for node in nodes if model.lower() in node.model.lower()), None)
    size = NODE_DEVICES if like is None else like.gpus
    found: list[Node] = []
    while count > 0:
        name = f"added-{number}-{len(found) + 1}"
        gpus = min(size, count)
        found.append(
            Node(
                name=name,
                cpus_milli=10**9 if like is None else like.cpus_milli * gpus // like.gpus,
                memory_mib=10**9 if like is None else like.memory_mib * gpus // like.gpus,
                gpus=gpus,
                model=model if like is None else like.model,
            )
        )
        count -= gpus
    return found
