"""Commands that remove a run that its supervisor no longer can."""

from __future__ import annotations

from . import containers, systemd


def removal(executor: str, key: str, processes: int) -> list[list[str]]:
    """Commands that end what an executor still has of a run.

    Args:
        executor: its name.
        key: name of the run.
        processes: number of its commands.
    """
    if executor in containers.PROGRAMS:
        return [[executor, "rm", "--force", *containers.names(key, processes)]]
    if executor == "systemd":
        return [["systemctl", "stop", systemd.unit_name(key)]]
    return []
