"""Liveness of the clients of queued requests: one that is gone must not get devices, nor keep others from them.

A silent client is probed. If the probe does not find it, its request does not start: the client is asked to send it
again, and if it does not, the request leaves the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from ....schemas.requests import Error
from ..pending import PendingRequest
from .presence import ASK_AGAIN, Presence
from .queue import NEVER, QueuedRequest, WaitingQueue

log = logging.getLogger("corral.planner.broker.waiting.waiting_clients")

ProbeClients = Callable[[Sequence[str]], Awaitable[set[str]]]
"""Returns those of some reply subjects whose clients are certainly connected."""


async def probe_none(_: Sequence[str]) -> set[str]:
    """Default without a probe: clients are heard only when they ask again."""
    return set()


class WaitingClients:
    """Clients of the queued requests of one term.

    Args:
        queue: their requests; the payload of each is its `PendingRequest`.
        silence_seconds: a request whose client is not heard for so long leaves the queue.
        probe: probes clients.
        keep_place: keeps the place of a request that has left the queue.
        answer: answers all callers of a request.
        wake: called when the queue should be served.

    Attributes:
        presence: silence of each.
    """

    def __init__(
        self,
        queue: WaitingQueue,
        silence_seconds: float,
        probe: ProbeClients,
        keep_place: Callable[[QueuedRequest], Awaitable[None]],
        answer: Callable[[PendingRequest, Struct], Awaitable[None]],
        wake: Callable[[], None],
    ) -> None:
        self.presence = Presence(silence_seconds)
        self._queue = queue
        self._probe = probe
        self._keep_place = keep_place
        self._answer = answer
        self._wake = wake
        self._closed = False

    def heard(self, queued: QueuedRequest) -> None:
        """Note that a client was heard, whose request may start now."""
        self.presence.note_heard(queued)
        if not queued.entry.ready:
            self._queue.set_ready(queued, True)
            self._wake()

    def silence(self, queued: QueuedRequest) -> float:
        """Seconds for which a client was not heard, though it could have been; 0 where no client waits."""
        return 0.0 if _unattended(queued) else self.presence.silence(queued)

    def unheard(self, queued: QueuedRequest) -> None:
        """Note that a client was never heard in this term: its request does not start before it is."""
        queued.heard_in = NEVER
        self._queue.set_ready(queued, False)

    async def probe(self, now: float, connection: int | None) -> None:
        """Probe silent clients: remove the requests of those that are gone, and ask others to send them again.

        Args:
            now: seconds, by a monotonic clock.
            connection: number of the connection to NATS; None while there is none.
        """
        presence = self.presence
        presence.tick(now, connection)
        quiet = [queued for queued in self._queue if not _unattended(queued) and presence.needs_probe(queued)]
        if not quiet:
            return
        for queued in quiet:
            if not presence.is_fresh(queued):
                self._queue.set_ready(queued, False)
        left: list[Awaitable[None]] = []
        there = await self._probe([caller.reply_to for queued in quiet for caller in queued.payload.callers])
        for queued in quiet:
            pending: PendingRequest = queued.payload
            if self._closed or queued not in self._queue:
                continue
            if any(caller.reply_to in there for caller in pending.callers):
                self.heard(queued)
                continue
            queued.probed = True
            if presence.timed_out(queued):
                self._queue.remove(queued)
                left.append(self._leave(queued, self._silence_error(queued)))
            elif presence.needs_notice(queued) and not queued.asked_to_retry:
                await self._ask_to_retry(queued)
        if left:
            self._wake()
            await asyncio.gather(*left)

    async def _leave(self, queued: QueuedRequest, error: Error) -> None:
        """Keep the place of a request that has left the queue, and answer it: with that its entry is deleted."""
        log.info("request %s of %s is out of line: silent", queued.request.request_id, queued.request.owner)
        await self._keep_place(queued)
        await self._answer(queued.payload, error)

    async def ask_those_in_turn(self) -> None:
        """Ask the clients to retry whose turn it is, but that were silent, and were not found by a probe."""
        for entry in self._queue.line.unready:
            queued: QueuedRequest = entry.payload
            if queued in self._queue and queued.probed and not queued.asked_to_retry:
                await self._ask_to_retry(queued)

    def close(self) -> None:
        """Stop: the requests are answered or forwarded by others now."""
        self._closed = True

    async def _ask_to_retry(self, queued: QueuedRequest) -> None:
        """Ask a silent client to send its request again, upon which that keeps its place."""
        queued.asked_to_retry = True
        self._queue.set_ready(queued, False)
        error = self._silence_error(queued)
        for caller in queued.payload.take_senders():
            await caller.answer(error)

    def _silence_error(self, queued: QueuedRequest) -> Error:
        seconds = self.presence.silence_seconds
        return Error(
            code="unavailable",
            message=(
                f"Request {queued.request.request_id} was not heard for {self.presence.silence(queued):.0f} s, and is "
                f"out of line after {seconds:g} s. Ask again with the same request_id and body to keep your place, at "
                f"least every {seconds * ASK_AGAIN:g} s as long as you wait"
            ),
        )


def _unattended(queued: QueuedRequest) -> bool:
    pending: PendingRequest = queued.payload
    return pending.unattended
