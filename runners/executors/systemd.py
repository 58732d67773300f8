"""Jobs as transient systemd units (systemd.resource-control(5)): only their devices, memory and cores.

The supervisor itself runs in the unit, and does there what it does elsewhere. So the environment does not go over
D-Bus, where any user can read it, and the exit status is written by the same code. When it ends, systemd ends whatever
is left in the unit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...schemas.requests import Grant
from .command import Confined, Work, limits
from .devices import device_nodes

_CGROUPS: Final = "/sys/fs/cgroup"
_BOOTED: Final = Path("/run/systemd/system")
"""Exists where systemd is the init system (sd_booted(3))."""


def available() -> bool:
    """True where systemd runs, and this process may start units."""
    return os.geteuid() == 0 and _BOOTED.is_dir() and shutil.which("systemd-run") is not None


def keeps_devices(mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """True if the kernel lets systemd keep units from devices (DeviceAllow= in systemd.resource-control(5)).

    That takes the controller `devices` of cgroups v1, or cgroups v2 as the only hierarchy. systemd says nothing where
    it has neither, as in some containers.

    Args:
        mounts: what is mounted (proc_pid_mountinfo(5)).
    """
    for line in mounts.read_text("utf-8", "replace").splitlines():
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        if kind == "cgroup" and "devices" in options.split(","):
            return True
        if kind == "cgroup2" and head.split()[4] == _CGROUPS:
            return True
    return False


def unit_name(key: str) -> str:
    """Name of a run's unit."""
    return f"corral-run-{key}.service"


def confine(work: Work) -> Confined:
    """Execute the commands in a unit of their own."""
    return Confined(commands=work.commands, account=work.switched, unit=options(work.key, work.run.grants))


def options(key: str, grants: Sequence[Grant]) -> list[str]:
    """Options of `systemd-run` for the unit of a run."""
    properties = {
        "Description": "Corral run",
        "Type": "exec",
        "KillMode": "control-group",
        "TimeoutStopSec": "10s",
        "CollectMode": "inactive-or-failed",
        # The command that takes too much is ended; the supervisor reports it.
        "OOMPolicy": "continue",
        "DevicePolicy": "closed",
    }
    cpus, memory = limits(grants)
    if memory:
        properties["MemoryMax"] = str(memory)
        properties["MemorySwapMax"] = "0"
    if cpus:
        properties["CPUQuota"] = f"{max(1, round(cpus * 100))}%"
    words = [f"--unit={unit_name(key)}", "--slice=corral.slice", "--quiet", "--no-ask-password"]
    words += [f"--property={name}={value}" for name, value in properties.items()]
    return words + [f"--property=DeviceAllow={node} rw" for node in device_nodes(grants)]
