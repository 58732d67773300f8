"""Names of the columns of a trace's tables: those of the published traces, and others that people use.

Only the standard library, and nothing of the planner: the audit reads the same tables by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

UNBOUNDED: Final = 10**9
"""Thousandths of cores, or MiB, of a node whose table does not say: more than any requests ask for together."""


class Column(NamedTuple):
    """A column.

    Attributes:
        name: as the published traces have it.
        others: names that mean the same, each with the factor of its unit.
        missing: stands for each cell of a table without it; None where there has to be one.
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
)
REQUEST_COLUMNS: Final = (
    Column("name", _same("pod", "pod_name", "job", "job_name", "id"), ""),
    Column("cpu_milli", {**_same("cpus_milli"), **_CORES}, ""),
    Column("memory_mib", {**_same("mem_mib"), **_GIB}, ""),
    Column("num_gpu", _same("num_gpus", "gpu", "gpus", "gpu_count"), None),
    Column("gpu_milli", _same("gpus_milli"), ""),
    Column("gpu_spec", _same("gpu_model", "gpu_models", "gpu_type", "model", "models"), ""),
)


class Found(NamedTuple):
    """Where a column stands in a table.

    Attributes:
        column: which.
        header: in the table's first line; None where it is missing.
        factor: of its unit.
    """

    column: Column
    header: str | None
    factor: int


def find(columns: Sequence[Column], headers: Sequence[str]) -> list[Found]:
    """Where each column stands. Upper and lower case are alike; the published name goes before others.

    Raises:
        ValueError: one that has to be there is missing; says what the table has.
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
    """What a row says in a column; in the published unit where it is a number in another one."""
    if found.header is None:
        return found.column.missing or ""
    text = (row[found.header] or "").strip()
    if found.factor == 1 or not text:
        return text
    try:
        return repr(round(float(text) * found.factor, 6))
    except (ValueError, OverflowError):
        return text
