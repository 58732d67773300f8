"""Child processes that still run under a lease when the program releases it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Final

from ...bus import processes
from .holder import held_by_this_process

CHILDREN_GRACE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
_SHOWN: Final = 3
_MULTIPROCESSING_HELPERS: Final = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
"""Helper processes of Python's `multiprocessing` that live until the program ends and do no work on devices."""
_log: Final = logging.getLogger("corral.client")


def ticks_now() -> int:
    """Clock ticks since boot, the unit of process start times; 0 if unknown."""
    try:
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    except (AttributeError, OSError, ValueError):
        return 0


def children_under(lease_id: str, since_ticks: int) -> list[processes.Process]:
    """Processes that work under a lease of this process, other than this process.

    These are the processes that name the lease in their environment, with their descendants. Descendants of this
    process that started since the grant are included too, unless it holds other leases: they may belong to those.
    Helper processes of `multiprocessing` are left out.

    Args:
        lease_id: id of the lease.
        since_ticks: time of the grant, in clock ticks since boot.
    """
    own = os.getpid()
    tops = [
        found.pid for found in processes.processes_with_lease(lease_id, since_ticks=since_ticks) if found.pid != own
    ]
    if held_by_this_process <= {lease_id}:
        tops.append(own)
    found = processes.processes_under(lease_id, tops, spared={own})
    return [one for one in found if one.started_ticks >= since_ticks and not _is_multiprocessing_helper(one.pid)]


async def wait_for_children(lease_id: str, since_ticks: int, holds: Callable[[], bool], seconds: float) -> None:
    """Wait until no other process works under a lease that is about to be released.

    The processes are named in the log. Those that are left after `seconds` are named in a `ResourceWarning`.

    Args:
        lease_id: id of the lease, which is renewed while this function waits.
        since_ticks: time of the grant, in clock ticks since boot.
        holds: returns true while the lease is held; the wait ends when it isn't.
        seconds: maximum time to wait; 0 returns at once, without a log entry or a warning.
    """
    if seconds <= 0:
        return
    until, warned = time.monotonic() + seconds, False
    find_children: Callable[[], list[processes.Process]] = lambda: children_under(lease_id, since_ticks)  # noqa: E731
    while holds() and (left := await asyncio.to_thread(find_children)):
        if time.monotonic() >= until:
            message = f"lease {lease_id} is released while {_some(left)} may use its devices"
            _log.warning("%s", message)
            warnings.warn(message, ResourceWarning, stacklevel=2)
            return
        if not warned:
            warned = True
            _log.warning("lease %s is held up to %g s for %s", lease_id, seconds, _some(left))
        await asyncio.sleep(_POLL_SECONDS)


def _is_multiprocessing_helper(pid: int) -> bool:
    try:
        words = (processes.PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return any(name in words for name in _MULTIPROCESSING_HELPERS)


def _some(left: list[processes.Process]) -> str:
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return ", ".join(map(str, left[:_SHOWN])) + more
