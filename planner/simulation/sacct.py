"""Jobs from Slurm's accounting: the output of `sacct --parsable2` (or `--parsable`), one job a line.

    sacct -a -X -P -S 2026-11-01 -o JobID,JobName,User,Submit,Start,ElapsedRaw,State,AllocTRES,ReqTRES > jobs.txt

Fields that are used: `JobID`, `Submit`, `ElapsedRaw` or `Elapsed`, `AllocTRES` or `ReqTRES`; `JobName`, `User`, `State`
and `Start` if there. Steps (`123.batch`) are left out, and jobs that have not started. A job that still runs counts
with the time that it has run. Trackable resources are as in `slurm.conf(5)`: `cpu=16,gres/gpu:a100=4,mem=128G,node=1`.
The job's own type names the model (`a100`); where it names none, or several, any model will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from ..fleet.state import WHOLE_MILLI
from .jobs import SECONDS_MOST, Job
from .trace import AMOUNT_MOST, DEVICES_MOST, TraceError, open_text, reading

_UNKNOWN: Final = {"", "unknown", "none", "n/a", "invalid"}
_WAITING: Final = ("PENDING", "REQUEUED", "RESV_DEL_HOLD", "CONFIGURING")
_ELAPSED: Final = re.compile(r"(?:(?P<d>\d{1,6})-)?(?:(?P<h>\d{1,6}):)?(?P<m>\d{1,6}):(?P<s>\d{1,6})(?:\.\d+)?")
_AMOUNT: Final = re.compile(r"(\d{1,15}(?:\.\d+)?)([KMGTPE]?)[cn]?", re.IGNORECASE)
_MIB: Final = {"K": 2.0**-10, "": 1.0, "M": 1.0, "G": 2.0**10, "T": 2.0**20, "P": 2.0**30, "E": 2.0**40}
"""Slurm's memory is in MiB where it has no unit."""
_TIMES: Final = ("submit", "elapsedraw", "elapsed")


def read_sacct(path: Path) -> list[Job]:
    """Read jobs, in order of their submission; the first is submitted at 0.

    Raises:
        TraceError: the file can't be read, lacks a field, or has an invalid value; with the line.
    """
    submitted: list[tuple[float, Job]] = []
    for line, row in _rows(path):
        job = _job(row, f"{path}, line {line}")
        if job is not None:
            submitted.append(job)
    if not submitted:
        raise TraceError(f"{path} has no job that has started")
    submitted.sort(key=lambda entry: entry[0])
    first = submitted[0][0]
    return [replace(job, number=number, submit_seconds=at - first) for number, (at, job) in enumerate(submitted)]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with reading(path), open_text(path) as file:
        header = [name.strip().lower() for name in file.readline().rstrip("\r\n").rstrip("|").split("|")]
        _check(path, header)
        for number, text in enumerate(file, 2):
            cells = text.rstrip("\r\n").split("|")
            if not any(cells):
                continue
            if len(cells) == len(header) + 1 and not cells[-1]:  # --parsable ends each line with one
                cells.pop()
            yield number, dict(zip(header, _fitted(cells, header, f"{path}, line {number}"), strict=True))


def _check(path: Path, header: Sequence[str]) -> None:
    lacks = [name for name in ("jobid", "submit") if name not in header]
    if not {"elapsed", "elapsedraw"} & set(header):
        lacks.append("elapsedraw")
    if not {"alloctres", "reqtres"} & set(header):
        lacks.append("alloctres")
    if lacks:
        raise TraceError(f"{path} lacks {', '.join(lacks)}: its first line names {', '.join(header)}")


def _fitted(cells: list[str], header: Sequence[str], where: str) -> list[str]:
    """Cells of a line, one for each field. Further ones belong to the job's name, which may have any character."""
    more = len(cells) - len(header)
    if more > 0 and "jobname" in header:
        at = header.index("jobname")
        return [*cells[:at], "|".join(cells[at : at + more + 1]), *cells[at + more + 1 :]]
    if more:
        raise TraceError(f"{where}: {len(cells)} cells, but the first line names {len(header)} fields")
    return cells


