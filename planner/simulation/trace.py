"""Traces for `corral simulate`: a fleet and a sequence of requests, read from tables.

Columns are those of the published cluster traces (Alibaba's cluster-trace-gpu-v2023), others are ignored:
nodes `sn, cpu_milli, memory_mib, gpu, model`, requests `name, cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec`.
Only `gpu` and `num_gpu` are required (`columns.py` has other names for each). `gpu_milli` is used if `num_gpu` is 1
(1000, or an empty cell, is a whole device); `gpu_spec` is empty or `MODEL|MODEL`. Nodes may have `rack` and
`nvlink_domain`, too.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Final, TextIO, cast

from msgspec import Struct

from ...schemas.requests import WorkRequest
from ..fleet.state import WHOLE_MILLI, AskKey, ask_key
from .columns import DOMAIN_LABELS, NODE_COLUMNS, REQUEST_COLUMNS, Column, cell, find

DEVICES_MOST: Final = 1024
AMOUNT_MOST: Final = 2**40
OWNER: Final = "simulate"
MIB: Final = 2**20
LINE_MOST: Final = 65_536
"""Characters of the first line, which names the columns."""


class TraceError(ValueError):
    """A table can't be replayed; the message says where and what to do."""


class Node(Struct, frozen=True):
    """A host.

    Attributes:
        name: of the host, unique in a trace.
        cpus_milli: thousandths of cores.
        memory_mib: RAM.
        gpus: number of devices, all equal.
        model: of the devices.
        rack: label of the host; empty for none. Likewise `nvlink_domain`.
    """

    name: str
    cpus_milli: int
    memory_mib: int
    gpus: int
    model: str
    rack: str = ""
    nvlink_domain: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the host."""
        found = {name: getattr(self, name) for name in DOMAIN_LABELS}
        return {name: value for name, value in found.items() if value}


class Arrival(Struct, frozen=True):
    """A request of a trace.

    Attributes:
        name: as the trace has it.
        cpus_milli: thousandths of cores.
        memory_mib: RAM.
        gpus: number of devices.
        share_milli: thousandths of each device; 0 without devices.
        models: allowed models, sorted; empty allows any.
    """

    name: str
    cpus_milli: int
    memory_mib: int
    gpus: int
    share_milli: int
    models: tuple[str, ...]

    @property
    def milli(self) -> int:
        """Thousandths of devices in all."""
        return self.gpus * self.share_milli

    @property
    def empty(self) -> bool:
        """True if it asks for nothing at all: any host can hold it."""
        return not (self.gpus or self.cpus_milli or self.memory_mib)

    def request(self, policy: str | None = None) -> WorkRequest:
        """Work request for the planner."""
        return WorkRequest(
            owner=OWNER,
            gpus=self.gpus,
            gpu_share=self.share_milli / WHOLE_MILLI if 0 < self.share_milli < WHOLE_MILLI else None,
            cpus=self.cpus_milli / 1000,
            host_memory_bytes=self.memory_mib * MIB,
            # Names are literal, while the planner takes globs.
            models=[escape(model) for model in self.models],
            policy=policy,
        )


def read_nodes(path: Path) -> list[Node]:
    """Read the hosts of a trace.

    Raises:
        TraceError: the file is missing, empty, lacks a column, or has an invalid value.
    """
    found: list[Node] = []
    names: dict[str, int] = {}
    models: dict[str, str] = {}
    for line, row, named in rows(path, NODE_COLUMNS):
        where = f"{path}, line {line}"
        node = Node(
            name=row["sn"] if named else f"node-{len(found) + 1}",
            cpus_milli=whole(row, "cpu_milli", where),
            memory_mib=whole(row, "memory_mib", where),
            gpus=whole(row, "gpu", where, DEVICES_MOST),
            model=row["model"],
            rack=row["rack"],
            nvlink_domain=row["nvlink_domain"],
        )
        if not node.name:
            raise TraceError(f"{where}: sn is empty; every node needs a name")
        if node.name in names:
            raise TraceError(f"{where}: node {node.name!r} is there twice (first in line {names[node.name]})")
        names[node.name] = line
        other = models.setdefault(node.model.lower(), node.model)
        if other != node.model:
            raise TraceError(f"{where}: models {other!r} and {node.model!r} differ in case only; write them alike")
        found.append(node)
    return found


def read_arrivals(path: Path) -> list[Arrival]:
    """Read the requests of a trace, in their order.

    Raises:
        TraceError: as `read_nodes`.
    """
    found: list[Arrival] = []
    for line, row, named in rows(path, REQUEST_COLUMNS):
        where = f"{path}, line {line}"
        found.append(arrival_of(row, where, row["name"] if named else str(len(found) + 1)))
    return found


def arrival_of(row: dict[str, str], where: str, name: str) -> Arrival:
    """Request of a row.

    Raises:
        TraceError: a value is invalid; `where` is part of the message.
    """
    gpus = whole(row, "num_gpu", where, DEVICES_MOST)
    share = 0
    if gpus == 1:
        share = whole(row, "gpu_milli", where) if row["gpu_milli"] else WHOLE_MILLI
        if not 1 <= share <= WHOLE_MILLI:
            raise TraceError(f"{where}: gpu_milli is {share}, but a share of one GPU is 1 to {WHOLE_MILLI}")
    elif gpus:
        share = WHOLE_MILLI
    spec = row["gpu_spec"] if gpus else ""
    return Arrival(
        name=name,
        cpus_milli=whole(row, "cpu_milli", where),
        memory_mib=whole(row, "memory_mib", where),
        gpus=gpus,
        share_milli=share,
        models=tuple(sorted({model.strip() for model in spec.split("|") if model.strip()})),
    )


def profile_of(arrivals: Sequence[Arrival]) -> dict[AskKey, float]:
    """Number of requests of each kind, without empty ones."""
    found: dict[AskKey, float] = {}
    for arrival in arrivals:
        if not arrival.empty:
            key = ask_key(arrival.request())
            found[key] = found.get(key, 0.0) + 1.0
    return found


def rows(path: Path, columns: Sequence[Column]) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yield line number and cells of each row, and true if the table has the first column, the name.

    Raises:
        TraceError: the table can't be read.
    """
    with reading(path), open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        if reader.fieldnames is None:
            names = ", ".join(column.name for column in columns)
            raise TraceError(f"{path} is empty: its first line must name the columns {names}")
        try:
            places = find(columns, reader.fieldnames)
        except ValueError as error:
            raise TraceError(f"{path} {error}") from None
        named = places[0].header is not None
        count = 0
        for row in reader:
            count += 1
            # A short line has None in the missing cells.
            cells = cast("dict[str, str | None]", row)
            yield reader.line_num, {place.column.name: cell(cells, place) for place in places}, named
    if not count:
        raise TraceError(f"{path} has no rows")


def first_line(path: Path) -> str:
    """First line of a table, which names its columns.

    Raises:
        TraceError: the file can't be read.
    """
    with reading(path), open_text(path) as file:
        return file.readline(LINE_MOST)


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Context in which a failure to read a table is a `TraceError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path} is no table of comma-separated values in UTF-8: {error}") from None


def open_text(path: Path) -> TextIO:
    """Open a table, which may be gzipped, as text."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def whole(row: dict[str, str], column: str, where: str, most: int = AMOUNT_MOST) -> int:
    """Parse a whole number from 0 to `most`; an empty cell is 0, and 12000.0 is 12000.

    Raises:
        TraceError: it is none.
    """
    text = row[column].strip()
    try:
        value = float(text) if text else 0.0
        if not value.is_integer():
            raise ValueError
    except ValueError:
        raise TraceError(f"{where}: {column} is {text!r}, which is no whole number") from None
    if not 0 <= value <= most:
        raise TraceError(f"{where}: {column} is {text}, but 0 to {most} is what may be")
    return int(value)
