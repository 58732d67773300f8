"""Health check of queued clients: finds which are connected, by asking the NATS server instead of the clients.

Most NATS clients receive all answers on one subscription, `<inbox>.*`, with another last token for each request. They
silently drop a message to a token that they never used. If such a message has a reply subject, the server answers it
with `503` (no responders) when there is no such subscription. That tells connected clients from those that are gone.

The probe proves nothing while a subscriber listens to all inboxes (an operator's `nats sub '>'`). A message to an inbox
that does not exist detects that; the result is then unknown. Nor does the probe work for an inbox of one subject alone,
or across accounts, where a reply subject takes one message only. Those clients are heard when they ask again.
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

from ....bus.permissions import ACROSS

log = logging.getLogger("corral.planner.broker.waiting.probe")

_TOKEN: Final = "corral-are-you-there"
_ANSWER_SECONDS: Final = 1.0
_AT_ONCE: Final = 500


def probe_subject(reply_to: str) -> str | None:
    """Subject that probes the client of a reply subject; None for an inbox that can't be probed."""
    inbox, _, token = reply_to.rpartition(".")
    if reply_to.startswith(ACROSS) or "." not in inbox or not token:
        return None
    return f"{inbox}.{_TOKEN}"


class Probe:
    """Probes clients through the NATS server.

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
        """Reply subjects, of those given, whose clients are certainly connected."""
        found: set[str] = set()
        asked = [(reply, subject) for reply in dict.fromkeys(replies) if (subject := probe_subject(reply)) is not None]
        async with self._asking:
            for at in range(0, len(asked), _AT_ONCE):
                present = await self._present(asked[at : at + _AT_ONCE])
                if present is None:
                    break
                found |= present
        return found

    async def _present(self, asked: list[tuple[str, str]]) -> set[str] | None:
        """Probe one batch of (reply subject, probe subject); returns the reply subjects of connected clients.

        None if the probe proves nothing now, which then holds for other batches, too.
        """
        try:
            await self._listen()
            self._absent = set()
            self._round += 1  # a late answer to an earlier round must not count
            self._last.clear()
            for number, (_, subject) in enumerate(asked):
                await self._nc.publish(subject, b"", reply=f"{self._inbox}.{self._round}-{number}")
            # The server answers in order: the 503 for this inbox, which does not exist, comes after all others.
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
            self._subscription = await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_answer)

    async def _on_answer(self, message: Msg) -> None:
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
        """Unsubscribe."""
        if self._subscription is not None:
            with contextlib.suppress(NatsError, OSError):
                await self._subscription.unsubscribe()
            self._subscription = None
