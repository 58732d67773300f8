"""The choice of an executor: what a host has, what its runner may use, and what a job needs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from . import containers, process, systemd
from .command import Confined, Work


class Name(StrEnum):
    """Name of an executor."""

    SYSTEMD = "systemd"
    PODMAN = "podman"
    DOCKER = "docker"
    PROCESS = "process"


class ExecutorError(ValueError):
    """Nothing on this host can execute a job; the message says why."""


class Executors:
    """The executors of this host.

    Args:
        allowed: names of those that may be used; empty for all that there are.

    Attributes:
        names: of those that there are and that may be used, best first.
        unconfined: what jobs without an image are not kept from here; empty if they are kept from all that they were
            not granted.
    """

    def __init__(self, allowed: Sequence[Name] = ()) -> None:
        there = [*([Name.SYSTEMD] if systemd.available() else []), *map(Name, containers.available()), Name.PROCESS]
        self.names = [name for name in there if not allowed or name in allowed]
        self.unconfined = ""
        if Name.SYSTEMD not in self.names:
            self.unconfined = "they are plain processes: nothing keeps them from what they were not granted"
        elif not systemd.keeps_devices():
            self.unconfined = "systemd can't keep them from devices: there is no cgroup controller for these"

    def choose(self, image: str) -> Name:
        """The executor for a job with an image, or without one.

        Raises:
            ExecutorError: there is none.
        """
        fit = (Name.PODMAN, Name.DOCKER) if image else (Name.SYSTEMD, Name.PROCESS)
        found = next((name for name in self.names if name in fit), None)
        if found is None:
            wanted = "Podman or Docker for the image" if image else "an executor for jobs without an image"
            raise ExecutorError(f"there is no {wanted} here (executors: {', '.join(self.names) or 'none'})")
        return found


def confine(name: Name, work: Work) -> Confined:
    """Confine a run.

    Raises:
        ValueError: it can't be, such as for want of a device's CDI name.
    """
    if name is Name.SYSTEMD:
        return systemd.confine(work)
    if name is Name.PROCESS:
        return process.confine(work)
    return containers.confine(name, work)
