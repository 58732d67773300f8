"""Identity of processes, the same inside and outside of a container, from `/proc` (proc(5)).

The name of a process is `<boot id>/<pid>/<start>`: the boot of the machine, the process id as the process itself sees
it (in a container another than the host's), and its start in clock ticks since the boot, so that a reused process id
gives another name. Any user may read all of it, whereas only its owner may read a process's environment.

The start is in ticks because psutil gives it as a time of day, which moves with the clock.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

PROC: Final = Path("/proc")
MAX_ANCESTORS: Final = 64
_INITIAL_NAMESPACE: Final = "pid:[4026531836]"
"""The pid namespace of the host itself: the kernel gives it this number (`PROC_PID_INIT_INO` in linux/proc_ns.h)."""


class ProcessStat(NamedTuple):
    """State of a process, from `/proc/PID/stat`.

    Attributes:
        state: letter of its state, such as `R` or `Z`.
        parent: process id of its parent.
        started_ticks: start in clock ticks since the boot.
    """

    state: str
    parent: int
    started_ticks: int

    @property
    def ended(self) -> bool:
        """True if it has ended and only remains to be reaped by its parent."""
        return self.state in ("Z", "X")


def process_stat(pid: int, root: Path = PROC) -> ProcessStat | None:
    """State of a process; None if there is none with this id.

    Args:
        pid: as this process sees it.
        root: path of the process file system.
    """
    try:
        # The name in brackets may hold anything, so fields are counted behind it: state, parent, …, start.
        fields = (root / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return ProcessStat(fields[0], int(fields[1]), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


@functools.cache
def boot_id(root: Path = PROC) -> str:
    """Id of this boot of the machine; empty if it can't be read."""
    try:
        return (root / "sys/kernel/random/boot_id").read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def pid_namespace(root: Path = PROC) -> str:
    """Pid namespace of this process, within which a process id names one process; empty if it can't be read."""
    try:
        return os.readlink(root / "self/ns/pid")
    except OSError:
        return ""


def sees_host_processes(root: Path = PROC) -> bool:
    """True if process ids here are those of the host, which are the ones that a GPU driver gives.

    In a container with its own process ids the same number is another process, or none. A kernel without namespaces
    has one for all.
    """
    return pid_namespace(root) in ("", _INITIAL_NAMESPACE)


def own_name() -> str:
    """Name of this process; empty if there is no `/proc`."""
    return process_name(os.getpid())


def process_name(pid: int, root: Path = PROC) -> str:
    """Name of a process; empty if it has ended, or if there is no `/proc`."""
    return next(lineage(pid, root), "")


def lineage(pid: int, root: Path = PROC) -> Iterator[str]:
    """Yield the names of a process and of its ancestors, nearest first, as far as they can be read.

    Args:
        pid: as this process sees it.
        root: path of the process file system.
    """
    boot = boot_id(root)
    if not boot:
        return
    for _ in range(MAX_ANCESTORS):
        stat, inside = process_stat(pid, root), _pid_inside(pid, root)
        if stat is None or not inside:  # it has ended meanwhile
            return
        yield f"{boot}/{inside}/{stat.started_ticks}"
        pid = stat.parent
        if pid <= 1:
            return


def _pid_inside(pid: int, root: Path) -> str:
    """Process id within the process's own namespace; empty if it has ended."""
    try:
        status = (root / str(pid) / "status").read_text("utf-8", "replace")
    except OSError:
        return ""
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return line.split()[-1]
    return str(pid)
