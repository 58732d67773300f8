"""Processes of this host and the lease that each works under, from `/proc` (proc(5)); none where there is no Linux.

Nothing but the standard library: `cli/work/reaper.py` loads this file by its path, without the package.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

PROC: Final = Path("/proc")
LEASE_VARIABLE: Final = b"CORRAL_LEASE"
REAPER_FILE: Final = b"reaper.py"
_ENDED: Final = frozenset("ZXx")


class Process(NamedTuple):
    """A process as the kernel lists it.

    Attributes:
        pid: its id.
        parent: id of its parent.
        started_ticks: when it started, clock ticks since the boot: with the id it names the process for good; 0 where
            that is not known.
        state: a letter, such as `R`, `S`, `T` (stopped) or `Z` (a zombie).
        name: of the executable, 15 characters at most.
    """

    pid: int
    parent: int
    started_ticks: int
    state: str
    name: str

    @property
    def ended(self) -> bool:
        """Whether it only waits to be reaped."""
        return self.state in _ENDED

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"


def process(pid: int, root: Path = PROC) -> Process | None:
    """A process by its id; None if there is none."""
    try:
        text = (root / str(pid) / "stat").read_bytes().decode("utf-8", "replace")
        # The name in brackets may hold anything, so fields are counted behind it: state, parent, …, start.
        head, _, tail = text.rpartition(")")
        fields = tail.split()
        return Process(pid, int(fields[1]), int(fields[19]), fields[0], head.partition("(")[2])
    except (OSError, IndexError, ValueError):
        return None


def processes(root: Path = PROC) -> Iterator[Process]:
    """All processes that are there."""
    try:
        entries = os.listdir(root)
    except OSError:
        return
    for entry in entries:
        if entry.isdigit() and (found := process(int(entry), root)) is not None:
            yield found


def lease_of(pid: int, root: Path = PROC) -> str:
    """`CORRAL_LEASE` in the environment that a process was started with; empty if it has none or can't be read."""
    try:
        environment = (root / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    prefix = LEASE_VARIABLE + b"="
    for entry in environment.split(b"\0"):
        if entry.startswith(prefix):
            return entry[len(prefix) :].decode("utf-8", "replace")
    return ""


def reaper_of(pid: int, root: Path = PROC) -> str:
    """The lease that a process is the reaper of (`cli/work/reaper.py`); empty if it is none."""
    try:
        words = (root / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    for at, word in enumerate(words[:-1]):
        if os.path.basename(word) == REAPER_FILE:
            return words[at + 1].decode("utf-8", "replace")
    return ""


def user_of(pid: int, root: Path = PROC) -> str:
    """Name of the account that runs a process; empty if it has ended."""
    try:
        number = (root / str(pid)).stat().st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def working(lease_id: str, tops: Collection[int], *, spared: Collection[int] = (), root: Path = PROC) -> list[Process]:
    """Processes that work under a lease: those given, and all that descend from them.

    What works under another lease is not among them, nor what it has started, nor a `corral run` that holds one.

    Args:
        lease_id: of the lease; empty for descent alone.
        tops: ids of the processes that the others descend from.
        spared: ids of processes that are not among them, though their children may be.
        root: where the process file system is.
    """
    table = {found.pid: found for found in processes(root)}
    children: dict[int, list[int]] = {}
    for found in table.values():
        children.setdefault(found.parent, []).append(found.pid)
    seen: set[int] = set()
    open_ends = [pid for pid in tops if pid in table]
    ours: list[Process] = []
    while open_ends:
        pid = open_ends.pop()
        below = children.get(pid, ())
        if pid in seen or (lease_id and pid not in spared and _another(pid, below, lease_id, root)):
            continue
        seen.add(pid)
        open_ends += below
        if pid not in spared and not table[pid].ended:
            ours.append(table[pid])
    return ours


def naming(lease_id: str, *, since_ticks: int = 0, root: Path = PROC) -> list[Process]:
    """Processes whose environment names a lease, wherever they have gone, as far as it can be read.

    Args:
        lease_id: of the lease.
        since_ticks: when its work began, clock ticks since the boot: what is older is not looked into.
        root: where the process file system is.
    """
    new = (found for found in processes(root) if found.started_ticks >= since_ticks and not found.ended)
    return [found for found in new if lease_of(found.pid, root) == lease_id]


def _another(pid: int, children: Collection[int], lease_id: str, root: Path) -> bool:
    """Whether a process works under another lease, or is the `corral run` that holds it."""
    if lease_of(pid, root) not in ("", lease_id):
        return True
    return any(reaper_of(child, root) not in ("", lease_id) for child in children)


def same(found: Process) -> bool:
    """Whether a process is still there, and has not ended."""
    now = process(found.pid)
    return now is not None and now.started_ticks == found.started_ticks and not now.ended


def send(found: Process, number: int) -> bool:
    """Signal a process, and surely no other that got its id meanwhile. Returns whether that is allowed."""
    with contextlib.suppress(ProcessLookupError):
        try:
            handle = os.pidfd_open(found.pid)
        except (AttributeError, OSError):  # no such process, no such call (another system, or Linux before 5.3)
            handle = -1
        try:
            now = process(found.pid)
            if found.started_ticks and (now is None or now.started_ticks != found.started_ticks):
                return True
            if handle >= 0:
                signal.pidfd_send_signal(handle, number)
            else:
                os.kill(found.pid, number)
        except PermissionError:
            return False
        finally:
            if handle >= 0:
                os.close(handle)
    return True
