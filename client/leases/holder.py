"""Checks whether another process already holds a lease, so that two processes never work under the same lease.

A request id that is used again returns the lease that it was granted before. A command that is started again after a
crash may continue with that lease, but must not start while the earlier process still runs. A process on this machine
is looked up in `/proc`. A process on another machine or in another container is detected by its next renewal.
"""

from __future__ import annotations

import asyncio
from typing import Final

from ...bus.elapsed import elapsed_seconds
from ...bus.process_identity import PROC, own_name, process_name, process_stat, sees_host_processes
from ...schemas import requests
from ..errors import Conflict, Ended
from .calls import LeaseCalls

_POLL_SECONDS: Final = 0.5
_RENEWAL_FRACTION: Final = 0.42
"""Part of the time to live within which a holder must have renewed: a third, with a margin for the renewal itself."""
_SLACK_SECONDS: Final = 1.0

held_by_this_process: Final[set[str]] = set()
"""Ids of the leases that this process holds."""


async def check_no_other_holds(client: LeaseCalls, lease: requests.Lease, own: str) -> None:
    """Check that no other holder has a lease that may have been granted earlier.

    Args:
        client: used to read the lease again.
        lease: the lease in its current state.
        own: name of this process.

    Raises:
        Conflict: another process, or another part of this process, holds the lease.
        Ended: the lease has ended in the meantime.
    """
    if lease.lease_id in held_by_this_process:
        raise _conflict(lease, "this process")
    if not lease.holder or lease.holder == own:
        return
    there = is_running(lease.holder)
    if there:
        raise _conflict(lease, f"process {lease.holder.split('/')[1]} of this machine")
    if there is None and await _is_renewed(client, lease):
        raise _conflict(lease, "another process, which renews it")


def may_have_other_holder(lease: requests.Lease, own: str) -> bool:
    """True if another holder may have a lease, so that the process that requested it again must not release it.

    True as well if another part of this process holds it, or if it can't be determined that the holder has ended.

    Args:
        lease: the lease as the planner reports it.
        own: name of the process that made the request; empty if it named none.
    """
    if lease.lease_id in held_by_this_process:
        return True
    return lease.holder not in ("", own) and is_running(lease.holder) is not False


def is_running(holder: str) -> bool | None:
    """True if the process that a holder's name denotes is running; None if that can't be determined from here.

    It can't be determined if the process is on another machine, or may be outside this process's PID namespace.
    """
    own = own_name()
    if not own or holder.split("/")[0] != own.split("/")[0] or holder.count("/") != 2:
        return None
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    if any(process_name(pid) == holder and _is_running(pid) for pid in pids):
        return True
    return False if sees_host_processes() else None


def _is_running(pid: int) -> bool:
    stat = process_stat(pid)
    return stat is not None and not stat.ended


async def _is_renewed(client: LeaseCalls, lease: requests.Lease) -> bool:
    until = elapsed_seconds() + lease.ttl_seconds * _RENEWAL_FRACTION + _SLACK_SECONDS
    while elapsed_seconds() < until:
        await asyncio.sleep(_POLL_SECONDS)
        found = await client.leases(lease_id=lease.lease_id)
        if not found:
            raise Ended(f"lease {lease.lease_id} has ended: use another request id", "ended")
        if found[0].expires_at > lease.expires_at:
            return True
    return False


def _conflict(lease: requests.Lease, who: str) -> Conflict:
    return Conflict(
        f"lease {lease.lease_id} of request id {lease.request_id!r} is held by {who}: "
        "give each its own request id, or none",
        "conflict",
        "$.request_id",
    )
