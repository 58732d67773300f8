"""Process names that are the same inside and outside of a container, to find out whose child a process is.

A name is `<boot id>/<pid>/<start>`: the boot of the machine, the process id as the process itself sees it (in a
container another than the host's), and its start in clock ticks since the boot, so that a reused process id gives
another name. Any user may read all of it (proc(5)), whereas only its owner may read a process's environment.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SERVICES: Final = frozenset(
    {
        "nvidia-cuda-mps-server",
        "nvidia-cuda-mps-control",
        "nvidia-persistenced",
        "nv-hostengine",
        "dcgm-exporter",
        "Xorg",
        "Xwayland",
        "gnome-shell",
        "gnome-remote-desktop-daemon",
        "kwin_wayland",
    }
)
"""Programs that serve a device's users and hold no lease: the driver's daemons, and desktops."""

PROC: Final = Path("/proc")
MAX_ANCESTORS: Final = 64


def is_service(name: str, kind: str) -> bool:
    """True if a process serves all users of the device: a desktop, or a daemon of the driver.

    Args:
        name: of its executable.
        kind: as in `ProcessSample`.
    """
    return kind == "graphics" or name in SERVICES


def own_name() -> str:
    """Name of this process; empty if there is no `/proc`."""
    return next(lineage(os.getpid()), "")


def lineage(pid: int, root: Path = PROC) -> Iterator[str]:
    """Yield the names of a process and of its ancestors, nearest first, as far as they can be read.

    Args:
        pid: as this process sees it.
        root: where the process file system is.
    """
    boot = _boot(root)
    if not boot:
        return
    for _ in range(MAX_ANCESTORS):
        try:
            # The name in brackets may hold anything, so fields are counted behind it: state, parent, …, start.
            fields = (root / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            yield f"{boot}/{_own_pid(pid, root)}/{fields[19]}"
            pid = int(fields[1])
        except (OSError, IndexError, ValueError):  # it has ended meanwhile
            return
        if pid <= 1:
            return


def _own_pid(pid: int, root: Path) -> str:
    """Process id within the process's namespace."""
    for line in (root / str(pid) / "status").read_text("utf-8", "replace").splitlines():
        if line.startswith("NSpid:"):
            return line.split()[-1]
    return str(pid)


@functools.cache
def _boot(root: Path) -> str:
    try:
        return (root / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
