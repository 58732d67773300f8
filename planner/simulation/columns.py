"""Names of the columns of a trace's tables: those of the published traces, and common alternatives.

It imports the standard library alone, and nothing of the planner, since the independent audit uses it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

UNBOUNDED: Final = 10**9
"""Thousandths of cores, or MiB, of a node if its table lacks the column: more than all requests together ask for."""


class Column(NamedTuple):
    """A column.

    Attributes:
        name: as the published traces have it.
        others: alternative names, each with the factor of its unit.
        missing: value of each cell in a table without the column; None if the column is required.
    """

    name: str
    others: Mapping[str, int]
    missing: str | None


def _same(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1)


_CORES: Final = dict.fromkeys(("cpu", "cpus", "cores", "num_cpu", "num_cpus", "cpu_num"), 1000)
_GIB: Final = dict.fromkeys(("memory_gib", "mem_gib"), 1024)
NODE_COLUMNS: Final = (
    Column("sn", _same("name", "node", "node_name", "host", "hostname"), ""),
    Column("cpu_milli", {**_same("cpus_milli"), **_CORES}, str(UNBOUNDED)),
    Column("memory_mib", {**_same("mem_mib"), **_GIB}, str(UNBOUNDED)),
    Column("gpu", _same("gpus", "num_gpu", "num_gpus", "gpu_count"), None),
    Column("model", _same("gpu_model", "gpu_type", "gpu_spec"), ""),
    Column("rack", {}, ""),
    Column("nvlink_domain", {}, ""),
)
DOMAIN_LABELS: Final = ("rack", "nvlink_domain")
"""Columns of nodes that are labels, of which the nodes of a job may have to share one."""
REQUEST_COLUMNS: Final = (
    Column("name", _same("pod", "pod_name", "job", "job_name", "id"), ""),
    Column("cpu_milli", {**_same("cpus_milli"), **_CORES}, ""),
    Column("memory_mib", {**_same("mem_mib"), **_GIB}, ""),
    Column("num_gpu", _same("num_gpus", "gpu", "gpus", "gpu_count"), None),
    Column("gpu_milli", _same("gpus_milli"), ""),
    Column("gpu_spec", _same("gpu_model", "gpu_models", "gpu_type", "model", "models"), ""),
)

JOB_COLUMNS: Final = (
    *REQUEST_COLUMNS,
    Column("submit_seconds", {}, None),
    Column("duration_seconds", {}, None),
    Column("owner", _same("user", "vc", "queue"), ""),
    Column("priority", {}, ""),
    Column("preemptible", {}, ""),
    Column("expected_seconds", {}, ""),
    Column("within", {}, ""),
)
"""Columns of requests with time: those of requests, and when they arrive and how long they run."""
TIME_COLUMNS: Final = ("submit_seconds", "duration_seconds")
"""A table that has these is replayed with time."""


class Found(NamedTuple):
    """A column as found in a table.

    Attributes:
        column: the column.
        header: its name in the table's first line; None if it is missing.
        factor: of its unit.
    """

    column: Column
    header: str | None
    factor: int


def find(columns: Sequence[Column], headers: Sequence[str]) -> list[Found]:
    """Find each column in a table. Case is ignored; the published name takes precedence.

    Raises:
        ValueError: a required column is missing; the message lists the table's columns.
    """
    by_name = {header.strip().lower(): header for header in reversed(headers)}
    found: list[Found] = []
    for column in columns:
        names = {column.name: 1, **column.others}
        name = next((name for name in names if name in by_name), None)
        if name is None and column.missing is None:
            raise ValueError(
                f"has no column {column.name} (or {', '.join(column.others)}): "
                f"its first line names {', '.join(headers) or 'none'}"
            )
        found.append(Found(column, None if name is None else by_name[name], 1 if name is None else names[name]))
    return found


def cell(row: Mapping[str, str | None], found: Found) -> str:
    """Value of a row in a column; a number in another unit is converted to the published one."""
    if found.header is None:
        return found.column.missing or ""
    text = (row[found.header] or "").strip()
    if found.factor == 1 or not text:
        return text
    try:
        return repr(round(float(text) * found.factor, 6))
    except (ValueError, OverflowError):
        return text
