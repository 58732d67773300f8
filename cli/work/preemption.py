"""Preemption of a command's lease: passes the notice on, and says when the command has to be ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from datetime import datetime
from typing import Final

from ...client import CorralError
from ...client.leases.lease import HeldLease
from ...schemas import codec
from ...schemas.requests import LeaseState, Preemption
from ..exits import USAGE, CommandError
from ..options import say

RESTARTS_VARIABLE: Final = "CORRAL_RESTART_COUNT"
"""Environment variable with the number of times that `corral run --requeue` has run the command again."""
_MARGIN_SECONDS: Final = 5.0
"""Time between SIGTERM and SIGKILL at the end of a notice: as much, or a fifth of a short notice."""
_MARGIN_FRACTION: Final = 0.2
_POLL_SECONDS: Final = 1.0
"""Interval at which a change of the end is noticed: the command may put it off."""
_CONFIRM_SECONDS: Final = 2.0


class Notices:
    """The notices of preemption that a lease gets.

    Args:
        number: signal for the command at a notice; None for none.

    Attributes:
        send: sends a signal to the command; set it once that runs.
    """

    def __init__(self, number: signal.Signals | None) -> None:
        self.send: Callable[[int], None] = lambda _: None
        self._number = number
        self._noticed = asyncio.Event()

    def notice(self, _: Preemption) -> None:
        """Note that the lease has a notice, as its `on_preempt`."""
        self._noticed.set()

    async def until_due(self, held: HeldLease) -> float:
        """Wait until the command has to be ended since its lease will be preempted; announce each notice before.

        Returns:
            Seconds until the lease ends.
        """
        announced: datetime | None = None
        while True:
            notice, left = held.preemption, held.preempted_in_seconds
            if notice is None or left is None:
                if announced is not None:
                    say("corral: the preemption was withdrawn: the command goes on")
                announced = None
                self._noticed.clear()
                await self._noticed.wait()
                continue
            margin = min(_MARGIN_SECONDS, _MARGIN_FRACTION * (notice.ends_at - notice.notified_at).total_seconds())
            if notice.notified_at != announced:
                announced = notice.notified_at
                self._announce(notice, left, margin)
            if left > margin:
                await asyncio.sleep(min(left - margin, _POLL_SECONDS))
                continue
            with contextlib.suppress(
                CorralError, codec.DecodeError, TimeoutError
            ):  # it may have been withdrawn, or put off
                async with asyncio.timeout(min(_CONFIRM_SECONDS, margin / 2)):
                    await held.confirm()
            if held.preemption == notice:
                return max(0.0, held.preempted_in_seconds or 0.0)

    def _announce(self, notice: Preemption, left: float, margin: float) -> None:
        who = f" for {notice.claimant_owner}" if notice.claimant_owner else ""
        sent = "" if self._number is None else f"{self._number.name} is sent to the command now, "
        say(
            f"corral: the lease is preempted{who} and ends in {left:.0f} s ({notice.reason}): {sent}"
            f"SIGTERM in {max(0.0, left - margin):.0f} s, SIGKILL at the end"
        )
        if self._number is not None:
            self.send(self._number)


async def was_preempted(held: HeldLease) -> bool:
    """True if a lease has the notice of a preemption, or was ended by one."""
    if held.lost is None:
        return held.preemption is not None
    found = await held.client.leases(lease_id=held.lease_id, states=tuple(LeaseState))
    return bool(found) and found[0].preemption is not None


def parse_signal(text: str, option: str = "--on-preempt") -> signal.Signals:
    """Parse the name or number of a signal: `SIGUSR1`, `usr1` or `10`.

    Raises:
        CommandError: there is no such signal.
    """
    name = text.upper().removeprefix("SIG")
    with contextlib.suppress(ValueError):
        return signal.Signals(int(name))
    try:
        return signal.Signals[f"SIG{name}"]
    except KeyError:
        raise CommandError(f"{option} {text!r} is no signal: use a name such as SIGUSR1", USAGE) from None
