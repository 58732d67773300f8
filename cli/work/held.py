"""A lease around a command: it starts only while the lease certainly holds, and outages are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from typing import Final

from ...client.lease import HeldLease
from ..exits import FAILED
from ..options import say
from .children import NotStarted, TooLate

_TRIES: Final = 10
_LOOK_SECONDS: Final = 1.0


async def start_in_time(held: HeldLease, start: Callable[[float], Awaitable[None]]) -> None:
    """Start a command while its lease certainly holds, in as many tries as that takes.

    This process may sleep (SIGSTOP, a machine that is suspended) between the planner's word and that moment. The new
    process looks at a clock that counts sleep, and does not become the command where it is too late.

    Args:
        held: the lease.
        start: starts the command by a time (see `bus/elapsed.py`), or raises `TooLate`.

    Raises:
        LeaseLost: the lease has ended.
        CorralError: the planner can't be asked, where that is needed.
        NotStarted: the command can't be started.
    """
    for _ in range(_TRIES):
        start_by = await held.ready()
        with contextlib.suppress(TooLate):
            await start(start_by)
            return
    raise NotStarted("this machine is too busy to start the command in the time that its lease allows", FAILED)


@contextlib.contextmanager
def telling_outages(held: HeldLease, quiet: bool) -> Generator[None]:
    """Say so where the lease can't be renewed in its time, and when it is renewed again."""
    telling = asyncio.ensure_future(_tell(held, quiet))
    try:
        yield
    finally:
        telling.cancel()


async def _tell(held: HeldLease, quiet: bool) -> None:
    told = False
    while held.lost is None:
        await asyncio.sleep(_LOOK_SECONDS)
        if held.overdue and not told:
            say(
                f"corral: the lease could not be renewed for {held.unconfirmed_seconds:.0f} s, bus or planner can't be "
                "reached: the command goes on until a planner says that it has ended (--on-outage stop ends it)"
            )
            told = True
        elif told and not held.overdue and held.lost is None:
            told = False
            if not quiet:
                say("corral: the lease is renewed again")
