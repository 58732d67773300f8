"""Executors, which confine jobs on a host: systemd, Podman or Docker, or no more than a process group."""

from __future__ import annotations

from .choice import ExecutorError, Executors, Name, confine
from .command import Command, Confined, Work
from .inside import inside
from .removal import removal

__all__ = ["Command", "Confined", "ExecutorError", "Executors", "Name", "Work", "confine", "inside", "removal"]
