"""Whether those who wait are connected, asked of the server and not of them.

Most NATS clients take all their answers on one subscription, `<inbox>.*`, and give each question a token of its own. A
message to a token that they never gave is dropped by them without a word. Sent with a reply subject, the server answers
it with `503` (no responders) if nobody has that subscription: so one who is connected is told from one who is gone.

It proves nothing where somebody listens to all inboxes (an operator's `nats sub '>'`), which a message to an inbox that
nobody has shows: all is then left open. Nor can it be asked of an inbox of one subject alone, or over accounts, where
the answer's subject is good for one message: who waits there is heard by asking again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from ...bus.permissions import ACROSS

log = logging.getLogger("corral.planner.broker.probe")

_TOKEN: Final = "corral-are-you-there"
_ANSWER_SECONDS: Final = 1.0
_AT_ONCE: Final = 500


def probed(reply_to: str) -> str | None:
    """The subject to ask in place of that of an answer; None where the answer's own is the only one."""
    inbox, _, token = reply_to.rpartition(".")
    if reply_to.startswith(ACROSS) or "." not in inbox or not token:
        return None
    return f"{inbox}.{_TOKEN}"


class Probe:
    """Asks the server.

    Args:
        nc: connection of the planner.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._absent: set[str] = set()
        self._round = 0
        self._last = asyncio.Event()
        self._asking = asyncio.Lock()

    async def present(self, replies: Sequence[str]) -> set[str]:
        """Those of some reply subjects whose clients are certainly connected."""
        found: set[str] = set()
        asked = [(reply, subject) for reply in dict.fromkeys(replies) if (subject := probed(reply)) is not None]
        async with self._asking:
            for at in range(0, len(asked), _AT_ONCE):
                present = await self._present(asked[at : at + _AT_ONCE])
                if present is None:
                    break
                found |= present
        return found

    async def _present(self, asked: list[tuple[str, str]]) -> set[str] | None:
        """Those of some; None where that can't be told now, of the others as little."""
        try:
            await self._listen()
            self._absent = set()
            self._round += 1  # what was given up may be answered yet, and is no answer to this
            self._last.clear()
            for number, (_, subject) in enumerate(asked):
                await self._nc.publish(subject, b"", reply=f"{self._inbox}.{self._round}-{number}")
            # The server answers in order: when it says that nobody has this one, it has said so of all the others.
            nobody = f"{self._nc.new_inbox()}.{_TOKEN}"
            await self._nc.publish(nobody, b"", reply=f"{self._inbox}.{self._round}-last")
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._last.wait()
        except TimeoutError:
            log.debug("somebody listens to all inboxes, or the server says nothing: who is there is not known")
            return None
        except (NatsError, OSError) as error:
            log.debug("who is there can't be asked: %r", error)
            return None
        return {reply for number, (reply, _) in enumerate(asked) if str(number) not in self._absent}

    async def _listen(self) -> None:
        if self._subscription is None:
            self._inbox = self._nc.new_inbox()
            self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._heard)

    async def _heard(self, message: Msg) -> None:
        if (message.headers or {}).get("Status") != "503":
            return
        asked, _, token = message.subject.rpartition(".")[2].partition("-")
        if asked != str(self._round):
            return
        if token == "last":
            self._last.set()
        else:
            self._absent.add(token)

    async def close(self) -> None:
        """Ask nothing any more."""
        if self._subscription is not None:
            with contextlib.suppress(NatsError, OSError):
                await self._subscription.unsubscribe()
            self._subscription = None
