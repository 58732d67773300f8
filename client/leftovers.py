"""Processes that a program has started under a lease, and that are there when it lets go of it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Final

from . import processes
from .holder import held_by_this_process

CHILDREN_GRACE_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.1
_SHOWN: Final = 3
_OF_PYTHON: Final = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
"""Processes of Python's own that live until the program ends and compute nothing."""
_log: Final = logging.getLogger("corral.client")


def ticks_now() -> int:
    """Clock ticks since the boot, as processes' starts are counted; 0 where that is not known."""
    try:
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    except (AttributeError, OSError, ValueError):
        return 0


def children_under(lease_id: str, since_ticks: int) -> list[processes.Process]:
    """Processes that work under a lease of this process: all that name it in their environment, and what this process
    has started since, unless it holds another lease, too, that this may be work of.

    Args:
        lease_id: of the lease.
        since_ticks: when it was granted, clock ticks since the boot.
    """
    own = os.getpid()
    tops = [found.pid for found in processes.naming(lease_id, since_ticks=since_ticks) if found.pid != own]
    if held_by_this_process <= {lease_id}:
        tops.append(own)
    found = processes.working(lease_id, tops, spared={own})
    return [one for one in found if one.started_ticks >= since_ticks and not _of_python(one.pid)]


async def wait_for_children(lease_id: str, since_ticks: int, holds: Callable[[], bool], seconds: float) -> None:
    """Wait, with a lease held, until nothing works under it that this process has started. What is left then is told.

    Args:
        lease_id: of the lease, which is renewed meanwhile.
        since_ticks: when it was granted, clock ticks since the boot.
        holds: whether it still holds; no longer is waited.
        seconds: at most; 0 does not wait, and tells of nothing.
    """
    if seconds <= 0:
        return
    until, told = time.monotonic() + seconds, False
    look: Callable[[], list[processes.Process]] = lambda: children_under(lease_id, since_ticks)  # noqa: E731
    while holds() and (left := await asyncio.to_thread(look)):
        if time.monotonic() >= until:
            message = f"lease {lease_id} is released while {_some(left)} may use its devices"
            _log.warning("%s", message)
            warnings.warn(message, ResourceWarning, stacklevel=2)
            return
        if not told:
            told = True
            _log.warning("lease %s is held up to %g s for %s", lease_id, seconds, _some(left))
        await asyncio.sleep(_LOOK_SECONDS)


def _of_python(pid: int) -> bool:
    try:
        words = (processes.PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return any(name in words for name in _OF_PYTHON)


def _some(left: list[processes.Process]) -> str:
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return ", ".join(map(str, left[:_SHOWN])) + more
