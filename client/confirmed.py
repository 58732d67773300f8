"""A grant that holds now: an answer may be an old one, and nothing starts on devices that somebody else has by then.

An answer that comes at once is as new as the question. Whoever had to wait for it may have slept meanwhile, the process
(SIGSTOP, a frozen container) or its machine, and the lease may have ended since: the planner is asked again, with a
clock that counts sleep. So it is where the request id may have been used before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

from msgspec.structs import replace

from ..bus.elapsed import elapsed_seconds
from ..schemas import requests
from .errors import CorralError, Ended, LeaseLost, ServiceError, TimedOut, TooManyRequests, Unavailable
from .holder import may_be_anothers
from .lease_calls import LeaseCalls

T = TypeVar("T")

FRESH_SECONDS: Final = 1.0
"""An answer that came within it needs no other."""
_OVER: Final = ("ended", "not_found", "not_owner")
"""Codes by which the planner says that a lease is its holder's no more; any other refusal passes."""
_RETRY_SECONDS: Final = 0.5
_GIVE_BACK_SECONDS: Final = 3.0
_MOST_TRIES: Final = 5


class Granted(NamedTuple):
    """An assignment that the planner stands by.

    Attributes:
        assignment: with the lease as it is.
        confirmed_at: when the planner was asked that said so (see `bus/elapsed.py`).
    """

    assignment: requests.Assignment
    confirmed_at: float


async def confirmed(
    client: LeaseCalls,
    request: requests.WorkRequest,
    ask: Callable[[requests.WorkRequest], Awaitable[requests.Assignment]],
) -> Granted:
    """Ask, and make sure that what was granted is still there.

    Args:
        client: to ask again with.
        request: what is asked.
        ask: asks it.

    Raises:
        Ended: the lease of a request id that was given has ended.
        LeaseLost: the lease has ended while this process slept.
        Unavailable, NoService, TimedOut: nobody could be asked in time; the lease was given back as far as that went,
            unless another process may hold it.
    """
    named, began = request.request_id is not None, elapsed_seconds()
    wait = request.wait_seconds
    for last in [False] * (_MOST_TRIES - 1) + [True]:
        asked_at = elapsed_seconds()
        try:
            assignment = await ask(request)
        except Ended:  # its answer was lost, and asked for again too late
            if named or last:
                raise
            request = _later(request, wait, began)
            continue
        lease, fresh = assignment.lease, elapsed_seconds() - asked_at < FRESH_SECONDS
        if fresh and not named:
            return Granted(assignment, asked_at)
        patience = client.timeout + max(0.0, wait - (elapsed_seconds() - began))
        try:
            # One that is asked for again under its id keeps its time: to hold it is another matter.
            confirm = _active if fresh else renewed
            asking = _patiently(client, lease, confirm, patience)
            at, now = await given_back_on_failure(client, lease, request.holder, asking)
            return Granted(replace(assignment, lease=now), at)
        except LeaseLost as lost:
            if named:
                text = f"request id {request.request_id!r} was granted lease {lease.lease_id}, which has ended"
                raise Ended(f"{text} ({lost.reason}): ask under another id, or without one", "ended") from lost
            why = "it was granted while this process or its machine slept, and has ended since: ask again"
            raise LeaseLost(lease.lease_id, f"{why} ({lost.reason})") from lost
    raise AssertionError("unreachable")


def _later(request: requests.WorkRequest, wait_seconds: float, began: float) -> requests.WorkRequest:
    """The request with what is left of its wait."""
    return replace(request, wait_seconds=max(0.0, wait_seconds - (elapsed_seconds() - began)))


async def _active(client: LeaseCalls, lease: requests.Lease) -> requests.Lease:
    """A lease as it is."""
    found = await client.leases(lease_id=lease.lease_id)
    if not found:
        raise LeaseLost(lease.lease_id, "it is not active any more")
    return found[0]


async def _patiently(
    client: LeaseCalls,
    lease: requests.Lease,
    confirm: Callable[[LeaseCalls, requests.Lease], Awaitable[requests.Lease]],
    patience_seconds: float,
) -> tuple[float, requests.Lease]:
    """When the planner was asked, and what it says."""
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
    """A lease, for a whole time to live from now on.

    Args:
        client: to ask with.
        lease: which.
        holder: the process that holds it from now on; empty leaves that as it is.

    Raises:
        LeaseLost: the planner says that it has ended.
        ServiceError: it refused for now.
        Unavailable, NoService, TimedOut: nobody answered.
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


async def given_back_on_failure(client: LeaseCalls, lease: requests.Lease, own: str, work: Awaitable[T]) -> T:
    """The result of work on a lease that nobody will use if it fails, or is cancelled: it is given back then.

    Args:
        client: to give it back with.
        lease: which; one that another process may hold stays.
        own: the name of this process, if it said one.
        work: raises `LeaseLost` where the lease has ended.
    """
    try:
        return await work
    except LeaseLost:
        raise
    except BaseException:
        if may_be_anothers(lease, own):
            raise
        with contextlib.suppress(CorralError, TimeoutError):
            async with asyncio.timeout(_GIVE_BACK_SECONDS):
                await client.release(lease.lease_id, owner=lease.owner)
        raise
