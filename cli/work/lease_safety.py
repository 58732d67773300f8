"""Starts a command only while its lease is certainly active, and reports outages and idle devices to the user."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from typing import Final

from ...client.leases.lease import HeldLease
from ...schemas.requests import IdleNotice
from ..exits import FAILED
from ..options import say
from ..render import idle_outcome, local_time
from .children import NotStarted, TooLate

_TRIES: Final = 10
_POLL_SECONDS: Final = 1.0


async def start_in_time(held: HeldLease, start: Callable[[float], Awaitable[None]]) -> None:
    """Start a command while its lease is certainly active, with up to ten attempts.

    This process may be suspended (by SIGSTOP, or with its machine) between the planner's answer and the start. So the
    new process checks a clock that counts suspended time, and doesn't execute the command if it is too late.

    Args:
        held: the lease.
        start: starts the command by a given time (see `bus/elapsed.py`), or raises `TooLate`.

    Raises:
        LeaseLost: the lease has ended.
        CorralError: the lease had to be confirmed, and the planner could not be asked.
        NotStarted: the command can't be started.
    """
    for _ in range(_TRIES):
        start_by = await held.ready()
        with contextlib.suppress(TooLate):
            await start(start_by)
            return
    raise NotStarted("this machine is too busy to start the command within the lease's time to live", FAILED)


@contextlib.contextmanager
def reporting_troubles(held: HeldLease, quiet: bool) -> Generator[None]:
    """For the length of a block, print a message when the lease isn't renewed in time, and when its devices are idle.

    Another is printed when that is over.
    """
    reporting = [asyncio.ensure_future(report(held, quiet)) for report in (_report_outages, _report_idleness)]
    try:
        yield
    finally:
        for task in reporting:
            task.cancel()


async def _report_outages(held: HeldLease, quiet: bool) -> None:
    reported = False
    while held.lost is None:
        await asyncio.sleep(_POLL_SECONDS)
        if held.overdue and not reported:
            say(
                f"corral: the lease could not be renewed for {held.unconfirmed_seconds:.0f} s, bus or planner can't be "
                "reached: the command continues until a planner reports that the lease has ended (see --on-outage)"
            )
            reported = True
        elif reported and not held.overdue and held.lost is None:
            reported = False
            if not quiet:
                say("corral: the lease is renewed again")


async def _report_idleness(held: HeldLease, quiet: bool) -> None:
    reported: IdleNotice | None = None
    while held.lost is None:
        await asyncio.sleep(_POLL_SECONDS)
        notice = held.idle
        if notice is not None and notice != reported:
            since = local_time(notice.since, "%H:%M %Z")
            say(
                f"corral: the GPUs of the lease are idle since {since}{idle_outcome(notice)}: "
                f"{notice.rule} (rule of group {notice.group})"
            )
        elif notice is None and reported is not None and not quiet:
            say("corral: the warning about idle GPUs was withdrawn")
        reported = notice
