"""Whether another process holds a lease already: work of two processes on the same devices is nobody's wish.

A request id that is used again finds the lease that it was granted before. Whoever starts the same command again after
a crash may go on with it; beside one that still runs, nothing starts. A process of this machine can be looked for; one
of another machine or container renews the lease, and that is waited for.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from ..bus.elapsed import elapsed_seconds
from ..bus.process_identity import PROC, lineage, own_name
from ..schemas import requests
from .errors import Conflict, Ended
from .lease_calls import LeaseCalls

_INITIAL_NAMESPACE: Final = "pid:[4026531836]"
"""Of process ids: who is in it sees all processes of the machine (`PROC_PID_INIT_INO` of Linux)."""
_LOOK_SECONDS: Final = 0.5
_RENEWAL_FRACTION: Final = 0.42
"""A holder renews each third of the time to live; some time for it to get there."""
_SLACK_SECONDS: Final = 1.0

held_by_this_process: Final[set[str]] = set()
"""Ids of leases."""


async def check_no_other_holds(client: LeaseCalls, lease: requests.Lease, own: str) -> None:
    """See that a lease which may have been granted before is held by nobody else.

    Args:
        client: to ask with.
        lease: as it is.
        own: the name of this process.

    Raises:
        Conflict: somebody holds it.
        Ended: it has ended meanwhile.
    """
    if lease.lease_id in held_by_this_process:
        raise _conflict(lease, "this very process")
    if not lease.holder or lease.holder == own:
        return
    there = is_there(lease.holder)
    if there:
        raise _conflict(lease, f"process {lease.holder.split('/')[1]} of this machine")
    if there is None and await _is_renewed(client, lease):
        raise _conflict(lease, "another process, which renews it")


def may_be_anothers(lease: requests.Lease, own: str) -> bool:
    """Whether somebody else may hold a lease, so that it is not to be given back by one who only asked for it.

    Args:
        lease: as the planner has it.
        own: the name of the process that asked; empty if it did not say.
    """
    if lease.lease_id in held_by_this_process:
        return True
    return lease.holder not in ("", own) and is_there(lease.holder) is not False


def is_there(holder: str) -> bool | None:
    """Whether a process of this machine runs; None where that can't be told from here."""
    own = own_name()
    if not own or holder.split("/")[0] != own.split("/")[0] or holder.count("/") != 2:
        return None
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    if any(next(lineage(pid), "") == holder and not _is_zombie(pid) for pid in pids):
        return True
    return False if os.readlink(PROC / "self/ns/pid") == _INITIAL_NAMESPACE else None


def _is_zombie(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True


async def _is_renewed(client: LeaseCalls, lease: requests.Lease) -> bool:
    until = elapsed_seconds() + lease.ttl_seconds * _RENEWAL_FRACTION + _SLACK_SECONDS
    while elapsed_seconds() < until:
        await asyncio.sleep(_LOOK_SECONDS)
        found = await client.leases(lease_id=lease.lease_id)
        if not found:
            raise Ended(f"lease {lease.lease_id} has ended: ask under another request id", "ended")
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
