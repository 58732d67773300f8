"""Confirms that a granted lease is still active before it is used, since the answer may be outdated.

An answer that comes at once is current. While a request waits, its process (SIGSTOP, a frozen container) or machine
may be suspended, and the lease may end before the process resumes: work would then start on devices that are leased to
another process. So the planner is asked again, and time is measured with a clock that counts suspended time. The same
check is made if the caller gave a request id, which may have been used before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

from msgspec.structs import replace

from ...bus.elapsed import elapsed_seconds
from ...schemas import requests
from ..errors import CorralError, Ended, LeaseLost, ServiceError, TimedOut, TooManyRequests, Unavailable
from .calls import LeaseCalls
from .holder import may_have_other_holder

T = TypeVar("T")

FRESH_SECONDS: Final = 1.0
"""An answer that took less than this many seconds needs no confirmation."""
_OVER: Final = ("ended", "not_found", "not_owner")
"""Error codes by which the planner says that the lease is lost to its holder; any other refusal is temporary."""
_RETRY_SECONDS: Final = 0.5
_RELEASE_SECONDS: Final = 3.0
_MAX_TRIES: Final = 5


class Granted(NamedTuple):
    """An assignment that the planner has confirmed.

    Attributes:
        assignment: the assignment, with the current state of its lease.
        confirmed_at: time at which the confirming question was sent, in the clock of `bus/elapsed.py`.
    """

    assignment: requests.Assignment
    confirmed_at: float


async def confirmed(
    client: LeaseCalls,
    request: requests.WorkRequest,
    ask: Callable[[requests.WorkRequest], Awaitable[requests.Assignment]],
) -> Granted:
    """Send a request, and confirm that the granted lease is still active.

    Args:
        client: used to confirm the lease.
        request: the request.
        ask: sends the request.

    Raises:
        Ended: the lease of a request id that the caller gave has ended.
        LeaseLost: the lease ended while this process or its machine was suspended.
        Unavailable, NoService, TimedOut: no planner answered in time. The lease was released if possible, unless
            another process may hold it.
    """
    named, began = request.request_id is not None, elapsed_seconds()
    wait = request.wait_seconds
    for last in [False] * (_MAX_TRIES - 1) + [True]:
        asked_at = elapsed_seconds()
        try:
            assignment = await ask(request)
        except Ended:  # the answer was lost, and the lease had ended by the time of the retry
            if named or last:
                raise
            request = _later(request, wait, began)
            continue
        lease, fresh = assignment.lease, elapsed_seconds() - asked_at < FRESH_SECONDS
        if fresh and not named:
            return Granted(assignment, asked_at)
        patience = client.timeout + max(0.0, wait - (elapsed_seconds() - began))
        try:
            # A request that is sent again under its id must not extend the lease: a fresh answer is only looked up.
            confirm = _active if fresh else renewed
            asking = _patiently(client, lease, confirm, patience)
            at, now = await release_on_failure(client, lease, request.holder, asking)
            return Granted(replace(assignment, lease=now), at)
        except LeaseLost as lost:
            if named:
                text = f"request id {request.request_id!r} was granted lease {lease.lease_id}, which has ended"
                raise Ended(f"{text} ({lost.reason}): use another id, or none", "ended") from lost
            why = "it was granted while this process or its machine was suspended, and has ended since: request again"
            raise LeaseLost(lease.lease_id, f"{why} ({lost.reason})") from lost
    raise AssertionError("unreachable")


def _later(request: requests.WorkRequest, wait_seconds: float, began: float) -> requests.WorkRequest:
    """The request, with the rest of its waiting time."""
    return replace(request, wait_seconds=max(0.0, wait_seconds - (elapsed_seconds() - began)))


async def _active(client: LeaseCalls, lease: requests.Lease) -> requests.Lease:
    """The current state of a lease; raises `LeaseLost` if it isn't active."""
    found = await client.leases(lease_id=lease.lease_id)
    if not found:
        raise LeaseLost(lease.lease_id, "it is no longer active")
    return found[0]


async def _patiently(
    client: LeaseCalls,
    lease: requests.Lease,
    confirm: Callable[[LeaseCalls, requests.Lease], Awaitable[requests.Lease]],
    patience_seconds: float,
) -> tuple[float, requests.Lease]:
    """Confirm a lease, with retries. Returns the time at which the answered question was sent, and the lease.

    An answer that takes half a time to live or longer is discarded, and the question is asked again.
    """
    give_up = elapsed_seconds() + patience_seconds
    while True:
        asked_at, pause = elapsed_seconds(), _RETRY_SECONDS
        try:
            now = await confirm(client, lease)
            took = elapsed_seconds() - asked_at
            if took < lease.ttl_seconds / 2:
                return asked_at, now
            if elapsed_seconds() > give_up:
                raise TimedOut(f"the planner answers in {took:.1f} s, too late for a lease of {lease.ttl_seconds:g} s")
        except (Unavailable, TimedOut, TooManyRequests) as error:
            if elapsed_seconds() > give_up:
                raise
            if isinstance(error, TooManyRequests) and error.retry_after_seconds is not None:
                pause = error.retry_after_seconds
        await asyncio.sleep(pause)


async def renewed(client: LeaseCalls, lease: requests.Lease, holder: str = "") -> requests.Lease:
    """Renew a lease for a full time to live from now.

    Args:
        client: used to ask the planner.
        lease: the lease to renew.
        holder: name of the process that holds the lease from now on; empty leaves the holder unchanged.

    Returns:
        The lease after the renewal.

    Raises:
        LeaseLost: the planner says that the lease has ended.
        ServiceError: the planner refused for now.
        Unavailable, NoService, TimedOut: no planner answered.
    """
    try:
        after = await client.renew(lease.lease_id, owner=lease.owner, holder=holder)
    except ServiceError as error:
        if error.code in _OVER:
            raise LeaseLost(lease.lease_id, str(error)) from error
        raise
    if after.state is not requests.LeaseState.ACTIVE:
        raise LeaseLost(lease.lease_id, after.reason or after.state.value)
    return after


async def release_on_failure(client: LeaseCalls, lease: requests.Lease, own: str, work: Awaitable[T]) -> T:
    """Await work on a lease, and release the lease if the work fails or is cancelled.

    Args:
        client: used to release the lease.
        lease: the lease; it isn't released if another process may hold it.
        own: name of this process as holder; empty if the request named none.
        work: the awaitable. If it raises `LeaseLost`, the lease has ended and isn't released.

    Returns:
        The result of the work.
    """
    try:
        return await work
    except LeaseLost:
        raise
    except BaseException:
        if may_have_other_holder(lease, own):
            raise
        with contextlib.suppress(CorralError, TimeoutError):
            async with asyncio.timeout(_RELEASE_SECONDS):
                await client.release(lease.lease_id, owner=lease.owner)
        raise
