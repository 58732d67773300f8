"""Independent audit of placements: everything is computed anew from the three tables, without the planner's code.

It has no host states, classes or policies, only plain sums over nodes. It imports the standard library and the column
names (`columns.py`) alone. Also a command:

    python -m corral.planner.simulation.audit NODES.csv REQUESTS.csv PLACEMENTS.csv
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .columns import NODE_COLUMNS, REQUEST_COLUMNS, Column, cell, find


class AuditError(Exception):
    """A placement is wrong."""


class Audit(NamedTuple):
    """Totals of audited placements.

    Attributes:
        requests: number of requests.
        placed: number of placed requests.
        allocated_milli: thousandths of devices that were placed.
        capacity_milli: thousandths of all devices.
    """

    requests: int
    placed: int
    allocated_milli: int
    capacity_milli: int


class _Node:
    def __init__(self, row: dict[str, str]) -> None:
        self.cpu, self.memory = number(row["cpu_milli"]), number(row["memory_mib"])
        self.free = [1000] * number(row["gpu"])
        self.model = row["model"]

    def holds(self, cpu: int, memory: int, gpus: int, milli: int, models: set[str]) -> bool:
        if self.cpu < cpu or self.memory < memory:
            return False
        if not gpus:
            return True
        return (not models or self.model in models) and sum(free >= milli for free in self.free) >= gpus


def number(text: str) -> int:
    """Whole number in a cell; 0 if it is empty."""
    return int(float(text or 0))


def rows(path: Path, columns: Sequence[Column], name: str) -> list[dict[str, str]]:
    """Rows of a table, plain or gzipped, by the names of its columns; those without a name are numbered."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    places = find(columns, reader.fieldnames or ())
    found = [{place.column.name: cell(row, place) for place in places} for row in reader]
    if places[0].header is None:
        for at, row in enumerate(found, 1):
            row[columns[0].name] = name.format(at)
    return found


def _placements(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(), newline="")))


def audit(nodes: Path, requests: Path, placements: Path) -> Audit:
    """Check that every placement fits when it is made, and that no node could have held a dropped request.

    Raises:
        AuditError: describes the first placement that is wrong.
    """
    fleet = {row["sn"]: _Node(row) for row in rows(nodes, NODE_COLUMNS, "node-{}")}
    capacity = sum(1000 * len(node.free) for node in fleet.values())
    asked, given = rows(requests, REQUEST_COLUMNS, "{}"), _placements(placements)
    if len(asked) != len(given):
        raise AuditError(f"{len(asked)} requests, but {len(given)} placements")
    placed = allocated = 0
    for at, (row, outcome) in enumerate(zip(asked, given, strict=True), 1):
        where = f"request {at} ({row['name']})"
        if row["name"] != outcome["name"]:
            raise AuditError(f"{where}: the placement is of {outcome['name']}")
        cpu, memory, gpus = number(row["cpu_milli"]), number(row["memory_mib"]), number(row["num_gpu"])
        milli = number(row["gpu_milli"] or "1000") if gpus == 1 else 1000
        models = {model.strip() for model in row["gpu_spec"].split("|") if model.strip()}
        if not outcome["node"]:
            if outcome["gpu_indices"]:
                raise AuditError(f"{where}: devices without a node")
            able = next((name for name, node in fleet.items() if node.holds(cpu, memory, gpus, milli, models)), None)
            if able is not None:
                raise AuditError(f"{where} was dropped, but {able} could hold it")
            continue
        node = fleet.get(outcome["node"])
        if node is None:
            raise AuditError(f"{where}: there is no node {outcome['node']}")
        indices = [int(text) for text in outcome["gpu_indices"].split(";") if text]
        if len(indices) != gpus or len(set(indices)) != gpus:
            raise AuditError(f"{where} asks for {gpus} devices, and got {indices}")
        if gpus and models and node.model not in models:
            raise AuditError(f"{where} may not use {node.model}")
        node.cpu -= cpu
        node.memory -= memory
        if node.cpu < 0 or node.memory < 0:
            raise AuditError(f"{where}: {outcome['node']} has too few cores or too little RAM")
        for index in indices:
            if not 0 <= index < len(node.free) or node.free[index] < milli:
                raise AuditError(f"{where}: device {index} of {outcome['node']} has less than {milli} milli free")
            node.free[index] -= milli
        placed += 1
        allocated += gpus * milli
    return Audit(len(asked), placed, allocated, capacity)


if __name__ == "__main__":
    try:
        found = audit(*map(Path, sys.argv[1:4]))
    except AuditError as error:
        sys.exit(f"wrong: {error}")
    share = 100 * found.allocated_milli / found.capacity_milli if found.capacity_milli else 0.0
    print(f"right: {found.placed} of {found.requests} placed, {share:.3f} % of the devices allocated")
