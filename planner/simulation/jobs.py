"""Jobs for `corral simulate` with time: requests that arrive, run for a known time, and end."""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Final

from msgspec import Struct

from ...schemas.requests import WorkRequest
from ..fleet.state import WHOLE_MILLI
from .columns import DOMAIN_LABELS, JOB_COLUMNS, TIME_COLUMNS
from .trace import MIB, OWNER, TraceError, arrival_of, first_line, rows

SECONDS_MOST: Final = 1e12
PRIORITY_MOST: Final = 1000
"""As in a work request."""
_FLAGS: Final = {"": False, "false": False, "no": False, "0": False, "true": True, "yes": True, "1": True}


class Job(Struct, frozen=True, kw_only=True):
    """A job.

    Attributes:
        number: in its trace, from 0.
        name: as the trace has it; jobs of one name are taken to be alike.
        submit_seconds: time of its arrival.
        duration_seconds: time that it runs, without the cost of a start.
        gpus: number of devices.
        share_milli: thousandths of each device; 0 without devices.
        cpus_milli: thousandths of cores.
        memory_mib: RAM.
        models: allowed models, sorted; empty allows any.
        owner: whose job it is.
        priority: the greater goes first.
        preemptible: true if it may be stopped for others.
        expected_seconds: duration that its owner expects; None if none is given.
        within: label of which all its nodes must have the same value, if it needs several; empty for none.
    """

    number: int
    name: str
    submit_seconds: float
    duration_seconds: float
    gpus: int
    share_milli: int = WHOLE_MILLI
    cpus_milli: int = 0
    memory_mib: int = 0
    models: tuple[str, ...] = ()
    owner: str = ""
    priority: int = 0
    preemptible: bool = False
    expected_seconds: float | None = None
    within: str = ""

    @property
    def empty(self) -> bool:
        """True if it asks for nothing at all: any host can hold it."""
        return not (self.gpus or self.cpus_milli or self.memory_mib)

    @property
    def gpu_seconds(self) -> float:
        """Devices × seconds."""
        return self.gpus * self.share_milli / WHOLE_MILLI * self.duration_seconds

    def request(self) -> WorkRequest:
        """Work request for the planner."""
        return WorkRequest(
            owner=self.owner or OWNER,
            gpus=self.gpus,
            gpu_share=self.share_milli / WHOLE_MILLI if 0 < self.share_milli < WHOLE_MILLI else None,
            cpus=self.cpus_milli / 1000,
            host_memory_bytes=self.memory_mib * MIB,
            models=[escape(model) for model in self.models],
            priority=self.priority,
        )


def read_jobs(path: Path) -> list[Job]:
    """Read jobs from a table with the columns of `JOB_COLUMNS`.

    Raises:
        TraceError: the file is missing, empty, lacks a column, or has an invalid value; with the line.
    """
    found: list[Job] = []
    for line, row, named in rows(path, JOB_COLUMNS):
        where = f"{path}, line {line}"
        arrival = arrival_of(row, where, str(len(found) + 1) if not named else row["name"])
        submitted, duration = seconds(row, "submit_seconds", where), seconds(row, "duration_seconds", where)
        expected = row["expected_seconds"].strip()
        found.append(
            Job(
                number=len(found),
                name=arrival.name,
                submit_seconds=submitted,
                duration_seconds=duration,
                gpus=arrival.gpus,
                share_milli=arrival.share_milli,
                cpus_milli=arrival.cpus_milli,
                memory_mib=arrival.memory_mib,
                models=arrival.models,
                owner=row["owner"],
                priority=_priority(row, where),
                preemptible=_flag(row, "preemptible", where),
                expected_seconds=seconds(row, "expected_seconds", where) if expected else None,
                within=_label(row, where),
            )
        )
    return found


def timed(path: Path) -> bool:
    """True if a table has times, and is to be replayed with them.

    Raises:
        TraceError: the file can't be read.
    """
    header = first_line(path).lower()
    names = {name.strip().strip('"') for name in header.split(",")}
    return all(name in names for name in TIME_COLUMNS) or is_sacct(header)


def is_sacct(header: str) -> bool:
    """True if a first line is that of `sacct --parsable` or `--parsable2`."""
    return "jobid" in header.lower().strip().split("|")


def seconds(row: Mapping[str, str], column: str, where: str) -> float:
    """Parse a number of seconds, from 0 to `SECONDS_MOST`; an empty cell is an error.

    Raises:
        TraceError: it is none.
    """
    text = row[column].strip()
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{where}: {column} is {text!r}, which is no number of seconds") from None
    if not 0 <= value <= SECONDS_MOST:
        raise TraceError(f"{where}: {column} is {text}, but 0 to {SECONDS_MOST:.0e} is what may be")
    return value


def _priority(row: Mapping[str, str], where: str) -> int:
    text = row["priority"].strip()
    try:
        value = int(text or 0)
    except ValueError:
        raise TraceError(f"{where}: priority is {text!r}, which is no whole number") from None
    if not -PRIORITY_MOST <= value <= PRIORITY_MOST:
        raise TraceError(f"{where}: priority is {text}, but -{PRIORITY_MOST} to {PRIORITY_MOST} is what may be")
    return value


def _flag(row: Mapping[str, str], column: str, where: str) -> bool:
    text = row[column].strip().lower()
    if text not in _FLAGS:
        raise TraceError(f"{where}: {column} is {text!r}, but true and false are what may be")
    return _FLAGS[text]


def _label(row: Mapping[str, str], where: str) -> str:
    text = row["within"].strip()
    if text and text not in DOMAIN_LABELS:
        raise TraceError(f"{where}: within is {text!r}, but {' and '.join(DOMAIN_LABELS)} are what may be")
    return text


def named(job: Job) -> str:
    """Name of a job in a message."""
    return f"job {job.number + 1} ({job.name})"