def _job(row: Mapping[str, str], where: str) -> tuple[float, Job] | None:
    """Time of the submission and job; None for a step, and for one that has not started."""
    name = row["jobid"].strip()
    if not name:
        raise TraceError(f"{where}: JobID is empty")
    started = row.get("start", "started").strip().lower() not in _UNKNOWN
    if "." in name or not started or row.get("state", "").strip().upper().startswith(_WAITING):
        return None
    if row["submit"].strip().lower() in _UNKNOWN:
        return None
    seconds = _elapsed(row, where)
    tres = _first(row, ("alloctres", "reqtres"))
    gpus, model = _gpus(tres, where)
    if not seconds and not tres:  # canceled before it got anything
        return None
    job = Job(
        number=0,
        name=row.get("jobname", "").strip() or name,
        submit_seconds=0.0,
        duration_seconds=seconds,
        gpus=gpus,
        share_milli=WHOLE_MILLI if gpus else 0,
        cpus_milli=int(1000 * _amount(tres, "cpu", where)),
        memory_mib=int(_amount(tres, "mem", where)),
        models=(model,) if model else (),
        owner=row.get("user", row.get("account", "")).strip(),
    )
    return _submitted(row["submit"].strip(), where), job


def _first(row: Mapping[str, str], names: Sequence[str]) -> str:
    return next((text for name in names if (text := row.get(name, "").strip())), "")


def _submitted(text: str, where: str) -> float:
    try:
        return float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise TraceError(f"{where}: Submit is {text!r}, which is no time as 2026-11-29T12:00:00") from None


def _elapsed(row: Mapping[str, str], where: str) -> float:
    raw = row.get("elapsedraw", "").strip()
    text = raw or row.get("elapsed", "").strip()
    if text.lower() in _UNKNOWN:
        return 0.0
    if raw.isdecimal() and len(raw) < 16:
        found = float(raw)
    else:
        match = _ELAPSED.fullmatch(text)
        if match is None:
            raise TraceError(f"{where}: elapsed time is {text!r}, but [D-]HH:MM:SS is what it must be")
        days, hours, minutes, secs = (int(match[part] or 0) for part in "dhms")
        found = float(((days * 24 + hours) * 60 + minutes) * 60 + secs)
    if found > SECONDS_MOST:
        raise TraceError(f"{where}: elapsed time is {text}, but {SECONDS_MOST:.0e} seconds is the most")
    return found


def _gpus(tres: str, where: str) -> tuple[int, str]:
    """Number of devices, and their model if one is named."""
    total = 0.0
    typed: dict[str, float] = {}
    for entry in tres.split(","):
        name, _, amount = entry.strip().partition("=")
        if name == "gres/gpu":
            total = _number(amount, where, name)
        elif name.startswith("gres/gpu:"):
            typed[name.removeprefix("gres/gpu:")] = _number(amount, where, name)
    typed = {name: count for name, count in typed.items() if count}
    # The total includes the typed ones, but may be missing.
    count = int(max(total, sum(typed.values())))
    if count > DEVICES_MOST:
        raise TraceError(f"{where}: {count} GPUs, but {DEVICES_MOST} is the most")
    return count, next(iter(typed)) if len(typed) == 1 else ""


def _amount(tres: str, wanted: str, where: str) -> float:
    for entry in tres.split(","):
        name, _, amount = entry.strip().partition("=")
        if name == wanted:
            return _number(amount, where, name)
    return 0.0


def _number(text: str, where: str, name: str) -> float:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise TraceError(f"{where}: {name} is {text!r}, which is no amount")
    found = float(match[1])
    if name == "mem":
        found *= _MIB[match[2].upper()]
    elif match[2]:
        found *= 1000.0 ** "KMGTPE".index(match[2].upper()) * 1000.0
    if found > AMOUNT_MOST:
        raise TraceError(f"{where}: {name} is {text}, but {AMOUNT_MOST} is the most")
    return found
